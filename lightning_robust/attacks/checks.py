"""What an attack refuses and warns of: images, labels, targets, masks and answers of a model that it cannot use.

Each check is one clear sentence that says what is wrong and what to do about it, told before anything is computed.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from lightning_robust.errors import UserError


def check_images(images: Tensor) -> None:
    """Refuse what is not a batch of pixel images.

    Raises:
        UserError: for another shape or type than float ``(N, C, H, W)``, NaN, and values outside [0, 1].
    """
    if images.dim() != 4 or not images.is_floating_point() or 0 in images.shape:
        raise UserError(
            f"images of shape {tuple(images.shape)} and type {images.dtype}: an attack needs a non-empty float batch "
            "(N, C, H, W) in [0, 1]"
        )
    if images.dtype in (torch.float16, torch.bfloat16):
        raise UserError(
            f"images of type {images.dtype}: half precision cannot hold a budget such as 8/255; give float32 images, "
            "and let the model run in half precision under autocast (trainer.precision=bf16-mixed and not bf16-true) "
            "or with accelerate(model, dtype=torch.bfloat16)"
        )
    low, high = (float(value) for value in torch.aminmax(images.detach()))
    if not (low >= 0 and high <= 1):  # written so that NaN is caught
        if low != low or high != high:
            raise UserError("images hold NaN: check the data and the transforms before the attack", non_finite=True)
        raise UserError(
            f"images reach from {low:.3g} to {high:.3g}, outside [0, 1]: attacks and ε live in pixel space; give raw "
            "pixels and put the normalisation (mean and std) inside the model"
        )


def check_finite(images: Tensor) -> Tensor:
    """Adversarial images as they are.

    Raises:
        UserError: where they are not finite, which only a broken gradient can make them.
    """
    if not bool(torch.isfinite(images).all()):
        raise UserError(
            "the model's gradient is NaN or infinite at an attacked image: no step can be made along it",
            non_finite=True,
        )
    return images


def check_logits(logits: Tensor, images: Tensor, labels: Tensor, targets: Tensor | None) -> None:
    """Refuse logits of another shape, NaN, and labels or targets that the model has no class for.

    Raises:
        UserError: naming what is wrong.
    """
    if not isinstance(logits, Tensor):
        raise UserError(f"the model gave a {type(logits).__name__}: an attack needs its logits alone, (N, classes)")
    if logits.dim() != 2 or len(logits) != len(images):
        raise UserError(f"the model gave shape {tuple(logits.shape)} for {len(images)} images: logits are (N, classes)")
    if torch.isnan(logits.detach()).any():
        raise UserError(
            "the model gave NaN for a clean or random start image: its weights or its input are broken",
            non_finite=True,
        )
    for name, classes in (("labels", labels), ("targets", targets)):
        if classes is not None and int(classes.max()) >= logits.shape[1]:
            raise UserError(
                f"{name} go up to {int(classes.max())} but the model has {logits.shape[1]} classes (0 to "
                f"{logits.shape[1] - 1})"
            )


def warn_of_probabilities(logits: Tensor) -> None:
    """Warn, as AutoAttack does, of a model that ends in a softmax: its saturated gradients flatter it."""
    values = logits.detach()
    if values.shape[1] > 1 and bool((values >= 0).all()) and bool(((values.sum(1) - 1).abs() < 1e-3).all()):
        warnings.warn(
            "the model's outputs look like probabilities, and attacks need logits: gradients through a saturated "
            "softmax vanish, and the model seems more robust than it is; take the softmax off its end",
            stacklevel=2,
        )


def check_no_nan(logits: Tensor) -> None:
    """Refuse NaN for attacked images: its argmax is some class, which would count as fooled.

    Raises:
        UserError: saying of how many images.
    """
    if holds_nan(logits):
        count = int(logits.isnan().any(1).sum())
        raise UserError(
            f"the model gave NaN for {count} of {len(logits)} attacked images: its weights are broken, or it "
            "cannot take what an image in [0, 1] may hold",
            non_finite=True,
        )


def check_gradient(gradient: Tensor | None) -> Tensor:
    """The gradient ``(n, C, H, W)`` as it is.

    Raises:
        UserError: where there is none, or NaN, whose sign is 0: an image that stays where it is would seem robust.
    """
    if gradient is None:
        raise UserError(
            "the model's output does not depend on its input through differentiable operations: a gradient "
            "attack cannot see through it; use a black-box attack or give the model a differentiable stand-in"
        )
    if holds_nan(gradient):
        count = int(gradient.flatten(1).isnan().any(1).sum())
        raise UserError(
            f"the model's gradient is NaN at {count} of {len(gradient)} attacked images: no step can be made along it",
            non_finite=True,
        )
    return gradient


def holds_nan(values: Tensor) -> bool:
    """Whether any value is NaN."""
    # of the sum first, which costs a tenth of a look at each value
    return math.isnan(float(values.detach().sum())) and bool(values.isnan().any())


def check_classes(values: Tensor, count: int, name: str, device: torch.device) -> Tensor:
    """Labels or targets as int64 on a device, a copy.

    Raises:
        UserError: where they are not one class an image.
    """
    if values.shape != (count,) or values.is_floating_point() or values.dtype == torch.bool:
        raise UserError(
            f"{name} of shape {tuple(values.shape)} and type {values.dtype}: an attack needs one integer an image, "
            f"here ({count},)"
        )
    values = values.detach().to(device=device, dtype=torch.int64, copy=True)
    if int(values.min()) < 0:
        raise UserError(f"{name} hold {int(values.min())}: classes are numbered from 0")
    return values


def check_targets(targets: Tensor, labels: Tensor) -> None:
    """Refuse targets that are the labels: they would count as reached at no cost.

    Raises:
        UserError: naming the images.
    """
    same = (targets == labels).nonzero()[:, 0].tolist()
    if same:
        named = ", ".join(str(row) for row in same[:5]) + (", …" if len(same) > 5 else "")
        raise UserError(f"the targets of the images {named} are their labels: choose other classes")


def expand_mask(mask: Tensor, images: Tensor) -> Tensor:
    """Bring a mask to ``(1 or N, 1 or C, H, W)`` in the images' type.

    Raises:
        UserError: if it has another height or width, another number of images, or values other than 0 and 1.
    """
    count, channels, height, width = images.shape
    given = tuple(mask.shape)
    if mask.dim() == 2:
        mask = mask[None, None]
    elif mask.dim() == 3:
        mask = mask[:, None]
    fits = (
        mask.dim() == 4
        and mask.shape[0] in (1, count)
        and mask.shape[1] in (1, channels)
        and mask.shape[2:] == (height, width)
    )
    if not fits:
        raise UserError(
            f"a mask of shape {given} does not fit images of shape {tuple(images.shape)}: give (H, W), (N, H, W) or "
            "(N, 1 or C, H, W)"
        )
    mask = mask.detach().to(device=images.device, dtype=images.dtype)
    if not ((mask == 0) | (mask == 1)).all():
        raise UserError("a mask holds 1 (may change) and 0 (may not), nothing between")
    return mask

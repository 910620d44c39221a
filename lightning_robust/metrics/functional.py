"""Gradients of the loss with respect to the image, computed without touching the model."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_robust.attacks.base import Problem, check_images, expand_mask
from lightning_robust.attacks.context import Model, attacking
from lightning_robust.attacks.losses import cross_entropy
from lightning_robust.errors import UserError


def input_gradient(model: Model, images: Tensor, labels: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Gradient of each image's own cross-entropy with respect to its pixels, at the clean image.

    The model is lent in eval mode and comes back as it was: module modes, ``requires_grad`` and every ``.grad``. Works
    under ``inference_mode``, ``no_grad``, autocast and a distributed wrapper.

    Args:
        model: from images ``(N, C, H, W)`` in [0, 1] to logits ``(N, K)``.
        images: float ``(N, C, H, W)`` in [0, 1].
        labels: ``(N,)`` true classes, any integer type.
        mask: 1 where the gradient is wanted, 0 where it is to be zero: ``(H, W)``, ``(N, H, W)`` or
            ``(N, 1|C, H, W)``.

    Returns:
        ``(N, C, H, W)`` in the images' type, in units of loss (nat) per unit of pixel value; detached. The loss is
        summed and not averaged over the batch: an image's gradient does not depend on its neighbours.

    Raises:
        UserError: for images outside [0, 1], labels that are not one class an image, a mask of another size.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
        >>> with torch.inference_mode():
        ...     gradient = input_gradient(model, torch.rand(5, 3, 2, 2), torch.tensor([0, 1, 0, 1, 1]))
        >>> gradient.shape
        torch.Size([5, 3, 2, 2])
    """
    check_images(images)
    if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise UserError(
            f"labels of shape {tuple(labels.shape)} and type {labels.dtype}: an input gradient needs one integer an "
            f"image, here ({len(images)},)"
        )
    if int(labels.min()) < 0:
        raise UserError(f"labels hold {int(labels.min())}: classes are numbered from 0")
    with attacking(model) as lent:
        images = images.detach().clone()  # a tensor made in inference mode cannot be differentiated; its copy can
        labels = labels.detach().to(device=images.device, dtype=torch.int64, copy=True)
        problem = Problem(
            model=lent,
            images=images,
            labels=labels,
            targets=None,
            mask=None if mask is None else expand_mask(mask, images),
            keys=torch.zeros_like(labels),  # random keys: nothing is drawn here
        )
        rows = torch.arange(len(images), device=images.device)
        return problem.loss_and_gradient(images, rows, lambda logits, _: cross_entropy(logits, labels))[1]


def pixel_gradient(gradients: Tensor) -> Tensor:
    """One value a pixel: the mean over the channels of the gradient's absolute value (Hwang et al. 2019).

    Args:
        gradients: ``(N, C, H, W)``, each image's own, as :func:`input_gradient` gives them.

    Returns:
        ``(N, H, W)`` float64, 0 or more.

    Raises:
        UserError: for another shape, and for a gradient that is not finite.

    Example:
        >>> pixel_gradient(torch.tensor([1.0, -3.0]).view(1, 2, 1, 1))
        tensor([[[2.]]], dtype=torch.float64)
    """
    if gradients.dim() != 4 or gradients.shape[1] == 0:
        raise UserError(f"gradients of shape {tuple(gradients.shape)}: they are (N, C, H, W), one for each image")
    pixels = gradients.detach().abs().sum(1, dtype=torch.float64) / gradients.shape[1]
    if not torch.isfinite(pixels).all():
        broken = int((~torch.isfinite(pixels)).flatten(1).any(1).sum())
        raise UserError(
            f"the gradients of {broken} of {len(pixels)} images hold NaN or infinity: the model's weights are broken, "
            "or its precision is too low (try bf16 or 32 bits instead of fp16)"
        )
    return pixels

"""How large the gradients are that a saliency attack follows: the Jacobian of the probabilities, in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_robust.attacks.base import Problem, check_images
from lightning_robust.attacks.context import Model, attacking
from lightning_robust.errors import UserError

#: Lower ends of the ten ranges, each up to the next; as in arXiv 1511.04508, whose last one ends at 1.
RANGES: tuple[float, ...] = (0.0, 1e-40, 1e-35, 1e-30, 1e-25, 1e-20, 1e-15, 1e-10, 1e-5, 1e-3)
#: What they are called.
RANGE_NAMES: tuple[str, ...] = (
    "0 to 1e-40", "1e-40 to 1e-35", "1e-35 to 1e-30", "1e-30 to 1e-25", "1e-25 to 1e-20", "1e-20 to 1e-15",
    "1e-15 to 1e-10", "1e-10 to 1e-5", "1e-5 to 1e-3", "1e-3 and more",
)  # fmt: skip
_SMALLEST = 5e-324  # of float64: what underflows is counted as this where a logarithm is taken
_ENTRIES = 1 << 24  # of the Jacobians that are held at once


def softmax_jacobian_amplitude(model: Model, images: Tensor) -> Tensor:
    """Mean |∂F_k/∂x_i| over the classes k and features i of each image, F the softmax of the logits.

    The softmax is differentiated by hand, J_k = p_k Σ_{j≠k} p_j (∂z_k - ∂z_j), which loses nothing where a probability
    rounds to one. What is smaller than 1e-308 underflows to zero all the same.

    Args:
        model: from images ``(N, C, H, W)`` to logits ``(N, K)``; give it in float64.
        images: float64 ``(N, C, H, W)`` in [0, 1].

    Returns:
        ``(N,)`` float64, 0 or more.

    Raises:
        UserError: for images of another type or outside [0, 1], and gradients that are not finite.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)).double()
        >>> softmax_jacobian_amplitude(model, torch.rand(5, 1, 2, 2, dtype=torch.float64)).shape
        torch.Size([5])
    """
    check_images(images)
    if images.dtype != torch.float64:
        raise UserError(
            f"images of type {images.dtype}: amplitudes of adversarial gradients underflow in it; give model and "
            "images in float64"
        )
    with attacking(model) as lent:
        with torch.no_grad():
            classes = lent(images[:1]).shape[1]
        chunk = max(1, _ENTRIES // (classes * images[0].numel()))
        return torch.cat([_amplitude(lent, part.detach().clone()) for part in images.split(chunk)])


def _amplitude(model: Model, images: Tensor) -> Tensor:
    nothing = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    problem = Problem(model=model, images=images, labels=nothing, targets=None, mask=None, keys=nothing)
    rows = torch.arange(len(images), device=images.device)
    _, slopes, logits = problem.gradients(images, rows, lambda logits, _: logits.unbind(1))
    slope = torch.stack([each.flatten(1) for each in slopes], 1)  # (n, K, F)
    probabilities = logits.double().softmax(1)
    # of one class the others' sum, and not one minus itself, which rounds to zero long before it is
    apart = 1 - torch.eye(logits.shape[1], dtype=torch.float64, device=images.device)
    others = probabilities @ apart
    weights = torch.diag_embed(others) - probabilities[:, None] * apart
    amplitude = ((probabilities[..., None] * weights) @ slope).abs().mean((1, 2))
    if not bool(amplitude.isfinite().all()):
        raise UserError("the model's gradient is NaN or infinite: its weights are broken", non_finite=True)
    return amplitude


class GradientAmplitudes(NamedTuple):
    """What :class:`GradientAmplitude` computes.

    Attributes:
        mean: float64, arithmetic mean of the images' amplitudes; the few images that are not saturated make it up.
        log10_mean: float64, mean of their decimal logarithms: the order of magnitude of a typical image. An amplitude
            that underflows counts as 5e-324.
        counts: ``(10,)`` int64, images in each of :data:`RANGES`.
        images: int64.
    """

    mean: Tensor
    log10_mean: Tensor
    counts: Tensor
    images: Tensor


class GradientAmplitude(Metric):
    """The amplitudes of adversarial gradients over a set of images: mean, order of magnitude, and ten ranges.

    The figure of defensive distillation (Papernot et al., arXiv 1511.04508): as the temperature of the training rises,
    images move from the large to the small ranges. States are sums: the same on any number of ranks and batch sizes.

    Raises:
        UserError: from ``update`` for amplitudes that are not a vector of finite numbers of 0 or more.

    Example:
        >>> metric = GradientAmplitude()
        >>> metric.update(torch.tensor([1e-2, 1e-6], dtype=torch.float64))
        >>> found = metric.compute()
        >>> round(float(found.log10_mean), 6), found.counts.tolist()
        (-4.0, [0, 0, 0, 0, 0, 0, 0, 1, 0, 1])
    """

    full_state_update = False
    is_differentiable = False
    total: Tensor
    log10_total: Tensor
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("log10_total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(RANGES), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, amplitudes: Tensor) -> None:
        """Count images.

        Args:
            amplitudes: ``(N,)`` from :func:`softmax_jacobian_amplitude`.
        """
        if amplitudes.dim() != 1 or amplitudes.dtype != torch.float64:
            raise UserError(
                f"amplitudes of shape {tuple(amplitudes.shape)} and type {amplitudes.dtype}: one float64 an image"
            )
        if not bool((amplitudes.isfinite() & (amplitudes >= 0)).all()):
            raise UserError("amplitudes hold values that are negative, NaN or infinite")
        amplitudes = amplitudes.detach().to(self.total.device)
        ends = torch.tensor(RANGES[1:], dtype=torch.float64, device=amplitudes.device)
        places = torch.bucketize(amplitudes, ends, right=True)
        # not in place: a state that was reset in inference mode may not be changed in place outside of it
        self.total = self.total + amplitudes.sum()
        self.log10_total = self.log10_total + amplitudes.clamp_min(_SMALLEST).log10().sum()
        self.counts = self.counts + torch.bincount(places, minlength=len(RANGES))

    def compute(self) -> GradientAmplitudes:
        """Over all images counted, on every rank the same; NaN before any image."""
        images = self.counts.sum()
        return GradientAmplitudes(self.total / images, self.log10_total / images, self.counts, images)

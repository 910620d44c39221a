"""Norms, steepest steps, and projections onto the ε-ball cut with the pixel box [0, 1].

All functions take and give batches of perturbations ``(N, C, H, W)`` and treat each image on its own, so no result
depends on an image's neighbours in the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_robust.attacks.threat_model import AnyNorm, Norm

_TINY = 1e-12  # keeps a zero gradient zero instead of NaN


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Shape one value an image ``(N,)`` so that it broadcasts over ``like`` ``(N, C, H, W)``."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def norms(delta: Tensor, norm: AnyNorm) -> Tensor:
    """The norm of each image's perturbation: ``(N, C, H, W)`` to ``(N,)``; ``"l0"`` counts the pixels that change."""
    if norm == "l0":
        return delta.ne(0).any(1).flatten(1).sum(1).to(delta.dtype)
    flat = delta.flatten(1)
    if norm == "linf":
        return flat.abs().amax(1)
    return flat.norm(p=2 if norm == "l2" else 1, dim=1)


def steepest(gradient: Tensor, norm: Norm, sparsity: float = 0.99) -> Tensor:
    """The direction of length one in ``norm`` along which the loss rises (nearly) most.

    For ``l1`` the step is spread evenly over the ``1 - sparsity`` share of largest gradients (SLIDE, Tramèr & Boneh,
    arXiv 1904.13000), since the exact steepest direction would move a single value.

    Args:
        gradient: ``(N, C, H, W)``.
        norm: the norm that the step is measured in.
        sparsity: share of values that an ``l1`` step leaves alone, in [0, 1).
    """
    if norm == "linf":
        return gradient.sign()
    if norm == "l2":
        # the largest value first: the squares of a saturated network's gradient would underflow to zero
        scaled = gradient / per_image(norms(gradient, "linf"), gradient).clamp_min(torch.finfo(gradient.dtype).tiny)
        return scaled / per_image(norms(scaled, "l2"), scaled).clamp_min(_TINY)
    flat = gradient.flatten(1)
    keep = max(1, round(flat.shape[1] * (1 - sparsity)))
    top = flat.abs().topk(keep, dim=1)
    direction = torch.zeros_like(flat).scatter_(1, top.indices, flat.gather(1, top.indices).sign())
    return (direction / direction.abs().sum(1, keepdim=True).clamp_min(1)).view_as(gradient)


def project_ball(delta: Tensor, norm: Norm, eps: float) -> Tensor:
    """The nearest perturbation in the ε-ball around zero, without the pixel box."""
    if norm == "linf":
        return delta.clamp(-eps, eps)
    if norm == "l2":
        length = per_image(norms(delta, "l2"), delta)
        return delta * (eps / length.clamp_min(_TINY)).clamp_max(1)
    return _project_l1(delta, eps, torch.full_like(delta, torch.inf).neg(), torch.full_like(delta, torch.inf))


def project(images: Tensor, moved: Tensor, norm: Norm, eps: float) -> Tensor:
    """Bring ``moved`` back into the ε-ball around ``images`` and into [0, 1].

    Clipping to the box after projecting onto an ``linf`` or ``l2`` ball never leaves the ball, since a clean image lies
    in the box: every value moves towards it. For ``l1`` that order loses most of the budget, so the exact projection
    onto ball and box together is taken (Croce & Hein, arXiv 2103.01208).

    Args:
        images: clean images in [0, 1], ``(N, C, H, W)``.
        moved: where a step led, same shape.
        norm: norm of the ball.
        eps: its radius in pixel units.
    """
    if norm == "l1":
        # a millionth inside, since adding many small values to the image rounds their sum
        return (images + _project_l1(moved - images, eps * (1 - 1e-6), -images, 1 - images)).clamp(0, 1)
    if norm == "linf":
        return torch.minimum(torch.maximum(moved, images - eps), images + eps).clamp(0, 1)
    return (images + project_ball(moved - images, norm, eps)).clamp(0, 1)


def _project_l1(delta: Tensor, eps: float, low: Tensor, high: Tensor) -> Tensor:
    """Nearest point of {‖d‖₁ ≤ ε, low ≤ d ≤ high} with low ≤ 0 ≤ high: clip(soft(delta, λ)) for the right λ ≥ 0.

    The norm of that expression falls with λ, so λ is found by bisection on the whole batch at once; the upper end of
    the last bracket is taken, which is inside the ball.
    """
    if eps == 0:
        return torch.zeros_like(delta)
    room = torch.where(delta > 0, high, -low)  # how far each value may go in its own direction
    size = delta.abs()

    def shrunk(lam: Tensor) -> Tensor:
        return torch.minimum((size - per_image(lam, delta)).clamp_min(0), room)

    lower = torch.zeros(len(delta), dtype=delta.dtype, device=delta.device)
    upper = size.flatten(1).amax(1)
    inside = shrunk(lower).flatten(1).sum(1) <= eps
    for _ in range(40 if delta.dtype == torch.float64 else 26):  # to the last bit of the number format
        middle = (lower + upper) / 2
        over = shrunk(middle).flatten(1).sum(1) > eps
        lower, upper = torch.where(over, middle, lower), torch.where(over, upper, middle)
    lam = torch.where(inside, torch.zeros_like(upper), upper)
    return shrunk(lam) * delta.sign()

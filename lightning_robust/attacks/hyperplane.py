"""Linearised decision boundaries: how far they are, which is nearest, and the smallest move onto one within [0, 1].

What DeepFool and FAB share. A boundary is where a function f of the logits is zero; near an image it is the hyperplane
f + w·d = 0 in the perturbation d, with w the gradient of f. All functions treat each image of a batch on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.projection import norms, per_image
from lightning_robust.attacks.threat_model import Norm

_DUAL: dict[str, Norm] = {"linf": "l1", "l2": "l2", "l1": "linf"}

Functions = Callable[[Tensor, Tensor], Sequence[Tensor]]
"""From logits ``(n, K)`` and rows ``(n,)`` to some tensors of one value an image ``(n,)``."""


def slopes(normals: Tensor, norm: Norm) -> Tensor:
    """How fast f rises along the steepest direction of length one in ``norm``: the dual norm of its gradient.

    Args:
        normals: gradients ``(n, C, H, W)``.
        norm: the norm that perturbations are measured in.

    Returns:
        ``(n,)``; |f| divided by it is the distance to the hyperplane, without the pixel box.
    """
    if norm != "l2":
        return norms(normals, _DUAL[norm])
    # the largest value first: the squares of a saturated network's gradient would underflow to zero
    largest = norms(normals, "linf")
    return largest * norms(normals / per_image(largest, normals).clamp_min(torch.finfo(normals.dtype).tiny), "l2")


def nearest(values: Sequence[Tensor], normals: Sequence[Tensor], norm: Norm) -> tuple[Tensor, Tensor]:
    """The nearest of several linearised boundaries, each image's own.

    Args:
        values: f of each boundary, ``(n,)`` each.
        normals: its gradient, ``(n, C, H, W)`` each.
        norm: the norm that distances are measured in.

    Returns:
        f ``(n,)`` and gradient ``(n, C, H, W)`` of the nearest.
    """
    value, normal = values[0], normals[0]
    if len(values) == 1:
        return value, normal
    tiny = torch.finfo(normal.dtype).tiny
    shortest = value.abs() / slopes(normal, norm).clamp_min(tiny)
    for other, gradient in zip(values[1:], normals[1:], strict=True):
        distance = other.abs() / slopes(gradient, norm).clamp_min(tiny)
        nearer = distance < shortest
        shortest = torch.where(nearer, distance, shortest)
        value = torch.where(nearer, other, value)
        normal = torch.where(per_image(nearer, normal), gradient, normal)
    return value, normal


def gradients_if_worthwhile(
    problem: Problem, points: Tensor, rows: Tensor, functions: Functions
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """A forward pass, and backward passes through it unless too many of the images turn out to be fooled.

    The gradient at a point that fools is of no use, and a backward pass cannot be had for a part of a batch. With m
    backward passes to make, and a forward pass about as dear as a backward pass, fresh passes for the others alone are
    cheaper as soon as more than one image in m + 1 is fooled. Which way is taken changes what it costs, not what comes
    of it.

    Args:
        problem: the batch.
        points: ``(n, C, H, W)`` points to ask about.
        rows: ``(n,)`` their places in the batch.
        functions: as in :meth:`Problem.gradients`.

    Returns:
        Values and gradients as of :meth:`Problem.gradients`, or two empty lists where no backward pass was made; and
        the logits ``(n, K)``.
    """

    def unless_fooled(logits: Tensor, rows: Tensor) -> Sequence[Tensor]:
        values = functions(logits, rows)
        # averages over draws are known only when all of them are there
        if problem.draws is None:
            fooled = int(problem.fooled(logits.detach(), rows).sum())
            if fooled * (1 + len(values)) > len(rows):
                return []
        return values

    return problem.gradients(points, rows, unless_fooled)


def smallest_move(points: Tensor, normals: Tensor, gaps: Tensor, norm: Norm) -> Tensor:
    """The smallest move d from a point in the box onto a hyperplane, which stays in the box [0, 1].

    Of least ``norm`` under normal·d = gap and 0 ≤ point + d ≤ 1 (Croce & Hein, arXiv 1907.02044, section 3.1); where
    the hyperplane misses the box, the move to the corner of the box that is nearest to it. A value moves only where the
    normal is not zero, so a mask on the gradient is kept.

    Every value moves the way that its part of the normal says, as far as the box allows: by min(λ, room) in L∞ and
    min(λ·|normal|, room) in L2, with one λ an image; and in L1 the values of largest |normal| move all their way.

    Args:
        points: ``(n, C, H, W)`` in [0, 1].
        normals: ``(n, C, H, W)``, of any length.
        gaps: ``(n,)`` what normal·d has to be.
        norm: the norm that is minimised.

    Returns:
        ``(n, C, H, W)``.

    Example:
        >>> point, normal = torch.tensor([[[[0.5, 0.9]]]]), torch.tensor([[[[1.0, 1.0]]]])
        >>> smallest_move(point, normal, torch.tensor([0.4]), "linf")
        tensor([[[[0.3000, 0.1000]]]])
    """
    start, normal = points.flatten(1), normals.flatten(1)
    # to a largest value of one: gradients may be so small that their squares underflow
    scale = normal.abs().amax(1, keepdim=True).clamp_min(torch.finfo(normal.dtype).tiny)
    way = torch.where(gaps[:, None] < 0, -normal, normal) / scale
    gap = gaps.abs()[:, None] / scale
    room = torch.where(way > 0, 1 - start, start)
    weight = way.abs()
    if norm == "l1":
        length = _greedy(weight, room, gap)
    else:
        speed = torch.ones_like(weight) if norm == "linf" else weight
        length = torch.minimum(_level(weight, speed, room, gap) * speed, room)
    return (way.sign() * length).view_as(points)


def _level(weight: Tensor, speed: Tensor, room: Tensor, gap: Tensor) -> Tensor:
    """The λ ``(n, 1)`` with Σ weight·min(λ·speed, room) = gap, or one so large that everything is at its end.

    The sum is concave in λ and made of straight pieces, so Newton's method from zero climbs to λ from below, and is
    there as soon as no further value comes to its end: after some five rounds, with no need to sort. A round more
    changes nothing, so an image does not notice how many rounds its neighbours take.
    """
    level = torch.zeros_like(gap)
    ends, rates = weight * room, weight * speed
    none = torch.zeros((), dtype=gap.dtype, device=gap.device)
    while True:
        full = level * speed >= room
        left = gap - torch.where(full, ends, none).sum(1, keepdim=True)
        rate = torch.where(full, none, rates).sum(1, keepdim=True)
        reached = torch.where(rate > 0, left / rate, torch.inf).clamp_max(torch.finfo(gap.dtype).max)
        further = reached > level  # never for NaN
        if not further.any():
            return level
        level = torch.where(further, reached, level)


def _greedy(weight: Tensor, room: Tensor, gap: Tensor) -> Tensor:
    """Lengths with Σ weight·length = gap and the least sum: values move to their end in order of their weight."""
    weight, order = weight.sort(dim=1, descending=True, stable=True)
    room = room.gather(1, order)
    ends = weight * room
    before = ends.cumsum(1) - ends
    length = torch.minimum(((gap - before) / weight.clamp_min(torch.finfo(gap.dtype).tiny)).clamp_min(0), room)
    return torch.zeros_like(length).scatter_(1, order, torch.where(weight > 0, length, torch.zeros_like(length)))

"""Whether the gradient points uphill, and what the loss looks like around an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_robust.attacks.losses import cross_entropy, margin
from lightning_robust.attacks.projection import steepest
from lightning_robust.attacks.randomness import image_keys, normal
from lightning_robust.audit.budgets import Budget
from lightning_robust.audit.checks.base import CARLINI, Check, Findings, Passes, counted
from lightning_robust.audit.result import Seen
from lightning_robust.audit.statistics import MATTERS
from lightning_robust.audit.subject import Subject

_PART = 0.25  # of ε: near enough for a gradient to hold, far enough to leave one step of an 8-bit image
_RIVALS = 4  # random directions that the gradient is held against
_SLICES = 4  # images that are drawn
_GRID = 15  # points along either direction


def _uphill(subject: Subject, budget: Budget, found: Findings) -> Seen:
    probes = subject.first_right(budget.probes)
    model = subject.fixed()
    norm, step = subject.threat_model.ball, _PART * subject.threat_model.radius

    def climbs(images: Tensor, labels: Tensor) -> Tensor:
        # NaN is no direction
        gradient = subject.gradients(model, images, labels, cross_entropy)[1].nan_to_num(0, 0, 0)
        start = _both(subject.answers(images, model), labels)
        keys = image_keys(images, subject.seed)
        ways = [gradient, *(normal(keys, images.shape, images.dtype, stream=n + 1) for n in range(_RIVALS))]
        rises = [
            _both(subject.answers((images + step * steepest(way, norm)).clamp(0, 1), model), labels) - start
            for way in ways
        ]
        return torch.stack(rises, 1)

    rises = subject.each(probes, climbs)
    rise = rises[:, :, 0]
    told = rise.ne(0).any(1)  # where nothing moves the loss there is nothing to compare
    # that of the cross-entropy is not quite that of the margin where classes are near each other: a direction counts
    # that is better for both
    beaten = told & (rises[:, 1:] > rises[:, :1]).all(2).any(1)
    total, count = int(told.sum()), int(beaten.sum())
    found.landscape = _slices(subject, model)
    text = (
        f"at {count} of {total} images one of {_RIVALS} random directions raises margin and cross-entropy more than "
        f"the gradient's does, over {_PART:g} ε; a gradient that says nothing loses at about "
        f"{round(100 * _RIVALS / (_RIVALS + 1))} of 100"
    )
    # past a bend of the loss a gradient may well lose: a few images are no sign
    return counted(count, total, text, MATTERS, 2 * MATTERS)


def _both(logits: Tensor, labels: Tensor) -> Tensor:
    """Margin, and what has the cross-entropy's order and never saturates, the log-odds of an error: ``(n, 2)``."""
    true = logits.gather(1, labels[:, None])[:, 0]
    odds = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1) - true
    return torch.stack([margin(logits, labels), odds], 1)


def _slices(subject: Subject, model: Any) -> dict[str, Any]:
    """The cross-entropy of rescaled logits would hide a saturation: it is that of the logits as they are."""
    probes = subject.first_right(_SLICES)
    norm, eps = subject.threat_model.ball, subject.threat_model.radius
    steps = torch.linspace(-1, 1, _GRID)

    def grid(images: Tensor, labels: Tensor) -> Tensor:
        gradient = subject.gradients(model, images, labels, margin)[1].nan_to_num(0, 0, 0)
        along = eps * steepest(gradient, norm)
        across = eps * steepest(normal(image_keys(images, subject.seed), images.shape, images.dtype), norm)
        rows = []
        for up in steps.tolist():
            points = torch.cat([(images + up * along + side * across).clamp(0, 1) for side in steps.tolist()])
            loss = cross_entropy(subject.answers(points, model), labels.repeat(_GRID))
            rows.append(loss.view(_GRID, len(images)).T)
        return torch.stack(rows, 1)

    drawn = subject.each(probes, grid)
    numbers = probes.nonzero()[:, 0].tolist()
    return {
        "step": [round(value, 4) for value in steps.tolist()],
        "slices": [
            {"image": number, "loss": [[float(f"{value:.4g}") for value in row] for row in loss.tolist()]}
            for number, loss in zip(numbers, drawn, strict=True)
        ],
    }


UPHILL = Check(
    name="uphill",
    title="The gradient points uphill",
    rule=f"flagged if the share of images where a random direction raises the margin and the cross-entropy more than "
    f"the gradient's exceeds {MATTERS:g} (paired, exact binomial test)",
    source=f"{CARLINI} (slices of the loss)",
    reason="they do not point uphill: random directions do as well",
    mend="look at the slices of the loss, and find out what bends or hides it",
    look=_uphill,
    cost=lambda budget, images: Passes(
        forward=(_RIVALS + 2) * min(budget.probes, images) + _SLICES * _GRID**2, gradient=min(budget.probes, images)
    ),
)

"""How long an audit will take: the passes of each check, times what a pass takes here."""

from __future__ import annotations

import operator
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_robust.attacks.context import Model
from lightning_robust.attacks.losses import cross_entropy
from lightning_robust.audit import adaptive
from lightning_robust.audit.budgets import Budget
from lightning_robust.audit.checks import CHECKS, Passes
from lightning_robust.audit.subject import Subject

_WARM, _TIMED = 1, 2
_EXACT = 32  # images that float64 is timed with


@dataclass(frozen=True)
class Estimate:
    """Seconds beforehand: upper bounds, since images that fall leave early.

    Attributes:
        rows: name of each check, and its seconds.
        forward: seconds that an image takes forward.
        gradient: seconds that it takes forward and backward.
        exact_forward: the same in float64, in which gradients are held against finite differences.
        exact_gradient: the same in float64.
    """

    rows: list[tuple[str, float]]
    forward: float
    gradient: float
    exact_forward: float
    exact_gradient: float

    @property
    def total(self) -> float:
        """Seconds in all."""
        return sum(seconds for _, seconds in self.rows)


def estimate(subject: Subject, budget: Budget, random: bool = False) -> Estimate:
    """Time a pass of a batch, and multiply.

    Args:
        subject: the model and its images; on several processes each takes its part of the time.
        budget: what is to be done.
        random: also count the averages of adaptive attacks on a random model.
    """
    images, labels = subject.images[: subject.batch_size], subject.labels[: subject.batch_size]
    forward, gradient = _both(subject, subject.searched, images, labels)
    double = subject.in_double()
    exact_forward, exact_gradient = forward, gradient
    if double is not None:
        exact_forward, exact_gradient = _both(subject, double, images[:_EXACT].double(), labels[:_EXACT])
    own = len(subject.images) / max(subject.total, 1)
    passes: list[tuple[str, Passes]] = [(check.title, check.cost(budget, subject.total)) for check in CHECKS]
    extra = adaptive.cost(budget, subject.total, random)
    if extra != Passes():
        passes.append(("Adaptive attacks and AutoAttack", extra))
    seconds = Passes(forward, gradient, exact_forward, exact_gradient)
    rows = [(title, own * sum(map(operator.mul, asked, seconds))) for title, asked in passes]
    return Estimate(rows, *seconds)


def _both(subject: Subject, model: Model, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Seconds that an image takes forward, and forward and backward."""
    forward = _timed(lambda: subject.answers(images, model))
    gradient = _timed(lambda: subject.gradients(model, images, labels, cross_entropy))
    return forward / len(images), gradient / len(images)


def _timed(function: object) -> float:
    assert callable(function)
    for _ in range(_WARM):
        function()
    _wait()
    begun = time.perf_counter()
    for _ in range(_TIMED):
        function()
    _wait()
    return (time.perf_counter() - begun) / _TIMED


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def spoken(seconds: float) -> str:
    """A time as people say it.

    Example:
        >>> spoken(12.3), spoken(300), spoken(9000)
        ('12 s', '5.0 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

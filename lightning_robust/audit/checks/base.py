"""What a check is: a question with a rule, a source, and what to do where the answer is bad."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_robust.attacks import APGD
from lightning_robust.audit.budgets import Budget
from lightning_robust.audit.result import Seen
from lightning_robust.audit.statistics import MATTERS, STRAY, Outcome, judge, wilson_interval
from lightning_robust.audit.subject import Subject

CARLINI = "Carlini et al., arXiv 1902.06705"
ATHALYE = "Athalye et al., arXiv 1802.00420"
AUTOATTACK = "Croce & Hein, arXiv 2003.01690, and its code's warnings"
DISTILLED = "Carlini & Wagner, arXiv 1607.04311"


class Passes(NamedTuple):
    """Images that go through the model forward, and forward and backward; ``exact`` ones in float64."""

    forward: float = 0
    gradient: float = 0
    exact_forward: float = 0
    exact_gradient: float = 0


@dataclass
class Findings:
    """What checks leave for those after them, and for the figures.

    Attributes:
        fooled: by name of a gradient attack, ``(total,)`` bool of what it fooled.
        probabilities: the model gives probabilities.
        surrogate: another model that was trained to give the same answers.
        curve: accuracy over ε.
        landscape: slices of the loss.
    """

    fooled: dict[str, Tensor] = field(default_factory=dict)
    probabilities: bool = False
    surrogate: torch.nn.Module | None = None
    curve: dict[str, Any] = field(default_factory=dict)
    landscape: dict[str, Any] = field(default_factory=dict)

    def by_gradients(self) -> Tensor:
        """What any of the gradient attacks fooled."""
        return torch.stack(list(self.fooled.values())).any(0)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One named check.

    Attributes:
        name: in ``audit.json``.
        title: for people.
        rule: when it is flagged.
        source: where the rule comes from.
        reason: what follows "because" in the verdict, should it be flagged.
        mend: what to do, should it be flagged.
        look: makes it.
        cost: an upper bound of what it asks the model, of so many images.
    """

    name: str
    title: str
    rule: str
    source: str
    reason: str
    mend: str
    look: Callable[[Subject, Budget, Findings], Seen]
    cost: Callable[[Budget, int], Passes]


def enough(count: int) -> bool:
    """Whether so many images could pass a check at all."""
    return wilson_interval(0, count)[1] < 0.05


def too_few(count: int, outcome: Outcome) -> str:
    """Said where a check stays unsure for want of images."""
    return (
        ""
        if outcome != "unsure" or enough(count)
        else f"; {count} images are too few to exclude 5 points, which takes 73 or more"
    )


def counted(
    count: int, total: int, text: str, usual: float = STRAY, matters: float = MATTERS, *, reason: str = ""
) -> Seen:
    """What a check has seen that counts odd images, judged by :func:`~lightning_robust.audit.statistics.judge`.

    Args:
        count: of odd images.
        total: of all that were looked at.
        text: what was seen, in words.
        usual: share that is let pass.
        matters: share that would mislead.
        reason: takes the place of the check's own, should it be flagged.
    """
    outcome = judge(count, total, usual, matters)
    return Seen(outcome, count / max(total, 1), text + too_few(total, outcome), reason=reason)


def stronger(subject: Subject, budget: Budget, found: Findings, name: str, on: Tensor, of: Tensor) -> Tensor:
    """What a long gradient attack fools of images that a weaker kind of attack has fooled.

    Where it does, the gradients were of use, and the attack before had only been too short.

    Returns:
        ``(total,)`` bool.
    """
    if not bool(on.any()):
        return on
    attack = APGD(
        eps=subject.threat_model.radius,
        norm=subject.threat_model.ball,
        steps=max(budget.more_steps, 100),
        restarts=3,
        loss="margin",
        seed=0x57,
    )
    fooled = subject.attack(f"APGD-{attack.steps}, on what {name} fooled", attack, on, of=of)
    found.fooled[f"after {name}"] = fooled
    return fooled

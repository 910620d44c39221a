"""What an audit found: checks, attacks, the verdict; and how it is written."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning_robust.attacks import ThreatModel
from lightning_robust.audit.statistics import Outcome
from lightning_robust.report import write_json

Verdict = Literal["trusted", "masked", "not_enough_evidence"]
VERSION = 1
CONFIDENCE = 0.95
FILE = "audit.json"


@dataclass(frozen=True)
class Seen:
    """What a check saw.

    Attributes:
        outcome: see :func:`~lightning_robust.audit.statistics.judge`.
        figure: the number that the outcome goes by.
        text: what was seen, in a sentence.
        mend: what to do about it, where it is not what the check says anyway.
        reason: what follows "because" in the sentence of the verdict, where it is not what the check says anyway.
    """

    outcome: Outcome
    figure: float | None
    text: str
    mend: str = ""
    reason: str = ""


@dataclass(frozen=True)
class CheckResult:
    """A check that was made; the fields are those of ``audit.json``."""

    name: str
    title: str
    outcome: Outcome
    figure: float | None
    text: str
    rule: str
    source: str
    mend: str
    seconds: float
    reason: str = ""


@dataclass(frozen=True)
class AttackRow:
    """An attack that ran at the stated ε.

    Attributes:
        name: what it is called.
        robust_accuracy: share of ``images`` that are classified rightly and withstood this attack; images that had
            fallen to an attack before were not attacked again where ``left_over`` is set, and count as fallen.
        seconds: it took.
        adaptive: whether it was made for what the checks found.
        images: of how many images the share is.
        left_over: whether it ran on what the attacks before had left.
    """

    name: str
    robust_accuracy: float
    seconds: float
    adaptive: bool
    images: int
    left_over: bool


@dataclass(frozen=True)
class AuditResult:
    """The outcome of an audit; :meth:`to_plain` is what ``audit.json`` holds.

    Attributes:
        model: name of the model.
        data: name of the data.
        budget: "quick", "standard" or "full".
        threat_model: norm and ε.
        images: audited.
        seed: of all random numbers.
        clean_accuracy: share of the images that are classified rightly.
        robust_accuracy: share that withstood everything that ran at ε.
        confidence_interval: of ``robust_accuracy``, 95 % (Wilson).
        verdict: "trusted", "masked" or "not_enough_evidence".
        sentence: the verdict in words.
        checks: in their order.
        attacks: in their order.
        seconds: all of it took.
        curve: accuracy over ε: ``{"eps": […], "accuracy": […], "images": n}``.
        landscape: slices of the loss, ``{"step": […], "slices": [{"image": i, "loss": [[…]]}]}``; steps are in units of
            ε, rows along the gradient's direction, columns along a random one.
        estimate: seconds that were told beforehand.
    """

    model: str
    data: str
    budget: str
    threat_model: ThreatModel
    images: int
    seed: int
    clean_accuracy: float
    robust_accuracy: float
    confidence_interval: tuple[float, float]
    verdict: Verdict
    sentence: str
    checks: list[CheckResult]
    attacks: list[AttackRow]
    seconds: float
    curve: dict[str, Any] = field(default_factory=dict)
    landscape: dict[str, Any] = field(default_factory=dict)
    estimate: float | None = None

    @property
    def flagged(self) -> list[str]:
        """Names of the checks that are flagged."""
        return [check.name for check in self.checks if check.outcome == "flag"]

    def check(self, name: str) -> CheckResult:
        """A check by its name."""
        return next(check for check in self.checks if check.name == name)

    def to_plain(self) -> dict[str, Any]:
        """Strings and numbers only."""
        plain = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return {
            "version": VERSION,
            **plain,
            "threat_model": {"norm": self.threat_model.norm, "eps": self.threat_model.radius},
            "confidence_interval": list(self.confidence_interval),
            "confidence": CONFIDENCE,
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "attacks": [dataclasses.asdict(attack) for attack in self.attacks],
        }

    def write(self, folder: str | Path, name: str = FILE) -> Path:
        """Write ``audit.json``, or a file of another name, into a folder, whole or not at all."""
        return write_json(Path(folder) / name, self.to_plain())

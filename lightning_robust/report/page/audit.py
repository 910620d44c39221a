"""The verdict of an audit as the page shows it, from ``audit.json`` or ``audit_<name>.json``."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

VERDICTS = {
    "trusted": "Trust it",
    "masked": "Do not trust it: the gradients are masked",
    "not_enough_evidence": "Not enough evidence",
}
_MEANINGS = {
    "trusted": "No check found a sign that the attacks were hindered instead of withstood. The robust accuracy is the "
    "share of images that no attack of the audit changed; stronger attacks may still lower it.",
    "masked": "At least one check shows that attacks fail because gradients are hidden, and not because there is "
    "nothing to find. What ordinary attacks say of this model is not its robustness: do what the flagged checks name.",
    "not_enough_evidence": "No check is flagged, but what ran is too little to judge by. The unsure checks say what to "
    "run.",
}
OUTCOMES = {"pass": "passed", "flag": "flagged", "unsure": "unsure", "skipped": "skipped"}
SEVERITY = ("flag", "unsure", "pass", "skipped")
"""Outcomes, the worst first."""


@dataclass(frozen=True)
class Check:
    """One check of an audit."""

    name: str
    title: str
    outcome: str
    figure: float
    text: str
    rule: str
    source: str
    mend: str
    seconds: float

    @property
    def word(self) -> str:
        """The outcome for people."""
        return OUTCOMES[self.outcome]


@dataclass(frozen=True)
class AttackRow:
    """One attack of an audit."""

    name: str
    robust_accuracy: float
    seconds: float
    adaptive: bool


@dataclass(frozen=True)
class Audit:
    """An audit; numbers that it does not tell are NaN, texts empty."""

    verdict: str
    sentence: str
    model: str
    data: str
    budget: str
    norm: str
    eps: float
    images: int
    seed: str
    clean_accuracy: float
    robust_accuracy: float
    interval: tuple[float, float]
    confidence: float
    checks: list[Check] = field(default_factory=list)
    attacks: list[AttackRow] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The verdict in words; of what is trusted the number, which need not be a high one."""
        known = self.verdict == "trusted" and not math.isnan(self.robust_accuracy)
        return (
            f"{VERDICTS[self.verdict]}: {100 * self.robust_accuracy:.1f} % robust" if known else VERDICTS[self.verdict]
        )

    @property
    def threat_text(self) -> str:
        """Norm and budget."""
        return f"{self.norm or 'norm not named'}, ε = {_eps(self.eps)}"

    @property
    def meaning(self) -> str:
        """What such a verdict says."""
        return _MEANINGS[self.verdict]

    @property
    def interval_text(self) -> str:
        """The confidence interval in percent."""
        if any(map(math.isnan, self.interval)):
            return "–"
        low, high = (f"{100 * value:.1f}" for value in self.interval)
        return f"{low} to {high} %"

    @property
    def counted(self) -> str:
        """How many checks ended how."""
        counts = {outcome: sum(check.outcome == outcome for check in self.checks) for outcome in SEVERITY}
        return ", ".join(f"{count} {OUTCOMES[outcome]}" for outcome, count in counts.items() if count)


def parse_audit(text: str) -> Audit:
    """Read ``audit.json``.

    Raises:
        ValueError: for what is no audit of this version.
    """
    told = json.loads(text)
    if not isinstance(told, dict) or told.get("version") != 1:
        raise ValueError("it is no audit of version 1")
    verdict = told.get("verdict")
    if verdict not in VERDICTS:
        raise ValueError(f"the verdict {verdict!r} is none of {', '.join(VERDICTS)}")
    threat = told.get("threat_model") or {}
    interval = told.get("confidence_interval") or [None, None]
    checks = [
        Check(
            name=_text(entry.get("name")),
            title=_text(entry.get("title")) or _text(entry.get("name")),
            outcome=_outcome(entry.get("outcome")),
            figure=_number(entry.get("figure")),
            seconds=_number(entry.get("seconds")),
            **{key: _text(entry.get(key)) for key in ("text", "rule", "source", "mend")},
        )
        for entry in told.get("checks") or []
    ]
    checks.sort(key=lambda check: SEVERITY.index(check.outcome))
    attacks = [
        AttackRow(
            _text(entry.get("name")),
            _number(entry.get("robust_accuracy")),
            _number(entry.get("seconds")),
            bool(entry.get("adaptive")),
        )
        for entry in told.get("attacks") or []
    ]
    return Audit(
        verdict=verdict,
        sentence=_text(told.get("sentence")),
        **{key: _text(told.get(key)) for key in ("model", "data", "budget", "seed")},
        norm=_text(threat.get("norm")),
        eps=_number(threat.get("eps")),
        images=int(told.get("images") or 0),
        clean_accuracy=_number(told.get("clean_accuracy")),
        robust_accuracy=_number(told.get("robust_accuracy")),
        interval=(_number(interval[0]), _number(interval[1])),
        confidence=_number(told.get("confidence")),
        checks=checks,
        attacks=attacks,
    )


def _eps(value: float) -> str:
    """A budget as short as it can be written: 0.3, 8/255."""
    if math.isnan(value):
        return "–"
    steps = 255 * value
    return f"{value:g}" if len(f"{value:g}") < 6 or abs(steps - round(steps)) > 1e-4 else f"{round(steps)}/255"


def _outcome(value: Any) -> str:
    if value not in OUTCOMES:
        raise ValueError(f"the outcome {value!r} is none of {', '.join(OUTCOMES)}")
    return str(value)


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)

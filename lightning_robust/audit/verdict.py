"""From checks to a verdict, in a sentence."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_robust.attacks import ThreatModel
from lightning_robust.audit.budgets import next_budget
from lightning_robust.audit.result import CheckResult, Verdict
from lightning_robust.audit.statistics import points

EXIT_STATUS: dict[Verdict, int] = {"trusted": 0, "masked": 3, "not_enough_evidence": 4}
"""What the program ends with: 1 and 2 are taken, by a crash and by a mistake in the user's input."""

FINISHED = "finished"
"""Name of the check that stands in for those that were not made, where something ended an audit early."""

_NAMED = 3  # reasons that a sentence can hold


def verdict_of(checks: Sequence[CheckResult]) -> Verdict:
    """Masked if any check is flagged; trusted if none is flagged or unsure."""
    outcomes = {check.outcome for check in checks}
    if "flag" in outcomes:
        return "masked"
    return "not_enough_evidence" if "unsure" in outcomes else "trusted"


def sentence_of(
    verdict: Verdict,
    checks: Sequence[CheckResult],
    *,
    threat_model: ThreatModel,
    robust_accuracy: float,
    interval: tuple[float, float],
    images: int,
    budget: str,
) -> str:
    """The verdict in words: whether to trust the number, why not, or what to run."""
    low, high = interval
    number = (
        f"{points(robust_accuracy)} [{100 * low:.1f}, {100 * high:.1f}] robust at {threat_model.norm} "
        f"ε = {threat_model.radius:.4g} on {images} images"
    )
    passed = sum(check.outcome == "pass" for check in checks)
    if verdict == "trusted":
        skipped = [check.title[0].lower() + check.title[1:] for check in checks if check.outcome == "skipped"]
        without = f" (not made: {', '.join(skipped)})" if skipped else ""
        return f"Trust it: {number}; {passed} checks found no sign of masked gradients{without}."
    if verdict == "masked":
        reasons = [check.reason for check in checks if check.outcome == "flag"]
        shown = list(dict.fromkeys(reasons))
        more = f", and {len(shown) - _NAMED} more" if len(shown) > _NAMED else ""
        early = any(check.name == FINISHED for check in checks)
        ran = "until the audit ended early" if early else "after everything that ran, adaptive attacks included"
        return f"The gradients are masked because {'; '.join(shown[:_NAMED])}{more}. {number} {ran}: an upper bound."
    unsure = [check for check in checks if check.outcome == "unsure"]
    names = ", ".join(check.title[0].lower() + check.title[1:] for check in unsure[:_NAMED])
    return f"Not enough evidence ({names}: unsure): {_what_to_run(unsure, budget, images)}. {number} so far."


def _what_to_run(unsure: Sequence[CheckResult], budget: str, images: int) -> str:
    first = next((check for check in unsure if check.name == FINISHED), unsure[0])
    if first.name in ("clean_accuracy", FINISHED) or first.figure is None:  # nothing was counted: more would not help
        return first.mend
    larger = next_budget(budget)
    if larger is not None:
        return f"run --budget {larger}"
    return f"run more images than {images} (--images)"

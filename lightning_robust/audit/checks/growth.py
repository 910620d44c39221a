"""Whether accuracy falls as ε grows, and reaches zero where it must.

Attacks follow rescaled logits or the margin: what the scale of the logits hides is another check's.
"""

from __future__ import annotations

from typing import Literal

from lightning_robust.attacks import PGD
from lightning_robust.audit.budgets import Budget
from lightning_robust.audit.checks.base import CARLINI, Check, Findings, Passes, counted
from lightning_robust.audit.result import Seen
from lightning_robust.audit.statistics import ALPHA, STRAY, points, sign_test
from lightning_robust.audit.subject import Subject

_GRAY = 0.5  # how far a pixel is from the middle at most
_FACTORS = (0.25, 0.5, 1, 2, 4, 8)  # of ε


def _certain(subject: Subject) -> float:
    """The ε from which on every image can be made the same uniform gray, and no accuracy above chance is possible."""
    values = subject.images[0].numel()
    return {"linf": _GRAY, "l2": _GRAY * values**0.5, "l1": _GRAY * values}[subject.threat_model.norm]


def _monotone(subject: Subject, budget: Budget, found: Findings) -> Seen:
    sample = subject.first(min(budget.sample, 200))
    on, total = sample & subject.right, int((sample & subject.right).sum())
    norm, stated, most = subject.threat_model.ball, subject.threat_model.radius, _certain(subject)
    budgets = [factor * stated for factor in _FACTORS if factor * stated < most]
    known = []
    for eps in budgets:
        attack = PGD(eps=eps, norm=norm, steps=budget.eps_steps, loss="ce_scaled", seed=3)
        name = f"PGD-{budget.eps_steps}, rescaled logits, at {eps:.3g}"
        known.append(subject.attack(name, attack, on, of=sample))
    accuracy = [float((on & ~one).sum()) / max(int(sample.sum()), 1) for one in known]
    clean = total / max(int(sample.sum()), 1)
    found.curve = {"eps": [0.0, *budgets], "accuracy": [clean, *accuracy], "images": int(sample.sum())}
    worst, where, chance = 0, "", 1.0
    for before, after, low, high in zip(known, known[1:], budgets, budgets[1:], strict=False):
        lost, won = int((before & ~after).sum()), int((after & ~before).sum())
        if (p := sign_test(lost, won)) < chance:
            worst, where, chance = lost - won, f"{low:.3g} to {high:.3g}", p
    text = "accuracy " + ", ".join(
        f"{points(value)} at {eps:.3g}" for eps, value in zip([0.0, *budgets], [clean, *accuracy], strict=True)
    )
    if chance < ALPHA / max(len(budgets) - 1, 1):
        return Seen("flag", worst / max(total, 1), f"{text}: it rises from {where}")
    return Seen("pass", max(worst, 0) / max(total, 1), text)


def _unbounded(subject: Subject, budget: Budget, found: Findings) -> Seen:
    sample = subject.first(min(budget.sample, 200))
    on, total = sample & subject.right, int((sample & subject.right).sum())
    left = on.clone()
    long: tuple[tuple[Literal["ce", "margin"], int, int], ...] = (
        ("ce", budget.steps, 1),
        ("margin", 5 * budget.steps, 2),
    )
    for loss, steps, restarts in long:
        # whatever the norm that is stated: what is within 0.5 in L∞ is within its own ε, too
        attack = PGD(eps=_GRAY, norm="linf", steps=steps, loss=loss, restarts=restarts, seed=4)
        left &= ~subject.attack(f"PGD-{steps} at {_GRAY:g}", attack, left)
    count = int(left.sum())
    text = f"at linf ε = {_GRAY:g}, where every image can be made gray, {count} of {total} images withstand PGD"
    if count and bool((subject.logits.argmax(1) == subject.logits[0].argmax()).all()):
        # then there need be no image at all that it gives another class
        return Seen("unsure", count / max(total, 1), f"{text}; but the model gives all images one class")
    return counted(count, total, text)


def _steps(budget: Budget) -> int:
    return len(_FACTORS) * budget.eps_steps


MONOTONE = Check(
    name="monotone",
    title="Accuracy falls as ε grows",
    rule=f"flagged if at a larger ε more images withstand again than fall anew (paired sign test, p < {ALPHA:.2g} over "
    "all steps of ε)",
    source=CARLINI,
    reason="attacks with a larger ε do worse",
    mend="look for gradients that are wrong away from the image",
    look=_monotone,
    cost=lambda budget, images: Passes(gradient=_steps(budget) * min(budget.sample, images, 200)),
)

UNBOUNDED = Check(
    name="unbounded",
    title="Accuracy reaches zero for a large ε",
    rule=f"flagged if the share of images that withstand at the ε where all can be made gray exceeds {STRAY:g} (exact "
    "binomial test), unless the model gives all images one class",
    source=CARLINI,
    reason="images withstand even where any change is allowed",
    mend="find out why no gradient leads away from these images",
    look=_unbounded,
    # few are left for the longer attack
    # the longer one, on what the first has left
    cost=lambda budget, images: Passes(gradient=(1 + 2 * 5) * budget.steps * min(budget.sample, images, 200)),
)

"""Whether attacks are as strong as they should be: more of an attack must do more, and then no more."""

from __future__ import annotations

from typing import Literal

from lightning_robust.attacks import APGD, FGSM, PGD
from lightning_robust.audit.budgets import Budget
from lightning_robust.audit.checks.base import CARLINI, DISTILLED, Check, Findings, Passes, counted, too_few
from lightning_robust.audit.result import Seen
from lightning_robust.audit.statistics import ALPHA, MATTERS, Outcome, judge, points, sign_test
from lightning_robust.audit.subject import Subject

SINGLE, ITERATED, RESCALED, AUTO, AGAIN, LONGER = "fgsm", "pgd", "rescaled", "apgd", "restarts", "steps"

Loss = Literal["ce", "dlr", "dlr_targeted", "margin"]


def loss_for(classes: int, targets: int) -> Loss:
    """The scale-free loss of APGD for so many classes: the targeted one where targets are wanted."""
    if classes < 3:
        return "margin"
    return "dlr_targeted" if targets > 0 and classes >= 4 else "dlr"


def _single_step(subject: Subject, budget: Budget, found: Findings) -> Seen:
    eps, norm = subject.threat_model.radius, subject.threat_model.ball
    found.fooled[SINGLE] = one = subject.attack("FGSM", FGSM(eps=eps, norm=norm), subject.right)
    attack = PGD(eps=eps, norm=norm, steps=budget.steps)
    found.fooled[ITERATED] = many = subject.attack(f"PGD-{budget.steps}", attack, subject.right)
    wins, losses = int((one & ~many).sum()), int((many & ~one).sum())
    total = int(subject.right.sum())
    chance = sign_test(wins, losses)
    text = (
        f"of {total} images one step fools {int(one.sum())} and {budget.steps} steps {int(many.sum())}; {wins} fall to "
        f"one step alone, {losses} to {budget.steps} alone"
    )
    return Seen("flag" if chance < ALPHA else "pass", wins / max(total, 1), text)


def _logit_scale(subject: Subject, budget: Budget, found: Findings) -> Seen:
    eps, norm = subject.threat_model.radius, subject.threat_model.ball
    total = int(subject.right.sum())
    before = subject.withstood.clone()
    attack = PGD(eps=eps, norm=norm, steps=budget.steps, loss="ce_scaled")
    gained = subject.attack(f"PGD-{budget.steps}, rescaled logits", attack, before, of=subject.first(subject.total))
    found.fooled[RESCALED] = gained
    count = int(gained.sum())
    loss = loss_for(subject.classes, budget.targets)
    auto = APGD(eps=eps, norm=norm, steps=budget.apgd_steps, loss=loss, n_targets=max(budget.targets, 1))
    targets = min(budget.targets, subject.classes - 1) if loss == "dlr_targeted" else 0
    name = f"APGD-{budget.apgd_steps}" + (f", {targets} targets" if targets else f", {loss} loss")
    if loss == "dlr_targeted":
        auto = APGD(eps=eps, norm=norm, steps=budget.apgd_steps, loss=loss, n_targets=targets)
    found.fooled[AUTO] = subject.attack(name, auto, subject.withstood, of=subject.first(subject.total))
    text = (
        f"of {total} images {count} that withstood FGSM and PGD on the cross-entropy fall to PGD once the logits are "
        f"brought to one scale, {int(found.fooled[AUTO].sum())} more to APGD on a loss without a scale"
    )
    # another loss may find a few images more on a sound model, too
    return counted(count, total, text, MATTERS, 2 * MATTERS)


def _restarts(subject: Subject, budget: Budget, found: Findings) -> Seen:
    sample = subject.first(budget.sample)
    attack = PGD(
        eps=subject.threat_model.radius,
        norm=subject.threat_model.ball,
        steps=budget.steps,
        restarts=budget.restarts,
        loss="margin",
        seed=1,
    )
    total = int((sample & subject.right).sum())
    name = f"PGD-{budget.steps}, {budget.restarts} restarts"
    found.fooled[AGAIN] = subject.attack(name, attack, sample & subject.withstood, of=sample)
    gained = int(found.fooled[AGAIN].sum())
    return _no_gain(gained, total, f"{budget.restarts} more random starts fool {gained} of {total} images more")


def _more_steps(subject: Subject, budget: Budget, found: Findings) -> Seen:
    sample = subject.first(budget.sample)
    attack = PGD(
        eps=subject.threat_model.radius,
        norm=subject.threat_model.ball,
        steps=budget.more_steps,
        loss="margin",
        seed=2,
    )
    total = int((sample & subject.right).sum())
    name = f"PGD-{budget.more_steps}"
    found.fooled[LONGER] = subject.attack(name, attack, sample & subject.withstood, of=sample)
    gained = int(found.fooled[LONGER].sum())
    text = f"{budget.more_steps} steps in place of {budget.steps} fool {gained} of {total} images more"
    return _no_gain(gained, total, text)


def _no_gain(gained: int, total: int, text: str) -> Seen:
    """More of an attack that still gains is no masking: it is an attack that has not converged."""
    outcome: Outcome = "pass" if judge(gained, total, MATTERS) == "pass" else "unsure"
    return Seen(outcome, gained / max(total, 1), text + too_few(total, outcome))


SINGLE_STEP = Check(
    name="single_step",
    title="Many steps beat one",
    rule=f"flagged if more images fall to one step alone than to many steps alone, beyond chance (paired sign test, "
    f"p < {ALPHA:.2g})",
    source=CARLINI,
    reason="one step does better than many, which should not be",
    mend="look for gradients that are wrong away from the image, and attack with smaller steps and restarts",
    look=_single_step,
    cost=lambda budget, images: Passes(forward=2 * images, gradient=(1 + budget.steps) * images),
)

LOGIT_SCALE = Check(
    name="logit_scale",
    title="The scale of the logits does not matter",
    rule=f"flagged if the share of images that fall only after the logits were rescaled exceeds {MATTERS:g} (paired, "
    "exact binomial test)",
    source=f"{DISTILLED}; {CARLINI}",
    reason="the scale of its outputs (large logits saturate the softmax) stops attacks on the cross-entropy",
    mend="quote attacks on the logits: margin, DLR, or cross-entropy of rescaled logits",
    look=_logit_scale,
    cost=lambda budget, images: Passes(gradient=(budget.steps + budget.apgd_steps * max(budget.targets, 1)) * images),
)

RESTARTS = Check(
    name="restarts",
    title="More restarts change nothing",
    rule=f"passes if the 95 % interval of the share that falls to more restarts ends below {points(MATTERS)}; else "
    "unsure",
    source=CARLINI,
    reason="",
    mend="run a larger budget, which restarts more often",
    look=_restarts,
    cost=lambda budget, images: Passes(gradient=budget.restarts * budget.steps * min(budget.sample, images)),
)

MORE_STEPS = Check(
    name="more_steps",
    title="More steps change nothing",
    rule=f"passes if the 95 % interval of the share that falls to more steps ends below {points(MATTERS)}; else unsure",
    source=CARLINI,
    reason="",
    mend="run a larger budget, which makes more steps",
    look=_more_steps,
    cost=lambda budget, images: Passes(gradient=budget.more_steps * min(budget.sample, images)),
)

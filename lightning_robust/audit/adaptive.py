"""What is done about what the checks found: attacks made for the model, on every image that is left."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

from torch import Tensor

from lightning_robust.attacks import APGD, EOT, PGD, Attack, AutoAttack, Square, Transfer
from lightning_robust.attacks.adaptive import Randomized
from lightning_robust.attacks.context import Model
from lightning_robust.attacks.losses import margin
from lightning_robust.audit.budgets import Budget
from lightning_robust.audit.checks import Findings, Passes
from lightning_robust.audit.checks.strength import loss_for
from lightning_robust.audit.stand_ins import Logarithm, StraightThrough, undefended
from lightning_robust.audit.subject import Subject


class Planned(NamedTuple):
    """An attack that answers a finding."""

    name: str
    attack: Attack
    model: Model | None = None
    gradient: bool = True
    adaptive: bool = True


def plan(subject: Subject, budget: Budget, found: Findings, flagged: Collection[str]) -> Iterator[Planned]:
    """The attacks that the flagged checks ask for, and AutoAttack where the budget has it."""
    eps, norm, steps = subject.threat_model.radius, subject.threat_model.ball, budget.adaptive_steps
    loss = loss_for(subject.classes, 0)
    pgd = PGD(eps=eps, norm=norm, steps=steps, loss="margin", seed=6)
    apgd = APGD(eps=eps, norm=norm, steps=steps, loss=loss, seed=7)
    hidden = {"differentiable", "quantised_input", "zero_gradients", "uphill"} & set(flagged)
    # classes alone, as one-hot vectors, are probabilities too, and have no gradient
    if "logits" in flagged and _carries(subject, log := _log(subject)):
        yield Planned(f"APGD-{steps} on the logarithm", APGD(eps=eps, norm=norm, steps=steps, loss=loss), log)
    if hidden:
        through = StraightThrough(_log(subject) if found.probabilities else subject.model)
        if _carries(subject, through):
            yield Planned(f"PGD-{steps}, straight through", _averaged(subject, budget, pgd), through)
            yield Planned(f"APGD-{steps}, straight through", _averaged(subject, budget, apgd), through)
    if subject.random:
        # a model that says what it draws is averaged over just that
        model = subject.model if isinstance(subject.model, Randomized) else None
        ce = PGD(eps=eps, norm=norm, steps=steps, seed=8)
        yield Planned(f"PGD-{steps}, EOT", _averaged(subject, budget, ce), model)
        yield Planned(f"APGD-{steps}, EOT", _averaged(subject, budget, apgd), model)
    # where no gradient points uphill none is needed: a threshold with a stand-in falls to Square sooner than to PGD
    aimless = "uphill" in flagged and not subject.random
    if set(flagged) & {"gradient_free", "random_noise"} or subject.blind or aimless:
        queries = max(1000, 4 * budget.queries)
        yield Planned(f"Square, {queries} queries", Square(eps=eps, norm=norm, queries=queries, seed=9), gradient=False)
    surrogate = found.surrogate if found.surrogate is not None else undefended(subject.model)
    if surrogate is not None and ("transfer" in flagged or subject.blind):
        inner = PGD(eps=eps, norm=norm, steps=steps, loss="margin", stop_at_success=False, seed=10)
        yield Planned("transfer", Transfer(attack=inner, surrogate=surrogate), gradient=False)
    if budget.autoattack:
        if subject.random:
            yield Planned("AutoAttack rand", AutoAttack(eps=eps, norm=norm, version="rand"), adaptive=False)
        elif not subject.blind:
            yield Planned("AutoAttack", AutoAttack(eps=eps, norm=norm), adaptive=False)


def attack_adaptively(subject: Subject, budget: Budget, found: Findings, flagged: Collection[str]) -> None:
    """Run the plan on every image that is left."""
    everything: Tensor = subject.first(subject.total)
    for name, attack, model, gradient, adaptive in plan(subject, budget, found, flagged):
        if not bool(subject.withstood.any()):
            return
        subject.attack(
            name, attack, subject.withstood, model=model, gradient=gradient, adaptive=adaptive, of=everything
        )


def cost(budget: Budget, images: int, random: bool) -> Passes:
    """An upper bound of what AutoAttack and, for a random model, EOT ask; a finding may ask for more."""
    gradient = 2 * budget.adaptive_steps * budget.eot_samples if random else 0
    # APGD, 9 targets of APGD and of FAB, which goes back through two logits a step
    return Passes(
        forward=5000 * images if budget.autoattack and not random else 0,
        gradient=(gradient + (100 + 900 + 1800 if budget.autoattack else 0)) * images,
    )


def _log(subject: Subject) -> Model:
    return Logarithm(subject.model)


def _averaged(subject: Subject, budget: Budget, attack: Attack) -> Attack:
    return EOT(attack=attack, samples=budget.eot_samples, seed=subject.seed) if subject.random else attack


def _carries(subject: Subject, model: Model) -> bool:
    """Whether a gradient arrives, now that it goes straight through."""
    _, gradient = subject.gradients(model, subject.images[:8], subject.labels[:8], margin)
    found = float(gradient.abs().sum())
    return subject.share.sum(found if found == found else 0.0) > 0

"""Whether attacks without gradients find what attacks with gradients do not."""

from __future__ import annotations

from torch import Tensor

from lightning_robust.attacks import PGD, Attack, RandomNoise, Square, Transfer
from lightning_robust.audit.budgets import Budget
from lightning_robust.audit.checks.base import AUTOATTACK, CARLINI, Check, Findings, Passes, counted, stronger
from lightning_robust.audit.result import Seen
from lightning_robust.audit.stand_ins import undefended
from lightning_robust.audit.statistics import BLACK_BOX, points
from lightning_robust.audit.subject import Subject
from lightning_robust.audit.surrogate import EPOCHS, LEAST_AGREEMENT, train_surrogate


def _compare(subject: Subject, budget: Budget, found: Findings, name: str, attack: Attack) -> tuple[Seen, Tensor]:
    """Attack what gradient attacks have left, and ask gradients once more about what falls."""
    sample = subject.first(budget.sample)
    total = int((sample & subject.right).sum())
    left = sample & subject.right & ~found.by_gradients()
    fooled = subject.attack(name, attack, left, gradient=False, of=sample)
    alone = fooled & ~stronger(subject, budget, found, name, fooled, sample)
    count = int(alone.sum())
    text = f"of {total} images gradient attacks left {int(left.sum())}, of which {name} fools {int(fooled.sum())}" + (
        f"; a longer gradient attack fools {int((fooled & ~alone).sum())} of these" if bool(fooled.any()) else ""
    )
    return counted(count, total, text, BLACK_BOX), alone


def _random_noise(subject: Subject, budget: Budget, found: Findings) -> Seen:
    attack = RandomNoise(
        eps=subject.threat_model.radius,
        norm=subject.threat_model.ball,
        draws=budget.noise,
        kind="sign",
        max_batch=subject.batch_size,
    )
    return _compare(subject, budget, found, f"random noise, {budget.noise} draws", attack)[0]


def _square(subject: Subject, budget: Budget, found: Findings) -> Seen:
    attack = Square(eps=subject.threat_model.radius, norm=subject.threat_model.ball, queries=budget.queries)
    return _compare(subject, budget, found, f"Square, {budget.queries} queries", attack)[0]


def _transfer(subject: Subject, budget: Budget, found: Findings) -> Seen:
    sample = subject.first(budget.sample) & subject.right
    if not bool((sample & ~found.by_gradients()).any()):  # no surrogate need be trained
        total = int(sample.sum())
        return counted(0, total, f"of {total} images gradient attacks left none", BLACK_BOX)
    surrogate = found.surrogate
    what = "the surrogate that was given"
    if surrogate is None:
        surrogate, what = undefended(subject.model), "the classifier without its defense"
    if surrogate is None:
        surrogate, agreement = train_surrogate(subject)
        what = f"a small network that agrees with the model on {points(agreement)} of the images"
        if agreement < LEAST_AGREEMENT:
            return Seen(
                "skipped",
                None,
                f"a small network trained on the model's answers agrees with it on {points(agreement)} of the images, "
                "too few for its attacks to say much",
                mend="give another model of the same data as --surrogate",
            )
        found.surrogate = surrogate
    inner = PGD(
        eps=subject.threat_model.radius,
        norm=subject.threat_model.ball,
        steps=max(budget.steps, 40),
        loss="margin",
        stop_at_success=False,
        seed=5,
    )
    seen, _ = _compare(subject, budget, found, "transfer", Transfer(attack=inner, surrogate=surrogate))
    return Seen(seen.outcome, seen.figure, f"{seen.text} (made on {what})")


_RULE = (
    f"flagged if the share of images that fall to it and to no gradient attack, a longer one on just these images "
    f"included, exceeds {BLACK_BOX:g} (paired, exact binomial test)"
)

RANDOM_NOISE = Check(
    name="random_noise",
    title="Random noise does not beat gradients",
    rule=_RULE,
    source=CARLINI,
    reason="random noise finds what they do not",
    mend="do not quote gradient attacks alone: attack adaptively",
    look=_random_noise,
    cost=lambda budget, images: Passes(forward=budget.noise * min(budget.sample, images)),
)

GRADIENT_FREE = Check(
    name="gradient_free",
    title="A black-box attack does not beat gradients",
    rule=_RULE,
    source=f"{AUTOATTACK}; {CARLINI}",
    reason="a black-box attack (Square) finds what they do not",
    mend="do not quote gradient attacks alone: attack adaptively, and run Square with more queries",
    look=_square,
    cost=lambda budget, images: Passes(forward=budget.queries * min(budget.sample, images)),
)

TRANSFER = Check(
    name="transfer",
    title="Attacks on another model do not beat white-box ones",
    rule=_RULE,
    source=CARLINI,
    reason="images made on another model fool it where its own gradients do not",
    mend="attack adaptively: the model has such images, and its gradients do not lead there",
    look=_transfer,
    # half of the surrogate's epochs ask the model
    cost=lambda budget, images: Passes(
        forward=EPOCHS // 2 * images, gradient=max(budget.steps, 40) * min(budget.sample, images)
    ),
)

"""Whether the model throws dice: from call to call, or by the pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_robust.attacks.adaptive import Randomized
from lightning_robust.attacks.randomness import image_keys, uniform
from lightning_robust.audit.answers import share_that_differs
from lightning_robust.audit.budgets import Budget
from lightning_robust.audit.checks.base import ATHALYE, AUTOATTACK, Check, Findings, Passes
from lightning_robust.audit.result import Seen
from lightning_robust.audit.statistics import ALPHA, STRAY, judge, tail
from lightning_robust.audit.subject import Subject

_PASSES = 5  # AutoAttack's
_DIFFERENCE = 1e-4  # of logits of length one, AutoAttack's
_NUDGE = 1e-6  # in pixel units: a few steps of float32; a network with a gradient moves its logits by about as much
_JUMP = 1e-2  # of logits of length one: ten thousand times the nudge


def _randomness(subject: Subject, budget: Budget, found: Findings) -> Seen:
    probes = subject.first(budget.probes)

    def call_to_call(images: Tensor, labels: Tensor) -> Tensor:
        return share_that_differs([subject.answers(images) for _ in range(_PASSES)], _DIFFERENCE)

    def by_the_pixels(images: Tensor, labels: Tensor) -> Tensor:
        # away from the steps of an 8-bit image, where what rounds down would jump
        inside = 0.98 * images + 0.0093
        signs = uniform(image_keys(images, subject.seed), images.shape, images.dtype) < 0.5
        nudged = inside + _NUDGE * torch.where(signs, -1.0, 1.0).to(images)
        return share_that_differs([subject.answers(inside), subject.answers(nudged)], _JUMP)

    calls = subject.each(probes, call_to_call)
    keyed = subject.each(probes, by_the_pixels)
    total = len(calls)
    calling, jumping = int(calls.sum()), int(keyed.sum())
    says_so = isinstance(subject.model, Randomized) and getattr(subject.model, "random", True) is True
    if tail(calling, total, STRAY) < ALPHA:
        subject.set_random()
        return Seen("flag", calling / total, f"{calling} of {total} images get other logits from call to call")
    if says_so or tail(jumping, total, STRAY) < ALPHA:
        subject.set_random()
        text = f"{jumping} of {total} images get other logits (by {_JUMP:g} at length one) as pixels move by {_NUDGE:g}"
        if says_so:
            text += ", and the model says itself that it draws, by seed and pixels"
        return Seen("flag", jumping / total, text)
    outcome = judge(max(calling, jumping), total)
    return Seen(
        outcome,
        max(calling, jumping) / total,
        f"{_PASSES} calls agree on {total - calling} of {total} images, and at {total - jumping} no logits jump as "
        f"pixels move by {_NUDGE:g}",
    )


RANDOMNESS = Check(
    name="randomness",
    title="The same image gets the same answer",
    rule=f"flagged if the share of images whose logits of length one differ by more than {_DIFFERENCE:g} among "
    f"{_PASSES} calls, or by more than {_JUMP:g} after a change of {_NUDGE:g} of the pixels, exceeds {STRAY:g} (exact "
    "binomial test), or if the model says that it draws",
    source=f"{AUTOATTACK}; {ATHALYE}",
    reason="its answers are random, which a single gradient does not see",
    mend="attack the average over its draws (EOT) and quote that accuracy",
    look=_randomness,
    cost=lambda budget, images: Passes(forward=(_PASSES + 2) * min(budget.probes, images)),
)

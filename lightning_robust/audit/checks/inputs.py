"""Whether the model rounds or clips its input, so that changes are lost on it."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_robust.attacks.context import Model
from lightning_robust.attacks.losses import margin
from lightning_robust.attacks.randomness import image_keys, uniform
from lightning_robust.audit.budgets import Budget
from lightning_robust.audit.checks.base import ATHALYE, Check, Findings, Passes, counted
from lightning_robust.audit.result import Seen
from lightning_robust.audit.statistics import STRAY
from lightning_robust.audit.subject import Subject

_STEP = 0.25 / 255  # a quarter of an 8-bit step: far above float32's resolution, and lost on what rounds to 8 bits
_TINY = 1e-5  # of the same sort, for steps much coarser than 8 bits
_END = 0.02  # pixel values that count as an end of [0, 1]
_FEW = 8  # pixels at the ends of an image that a dead unit or two may explain


def _quantised(subject: Subject, budget: Budget, found: Findings) -> Seen:
    probes = subject.first_right(budget.probes)
    model = subject.fixed()
    room = min(subject.threat_model.radius, 0.5)

    def looks(images: Tensor, labels: Tensor) -> Tensor:
        signs = uniform(image_keys(images, subject.seed), images.shape, images.dtype) < 0.5
        signs = torch.where(signs, -1.0, 1.0).to(images)
        # fine steps are told by an image on them, coarse ones by an image that lies nowhere near their edges
        off = 0.98 * images + 0.0093
        same = _alike(subject, model, images, (images + _STEP * signs).clamp(0, 1))
        same |= _alike(subject, model, off, off + _TINY * signs)
        _, gradient = subject.gradients(model, images, labels, margin)
        nothing = (gradient == 0).flatten(1)
        ends = (images < _END) | (images > 1 - _END)
        # no pixel at the ends has a gradient, others do, and yet the first are of weight once they leave the ends: not
        # so a border that is never looked at, or what is clipped too far away to be reached
        inward = torch.where(ends, images + room * (1 - 2 * images.round()), images)
        flat = ends.flatten(1)
        dead = (nothing | ~flat).all(1) & ~nothing.all(1) & (flat.sum(1) >= _FEW)
        clipped = dead & ~_alike(subject, model, images, inward)
        return torch.stack([same & nothing.all(1), same, clipped], 1)

    rounded, same, clipped = (int(count) for count in subject.each(probes, looks).sum(0))
    total = int(probes.sum())
    lost = rounded + clipped
    text = f"at {same} of {total} images no logit changes when every pixel moves a little"
    if same > rounded:
        text += f", and {same - rounded} of them have a gradient all the same (a stand-in)"
    if clipped:
        text += (
            f"; at {clipped} no pixel at the ends of [0, 1] has a gradient, and the logits change as these pixels move "
            f"inwards by {room:.2g}"
        )
    reason = "its input is clipped, which leaves no gradient at the ends of [0, 1]" if clipped > rounded else ""
    return counted(lost, total, text, reason=reason)


def _alike(subject: Subject, model: Model, images: Tensor, moved: Tensor) -> Tensor:
    return (subject.answers(images, model) == subject.answers(moved, model)).all(1)


QUANTISED = Check(
    name="quantised_input",
    title="Small changes of the input arrive",
    rule="flagged if the share of images whose logits stay the same to the bit although every pixel moved by "
    f"{_STEP:.2g} (or, of an image off the steps of 8 bits, by {_TINY:g}), and whose gradient is zero, or whose pixels "
    f"at the ends of [0, 1] all have a gradient of zero although moving them inwards by ε changes the logits, exceeds "
    f"{STRAY:g} (exact binomial test)",
    source=f"{ATHALYE} (shattered gradients)",
    reason="small changes of its input are rounded or saturated away, which leaves no gradient",
    mend="attack through the rounding or clipping with the identity as its backward pass (BPDA)",
    look=_quantised,
    cost=lambda budget, images: Passes(forward=6 * min(budget.probes, images), gradient=min(budget.probes, images)),
)

"""Whether the model rounds or clips its input, so that small changes are lost on it."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_robust.attacks.context import Model
from lightning_robust.attacks.losses import margin
from lightning_robust.attacks.randomness import image_keys, uniform
from lightning_robust.audit.budgets import Budget
from lightning_robust.audit.checks.base import ATHALYE, Check, Findings, Passes, too_few
from lightning_robust.audit.result import Seen
from lightning_robust.audit.statistics import STRAY, judge
from lightning_robust.audit.subject import Subject

_STEP = 0.25 / 255  # a quarter of an 8-bit step: far above float32's resolution, and lost on what rounds to 8 bits
_TINY = 1e-5  # of the same sort, for steps much coarser than 8 bits
_END = 0.02  # pixel values that count as an end of [0, 1]
_ALL = 0.999  # share of zero entries that means all, up to chance


def _quantised(subject: Subject, budget: Budget, found: Findings) -> Seen:
    probes = subject.first_right(budget.probes)
    model = subject.fixed()

    def looks(images: Tensor, labels: Tensor) -> Tensor:
        signs = uniform(image_keys(images, subject.seed), images.shape, images.dtype) < 0.5
        signs = torch.where(signs, -1.0, 1.0).to(images)
        # fine steps are told by an image on them, coarse ones by an image that lies nowhere near their edges
        off = 0.98 * images + 0.0093
        same = _alike(subject, model, images, (images + _STEP * signs).clamp(0, 1))
        same |= _alike(subject, model, off, off + _TINY * signs)
        _, gradient = subject.gradients(model, images, labels, margin)
        nothing = (gradient == 0).flatten(1)
        ends = ((images < _END) | (images > 1 - _END)).flatten(1)
        return torch.stack(
            [
                same & nothing.all(1),
                same,
                (nothing & ends).sum(1),
                ends.sum(1),
                (nothing & ~ends).sum(1),
                (~ends).sum(1),
            ],
            1,
        )

    seen = subject.each(probes, looks).double()
    total = len(seen)
    lost, same = int(seen[:, 0].sum()), int(seen[:, 1].sum())
    text = f"at {same} of {total} images no logit changes when every pixel moves a little"
    if same > lost:
        text += f", and {same - lost} of them have a gradient all the same (a stand-in)"
    at_ends, between = _share(seen[:, 2], seen[:, 3]), _share(seen[:, 4], seen[:, 5])
    if at_ends >= _ALL > between and seen[:, 3].sum() > 0:
        text += "; pixels at the ends of [0, 1] have no gradient and others do (clipped, or a constant background)"
    return Seen(judge(lost, total), lost / max(total, 1), text + too_few(total))


def _alike(subject: Subject, model: Model, images: Tensor, moved: Tensor) -> Tensor:
    return (subject.answers(images, model) == subject.answers(moved, model)).all(1)


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part.sum() / whole.sum().clamp_min(1))


QUANTISED = Check(
    name="quantised_input",
    title="Small changes of the input arrive",
    rule="flagged if the share of images whose logits stay the same to the bit although every pixel moved by "
    f"{_STEP:.2g} (or, of an image off the steps of 8 bits, by {_TINY:g}), and whose gradient is zero, exceeds "
    f"{STRAY:g} (exact binomial test)",
    source=f"{ATHALYE} (shattered gradients)",
    reason="its input is rounded, which leaves no gradient",
    mend="attack through the rounding with the identity as its backward pass (BPDA)",
    look=_quantised,
    cost=lambda budget, images: Passes(forward=4 * min(budget.probes, images), gradient=min(budget.probes, images)),
)

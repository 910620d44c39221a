"""Whether there are gradients, and whether they are those of the model."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_robust.attacks.context import Model, attacking
from lightning_robust.attacks.losses import cross_entropy, scaled_cross_entropy
from lightning_robust.attacks.randomness import image_keys, uniform
from lightning_robust.audit.budgets import Budget
from lightning_robust.audit.checks.base import (
    ATHALYE,
    CARLINI,
    DISTILLED,
    Check,
    Findings,
    Passes,
    counted,
    enough,
    too_few,
)
from lightning_robust.audit.result import Seen
from lightning_robust.audit.stand_ins import Watch
from lightning_robust.audit.statistics import STRAY, judge
from lightning_robust.audit.subject import Subject

_TOLERANCE = (
    0.2  # relative: differences of a network with kinks agree to 1e-3, and a wrong gradient is not nearly right
)
_STEPS = {torch.float64: 1e-6, torch.float32: 2e-3}  # of the finite differences, in pixel units
_ROOM = 0.02  # that images keep from 0 and 1, and the step at which a flat function is looked at
_SAFETY = 16  # roundings that a forward pass may add up


def _zero_gradients(subject: Subject, budget: Budget, found: Findings) -> Seen:
    probes = subject.first_right(budget.probes)
    total = int(probes.sum())
    model = subject.fixed()
    double = subject.in_double()
    double = None if double is None else subject.fixed(double)

    def sizes(images: Tensor, labels: Tensor) -> Tensor:
        with torch.random.fork_rng():
            columns = [_largest(subject.gradients(model, images, labels, cross_entropy)[1])]
            columns.append(_largest(subject.gradients(model, images, labels, scaled_cross_entropy)[1]))
            if double is not None:
                exact = subject.gradients(double, images.double(), labels, cross_entropy)[1]
                columns.append(_largest(exact))
        return torch.stack([column.double() for column in columns], 1)

    largest = subject.each(probes, sizes)
    naive, rescaled = largest[:, 0], largest[:, 1]
    subject.blind = total > 0 and bool((largest == 0).all())
    # NaN has no sign, so no attack can follow it
    lost = int(((naive == 0) | naive.isnan()).sum())
    text = f"the gradient of the cross-entropy is zero at {lost} of {total} images"
    if double is not None:
        exact = largest[:, 2]
        text += f", in float64 at {int((exact == 0).sum())}"
    else:
        text += " (the model does not run in float64)"
    text += f", of rescaled logits at {int((rescaled == 0).sum())}"
    some = naive[naive > 0]
    if len(some):
        text += f"; median of the largest entries {float(some.median()):.2g}"
    reason = "no gradient reaches the image" if subject.blind else ""
    if not subject.blind and 2 * int((rescaled == 0).sum()) > lost:
        reason = "they vanish within the model, whatever the scale of its outputs (something is cut off or saturated)"
    return counted(lost, total, text, reason=reason)


def _largest(gradient: Tensor) -> Tensor:
    return gradient.abs().flatten(1).amax(1)


def _differentiable(subject: Subject, budget: Budget, found: Findings) -> Seen:
    probes = subject.first_right(budget.probes)
    double = subject.in_double()
    dtype = torch.float32 if double is None else torch.float64
    model = subject.fixed(subject.model if double is None else double)

    def kinds(images: Tensor, labels: Tensor) -> Tensor:
        return _compare(subject, model, images.to(dtype), labels, budget.directions)

    kind = subject.each(probes, kinds)
    wrong, killed, stand_in = (int((kind == number).sum()) for number in (_WRONG, _KILLED, _STAND_IN))
    total = int((kind != _NOTHING).sum())
    bad = wrong + killed
    watch = Watch()
    some = subject.images[:2].detach().clone().requires_grad_()
    with attacking(subject.model) as lent, watch:
        lent(some)
    text = (
        f"autograd and finite differences ({'float64' if double is not None else 'float32'}, {budget.directions + 1} "
        f"directions) disagree at {wrong} of {total} images where the model is smooth"
    )
    if killed:
        text += f"; at {killed} the model changes in steps and autograd gives zero"
    if stand_in:
        text += f"; at {stand_in} it changes in steps and has a stand-in for its gradient"
    if watch.shattering and bad:
        text += f"; it calls {', '.join(watch.shattering)}"
    reason = ""
    if bad and killed > wrong:
        reason = "a step that is not differentiable (rounding, a cast) has no gradient"
    outcome = judge(bad, total)
    if outcome == "unsure" and not bad and stand_in + total > 0 and double is None:
        text += "; in float32 the differences may drown in rounding"
    half = torch.finfo(subject.logits.dtype).bits < 32
    if half and outcome != "flag" and not enough(total):  # more images would see no more
        text += (
            f"; the model answers in {str(subject.logits.dtype).removeprefix('torch.')}, in whose rounding they drown"
        )
        return Seen("unsure", None, text, mend="audit the same weights in float32 (model.float())")
    return Seen(outcome, bad / max(total, 1), text + too_few(total, outcome), reason=reason)


_NOTHING, _AGREES, _WRONG, _KILLED, _STAND_IN = range(5)


def _compare(subject: Subject, model: Model, images: Tensor, labels: Tensor, directions: int) -> Tensor:
    """Of each image how autograd and finite differences compare: one of the five kinds."""
    keys = image_keys(images, subject.seed)
    noise = uniform(keys, images.shape, images.dtype, stream=1) - 0.5
    # away from 0 and 1, and from the ties of a constant background, at which max-pooling has a kink
    base = images.clamp(2 * _ROOM, 1 - 2 * _ROOM) + _ROOM * noise
    logits = subject.answers(base, model)
    rival = logits.scatter(1, labels[:, None], -torch.inf).argmax(1)

    def margin(logits: Tensor, labels: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        # against the rival of the base point, so that it is one function all around
        return (logits.gather(1, labels[rows, None]) - logits.gather(1, rival[rows, None]))[:, 0]

    _, gradient = subject.gradients(model, base, labels, margin)
    ways = [
        torch.where(uniform(keys, images.shape, images.dtype, stream=2 + number) < 0.5, -1.0, 1.0).to(base)
        for number in range(directions)
    ]
    ways.append(gradient.sign())
    slopes = torch.stack([(gradient * way).flatten(1).sum(1) for way in ways], 1)

    def differences(step: float, rows: Tensor | slice = slice(None)) -> Tensor:
        columns = []
        for way in ways:
            up, down = (
                margin(subject.answers(base[rows] + sign * step * way[rows], model), labels, rows) for sign in (1, -1)
            )
            columns.append((up - down) / (2 * step))
        return torch.stack(columns, 1)

    step = _STEPS[base.dtype]
    precision = torch.finfo(logits.dtype).eps
    rounding = _SAFETY * precision * logits.abs().amax(1).clamp_min(precision) / step * len(ways) ** 0.5
    nearer = differences(step)
    kind = torch.full_like(labels, _AGREES)
    silent = _size(slopes) <= rounding
    left = (silent | ~_close(slopes, nearer, rounding)).nonzero()[:, 0]
    if len(left) == 0:
        return kind
    # a sound model has no need of these
    near, far = differences(2 * step, left), differences(_ROOM, left)
    slopes, nearer, rounding = slopes[left], nearer[left], rounding[left]
    flat = _size(nearer) <= rounding
    smooth = _close(near, nearer, rounding) & ~flat
    agrees = _close(slopes, nearer, rounding) | _close(slopes, near, rounding)
    moves = _size(far) > rounding
    of_left = torch.full_like(left, _STAND_IN)
    of_left[agrees] = _AGREES
    of_left[~agrees & smooth] = _WRONG
    of_left[(_size(slopes) == 0) & ~smooth & moves] = _KILLED
    of_left[~moves & silent[left]] = _NOTHING
    kind[left] = of_left
    return kind


def _size(values: Tensor) -> Tensor:
    return values.norm(dim=1)


def _close(one: Tensor, other: Tensor, rounding: Tensor) -> Tensor:
    return _size(one - other) <= _TOLERANCE * torch.maximum(_size(one), _size(other)) + rounding


ZERO_GRADIENTS = Check(
    name="zero_gradients",
    title="Gradients are not zero",
    rule=f"flagged if the share of rightly classified images whose cross-entropy has a gradient of zero (or NaN) "
    f"exceeds {STRAY:g} (exact binomial test); float64 and rescaled logits tell underflow from a cut",
    source=f"{DISTILLED}; {ATHALYE}",
    reason="they vanish: the cross-entropy saturates and its gradient underflows to zero",
    mend="attack the logits: a loss that does not hang on their scale (margin, DLR, rescaled), or float64",
    look=_zero_gradients,
    cost=lambda budget, images: Passes(
        gradient=2 * min(budget.probes, images), exact_gradient=min(budget.probes, images)
    ),
)

DIFFERENTIABLE = Check(
    name="differentiable",
    title="Autograd's gradient is the model's",
    rule=f"flagged if the share of images where finite differences and autograd differ by more than {_TOLERANCE:g} of "
    f"their size although the model is smooth there, or where it changes in steps and autograd gives zero, exceeds "
    f"{STRAY:g} (exact binomial test)",
    source=f"{ATHALYE} (shattered gradients); {CARLINI}",
    reason="autograd does not give the model's gradient (a detached or wrongly differentiated part)",
    mend="give the part a backward pass (BPDA: the identity, or a smooth stand-in) and attack through it",
    look=_differentiable,
    # two sides of each direction; a model with steps is looked at from farther off, too
    cost=lambda budget, images: Passes(
        exact_forward=(1 + 2 * (budget.directions + 1)) * min(budget.probes, images),
        exact_gradient=min(budget.probes, images),
    ),
)

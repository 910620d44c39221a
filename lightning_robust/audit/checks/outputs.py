"""What the model gives back: the right classes, logits, and the same whatever else is in the batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_robust.attacks.context import attacking
from lightning_robust.audit.answers import share_that_differs
from lightning_robust.audit.budgets import Budget
from lightning_robust.audit.checks.base import AUTOATTACK, CARLINI, Check, Findings, Passes
from lightning_robust.audit.result import Seen
from lightning_robust.audit.stand_ins import Watch
from lightning_robust.audit.statistics import ALPHA, STRAY, points, tail
from lightning_robust.audit.subject import Subject
from lightning_robust.errors import UserError

_SUM = 1e-3  # that sums of probabilities differ by, relative to an image's outputs; AutoAttack's code allows as much
_DIFFERENCE = 1e-4  # of logits of length one, AutoAttack's
_ALONE = 16  # images that are also asked about one by one
_PROBE = 2  # images that the model's steps are watched with


def _clean(subject: Subject, budget: Budget, found: Findings) -> Seen:
    labels = subject.share.gather(subject.labels)
    right, total = int(subject.right.sum()), subject.total
    guess = float(labels.bincount().max()) / total
    accuracy = right / total
    if tail(right, total, guess) < ALPHA:
        return Seen("pass", accuracy, f"{right} of {total} images are classified rightly ({points(accuracy)})")
    named = subject.logits.argmax(1)
    one = f"; it gives all of them class {int(named[0])}" if total > 1 and bool((named == named[0]).all()) else ""
    return Seen(
        "unsure",
        accuracy,
        f"{right} of {total} images are classified rightly ({points(accuracy)}), no better than always naming the most "
        f"frequent class ({points(guess)}){one}",
        mend="audit a model that has learnt, on its own data: does it take pixels in [0, 1] (and not 0 to 255), are "
        "the classes numbered as in its training, does its normalisation lie inside?",
    )


def _outputs(subject: Subject, budget: Budget, found: Findings) -> Seen:
    outputs = subject.logits.double()
    sums = outputs.sum(1)
    # beside what the outputs of an image differ by: a constant that is added to logits makes no probabilities of them
    wide = float((outputs.amax(1) - outputs.amin(1)).mean())
    spread = float((sums - sums.mean()).abs().max()) / wide if wide > 0 else float("inf")
    to_one = bool(((sums - 1).abs() < _SUM).all())
    # a single sum is always like itself
    alike = to_one if len(sums) == 1 else to_one or spread < _SUM
    probabilities = alike and bool((outputs >= 0).all())
    if not probabilities:
        return Seen(
            "pass",
            spread,
            f"outputs from {float(outputs.min()):.4g} to {float(outputs.max()):.4g}; their sums over the classes "
            f"differ by {spread:.2g} of what the outputs of an image do",
        )
    found.probabilities = True
    return Seen(
        "flag",
        spread,
        f"no output is negative, and all {subject.total} rows sum to {float(sums.mean()):.4g}: these are probabilities"
        + ("" if abs(float(sums.mean()) - 1) < _SUM else " times a factor"),
    )


def _mode(subject: Subject, budget: Budget, found: Findings) -> Seen:
    model = subject.model
    watch = Watch()
    with attacking(model) as lent, torch.no_grad(), watch:
        lent(subject.images[:_PROBE])
    left_on = subject.share.sum(float(bool(watch.training))) > 0
    if left_on:
        _one(subject, subject.images[0])  # attacks ask about what is left, and that may be one image
        what = " and ".join({"dropout": "dropout", "batch_norm": "batch statistics"}[name] for name in watch.training)
        return Seen("flag", 1.0, f"in eval mode {what or 'a layer'} still behaves as in training")
    some = subject.first(_ALONE)

    def alone(images: Tensor, labels: Tensor) -> Tensor:
        together = subject.answers(images)
        one_by_one = torch.cat([_one(subject, image) for image in images])
        return share_that_differs([together, one_by_one], _DIFFERENCE)

    differs = subject.each(some, alone)
    share = float(differs.double().mean())
    alike = _answers_alike(subject)
    if alike and tail(int(differs.sum()), len(differs), STRAY) < ALPHA:
        return Seen(
            "flag",
            share,
            f"{int(differs.sum())} of {len(differs)} images get other logits alone than in a batch: a layer takes "
            "statistics of the batch",
        )
    # of a model that throws dice in either mode, other logits say nothing of the mode
    if alike and subject.handed_in_training and isinstance(model, nn.Module):
        in_training = _training_answers(subject, model)
        moved = float(in_training.double().mean())
        if moved > 0:
            return Seen(
                "flag",
                moved,
                f"the model, or a part of it, was handed over in training mode, in which {points(moved)} of "
                f"{len(in_training)} images get other logits (dropout, batch statistics) than in eval mode, in which "
                "it was audited",
            )
    return Seen("pass", share, "in eval mode no layer behaves as in training, and no image's logits hang on the others")


def _one(subject: Subject, image: Tensor) -> Tensor:
    """Logits of an image alone, ``(1, K)``.

    Raises:
        UserError: if the model takes no image alone, although it has taken a batch.
    """
    try:
        return subject.answers(image[None])
    except UserError as error:
        raise UserError(
            "the model answers a batch and fails on an image alone, so a layer takes statistics of the batch or the "
            f"batch's size is fixed: attacks need any number of images ({' '.join(str(error.__cause__).split())[:200]})"
        ) from error


def _answers_alike(subject: Subject) -> bool:
    """Whether two calls give the same: else logits that differ say nothing of the batch."""
    first = subject.first(_ALONE)
    differs = subject.each(
        first,
        lambda images, _: share_that_differs([subject.answers(images), subject.answers(images)], _DIFFERENCE),
    )
    return not bool(differs.any())


def _training_answers(subject: Subject, model: nn.Module) -> Tensor:
    """Of some images whether their logits differ between the two modes; BatchNorm's statistics are put back."""
    buffers = {name: value.clone() for name, value in model.named_buffers()}

    def differ(images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad(), torch.random.fork_rng():
            as_handed = model(images) if len(images) > 1 else model(images.repeat(2, 1, 1, 1))[:1]
        return share_that_differs([subject.answers(images), as_handed], _DIFFERENCE)

    try:
        return subject.each(subject.first(_ALONE), differ)
    finally:
        with torch.no_grad():
            for name, value in model.named_buffers():
                value.copy_(buffers[name])


CLEAN = Check(
    name="clean_accuracy",
    title="The model classifies these images",
    rule="unsure unless the clean accuracy exceeds the share of the most frequent class (exact binomial test)",
    source=CARLINI,
    reason="it does not classify these images",
    mend="",
    look=_clean,
    cost=lambda budget, images: Passes(forward=images),
)

OUTPUTS = Check(
    name="logits",
    title="The outputs are logits",
    rule=f"flagged if no output is negative and their sums over the classes, whatever they are, differ by less than "
    f"{_SUM:g} of what the outputs of an image differ by",
    source=AUTOATTACK,
    reason="its outputs are probabilities, whose gradients vanish where the softmax saturates",
    mend="take the softmax (and any factor) off the model's end and audit the logits",
    look=_outputs,
    cost=lambda budget, images: Passes(),
)

MODE = Check(
    name="eval_mode",
    title="The model is in eval mode",
    rule="flagged if in eval mode dropout or batch statistics are at work, or logits hang on the other images of the "
    f"batch (by more than {_DIFFERENCE:g} at length one), or if the model was handed over in a training mode that "
    "changes its logits",
    source=CARLINI,
    reason="it behaves as in training (dropout or batch statistics)",
    mend="call model.eval() before it is handed over, and let every layer follow the mode",
    look=_mode,
    cost=lambda budget, images: Passes(forward=5 * _ALONE),
)

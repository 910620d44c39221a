"""What a detector learns of its model from clean images: κ_nor, its interval, and which mutants are accurate enough."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor, nn

from lightning_robust.detectors.model_mutation import ModelBench, ModelMutation
from lightning_robust.detectors.mutation import Bench, Mutation
from lightning_robust.errors import UserError

_BLOCK = 32  # mutants that are drawn before the images are gone through


@dataclass(frozen=True)
class Calibration:
    """κ of normal images.

    Attributes:
        kappa_nor: mean share of mutants that change a rightly classified image's label.
        interval: half-width of its confidence interval.
        images: over so many images.
        mutants: of each.
        accuracy: the model's, on all images that were given.
        chosen: numbers of the mutants that are used, in their order.
        drawn: mutants that were drawn; more than are used where some were not accurate enough.
    """

    kappa_nor: float
    interval: float
    images: int
    mutants: int
    accuracy: float
    chosen: tuple[int, ...]
    drawn: int


def calibrate(
    mutation: Mutation,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    cap: int,
    mutants: int,
    level: float,
    chunk: int,
) -> Calibration:
    """Measure κ of the images that are classified rightly.

    Args:
        mutation: the operator.
        model: images to logits, in eval mode.
        images: ``(N, C, H, W)`` clean images in [0, 1], none of them used in a test.
        labels: ``(N,)`` true classes.
        cap: mutants that a decision may need.
        mutants: mutants of each image, at most ``cap``.
        level: of the confidence interval.
        chunk: points that go through the model at a time.

    Raises:
        UserError: for fewer than two images that are classified rightly, and a model whose mutants are never accurate
            enough.
    """
    right, accuracy = _rightly_classified(model, images, labels, chunk)
    if isinstance(mutation, ModelMutation):
        chosen, drawn, changes = _accurate_mutants(mutation, model, images, labels, right, cap, mutants, chunk)
    else:
        chosen, drawn = tuple(range(cap)), cap
        changes = count_changes(mutation.bench(model, chosen, chunk), images[right], mutants)
    shares = changes.double() / mutants
    spread = float(shares.std()) / math.sqrt(len(shares))
    return Calibration(
        kappa_nor=float(shares.mean()),
        interval=NormalDist().inv_cdf((1 + level) / 2) * spread,
        images=len(shares),
        mutants=mutants,
        accuracy=accuracy,
        chosen=chosen,
        drawn=drawn,
    )


def count_changes(bench: Bench, images: Tensor, mutants: int) -> Tensor:
    """Of each image, how many of the first so many mutants change its label: ``(N,)`` int64."""
    found = []
    for part in images.split(bench.most_images(images[:1])):
        trial, done = bench.trial(part), 0
        counted = torch.zeros(len(part), dtype=torch.int64, device=images.device)
        while done < mutants:
            count = min(trial.batch(done), mutants - done)
            counted += trial.changed(done, count).sum(1)
            done += count
        found.append(counted)
    return torch.cat(found)


def _rightly_classified(model: nn.Module, images: Tensor, labels: Tensor, chunk: int) -> tuple[Tensor, float]:
    predicted = torch.cat([model(part).argmax(1) for part in images.split(chunk)])
    right = predicted == labels.to(predicted.device)
    if int(right.sum()) < 2:
        raise UserError(
            f"the model classifies {int(right.sum())} of {len(images)} calibration images rightly: a detector is "
            "calibrated on at least 2, some hundreds if possible; give more images, or a trained model"
        )
    return right, float(right.double().mean())


def _accurate_mutants(
    mutation: ModelMutation,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    right: Tensor,
    cap: int,
    mutants: int,
    chunk: int,
) -> tuple[tuple[int, ...], int, Tensor]:
    """Draw mutated models until there are ``cap`` that are accurate enough.

    Returns:
        their numbers, how many were drawn, and how often the first ``mutants`` of them change the label of each image
        that is classified rightly ``(n,)``.
    """
    lowest = round(mutation.min_accuracy * float(right.double().mean()), 2)
    chosen: list[int] = []
    changes = torch.zeros(int(right.sum()), dtype=torch.int64, device=images.device)
    number, failed, best = 0, 0, 0.0
    while len(chosen) < cap:
        numbers = range(number, number + min(_BLOCK, cap - len(chosen)))
        bench = ModelBench(mutation, model, numbers, chunk)
        correct = torch.zeros(len(numbers), dtype=torch.int64, device=images.device)
        changed = []
        size = bench.most_images(images[:1])
        for part, of in zip(images.split(size), labels.split(size), strict=True):
            predicted = bench.forward.remember(part).argmax(1)
            seen = torch.stack([bench.forward(bench.patch(place)).argmax(1) for place in range(len(numbers))])
            correct += (seen == of.to(seen.device)).sum(1)
            changed.append(seen != predicted)
        moved = torch.cat(changed, dim=1)[:, right]
        for place, count in enumerate(correct.tolist()):
            number += 1
            accuracy = count / len(images)
            if round(accuracy, 2) < lowest:
                failed, best = failed + 1, max(best, accuracy)
                if failed >= mutation.tries:
                    raise UserError(
                        f"{mutation.title}: {failed} mutants in a row were too inaccurate ({100 * best:.1f} % at best, "
                        f"where {100 * lowest:.0f} % is wanted): lower the rate, or min_accuracy"
                    )
                continue
            failed, best = 0, 0.0
            if len(chosen) < mutants:
                changes += moved[place]
            chosen.append(numbers[place])
    return tuple(chosen), number, changes

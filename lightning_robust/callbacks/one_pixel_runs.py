"""The one-pixel study's attacks on one batch, and what it keeps of them: plain tensors, without the images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from lightning_robust.attacks.base import Progress
from lightning_robust.attacks.context import Model, attacking
from lightning_robust.attacks.evolution_state import EvolutionState
from lightning_robust.attacks.one_pixel import OnePixel
from lightning_robust.attacks.pixel_goal import PixelRuns


@dataclass
class Runs:
    """What one attack came to on one batch, a run for each image or for each pair (image, target); on the CPU.

    Attributes:
        number: ``(N,)`` each image's place in the data.
        labels: ``(N,)`` true classes.
        clean_predicted: ``(N,)`` classes predicted for the clean images.
        image: ``(M,)`` which of the N images a run attacked.
        target: ``(M,)`` the class that it was driven to; -1 where there was none.
        predicted: ``(M,)`` the class that the model takes the result for.
        confidence: ``(M,)`` probability of the target, or of the predicted class where there was no target.
        generations: ``(M,)`` generations made.
        queries: ``(M,)`` points at which the model was asked.
        places: ``(M, d, 2)`` row and column of the changed pixels; -1 where fewer than d changed.
        before: ``(M, d, C)`` their values in the clean image.
        after: ``(M, d, C)`` their values in the adversarial one.
    """

    number: Tensor
    labels: Tensor
    clean_predicted: Tensor
    image: Tensor
    target: Tensor
    predicted: Tensor
    confidence: Tensor
    generations: Tensor
    queries: Tensor
    places: Tensor
    before: Tensor
    after: Tensor

    @classmethod
    def of(cls, *, clean: Tensor, adversarial: Tensor, pixels: int, image: Tensor, **values: Tensor) -> Self:
        """Take down the changed pixels in place of the images.

        Args:
            clean: ``(N, C, H, W)`` clean images.
            adversarial: ``(M, C, H, W)`` results, at most ``pixels`` pixels of each other than in the clean image.
            pixels: d.
            image: as the attribute.
            **values: the other attributes.
        """
        before = clean[image]
        changed = (adversarial != before).any(1).flatten(1)
        pixels = min(pixels, changed.shape[1])
        # the changed ones come first, each in the order of the image
        places = changed.byte().argsort(dim=1, descending=True, stable=True)[:, :pixels]
        there = changed.gather(1, places)
        expanded = places[:, None].expand(-1, clean.shape[1], -1)
        width = clean.shape[3]
        where = torch.stack([places // width, places % width], 2)
        found = {
            "places": torch.where(there[..., None], where, -1),
            "before": before.flatten(2).gather(2, expanded).transpose(1, 2),
            "after": adversarial.flatten(2).gather(2, expanded).transpose(1, 2),
        }
        return cls(**{name: value.detach().cpu() for name, value in {"image": image, **values, **found}.items()})

    def written(self, clean: Tensor, runs: Tensor) -> Tensor:
        """The adversarial images of the runs ``(m,)``, from the N clean ones: ``(m, C, H, W)``."""
        images = clean[self.image[runs]].clone()
        for slot in range(self.places.shape[1]):
            row, column = self.places[runs, slot].unbind(1)
            there = (row >= 0).nonzero()[:, 0]
            images[there, :, row[there], column[there]] = self.after[runs[there], slot].to(images.dtype)
        return images

    @property
    def success(self) -> Tensor:
        """``(M,)`` bool: the target was reached, or without one the class is not the true one."""
        without = self.predicted != self.labels[self.image]
        return torch.where(self.target < 0, without, self.predicted == self.target)

    def rows(self, class_names: list[str]) -> list[dict[str, Any]]:
        """A row for each run, with the changed pixels and their colours in 255ths."""
        columns = ("target", "predicted", "confidence", "generations", "queries", "success", "image")
        runs = zip(*(getattr(self, name).tolist() for name in columns), strict=True)
        table: list[dict[str, Any]] = []
        for run, (target, predicted, confidence, generations, queries, success, image) in enumerate(runs):
            row: dict[str, Any] = {
                "image": int(self.number[image]),
                "true_class": class_names[int(self.labels[image])],
                "clean_prediction": class_names[int(self.clean_predicted[image])],
                "target": "" if target < 0 else class_names[target],
                "prediction": class_names[predicted],
                "success": success,
                "confidence": confidence,
                "generations": generations,
                "queries": queries,
            }
            for slot, (y, x) in enumerate(self.places[run].tolist()):
                there = y >= 0
                row |= {
                    f"row_{slot + 1}": y if there else None,
                    f"column_{slot + 1}": x if there else None,
                    f"before_{slot + 1}": _colour(self.before[run, slot]) if there else None,
                    f"after_{slot + 1}": _colour(self.after[run, slot]) if there else None,
                }
            table.append(row)
        return table


@dataclass(frozen=True, kw_only=True)
class Course:
    """How far an attack on a batch has come and what is told of it, the same for both kinds of attack.

    Attributes:
        logits: ``(N, K)`` of the clean images.
        number: ``(N,)`` each image's place in the data.
        mask: where pixels may change; ``None``: everywhere.
        stand_in: a faster model to search on.
        state: where to go on.
        checkpoint: given the state every ``every`` generations.
        every: generations.
        progress: told (generations done, generations).
    """

    logits: Tensor
    number: Tensor
    mask: Tensor | None = None
    stand_in: Model | None = None
    state: EvolutionState | None = None
    checkpoint: Callable[[EvolutionState], None] | None = None
    every: int = 10
    progress: Progress | None = None


def all_targets(attack: OnePixel, model: Model, images: Tensor, labels: Tensor, course: Course) -> Runs:
    """Drive every image to every other class.

    Args:
        attack: its settings.
        model: from images to logits.
        images: ``(N, C, H, W)`` in [0, 1].
        labels: ``(N,)`` true classes.
        course: where to go on, and what to tell.
    """
    found = attack.run_all_targets(
        model,
        images,
        labels,
        num_classes=course.logits.shape[1],
        mask=course.mask,
        clean_logits=course.logits,
        progress=course.progress,
        state=course.state,
        checkpoint=course.checkpoint,
        checkpoint_every=course.every,
        stand_in=course.stand_in,
    )
    return _taken_down(attack, images, labels, course, found, found.goal_probability)


def without_target(attack: OnePixel, model: Model, images: Tensor, labels: Tensor, course: Course) -> Runs:
    """Lower the probability of every image's true class; arguments as in :func:`all_targets`."""
    found = attack.run_without_target(
        model,
        images,
        labels,
        mask=course.mask,
        clean_logits=course.logits,
        progress=course.progress,
        state=course.state,
        checkpoint=course.checkpoint,
        checkpoint_every=course.every,
        stand_in=course.stand_in,
    )
    with torch.no_grad(), attacking(model) as lent:
        probabilities = lent(found.images).softmax(1)
    return _taken_down(attack, images, labels, course, found, probabilities.gather(1, found.predicted[:, None])[:, 0])


def _taken_down(
    attack: OnePixel, images: Tensor, labels: Tensor, course: Course, found: PixelRuns, confidence: Tensor
) -> Runs:
    return Runs.of(
        clean=images,
        adversarial=found.images,
        pixels=attack.pixels,
        number=course.number,
        labels=labels,
        clean_predicted=course.logits.argmax(1),
        image=found.index,
        target=found.target,
        predicted=found.predicted,
        confidence=confidence,
        generations=found.generations,
        queries=found.queries,
    )


def _colour(values: Tensor) -> str:
    return " ".join(f"{value * 255:.4g}" for value in values.tolist())

"""The radius of region-based classification: as large as clean accuracy allows (Cao & Gong, arXiv 1709.05583)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_robust.attacks.context import attacking
from lightning_robust.attacks.threat_model import parse_number
from lightning_robust.batch import as_batch
from lightning_robust.defenses.region_based import RegionBased
from lightning_robust.errors import UserError


@dataclass(frozen=True)
class RadiusSearch:
    """What :func:`find_radius` found.

    Attributes:
        radius: the largest radius tried whose vote is as accurate as the classifier, but for the tolerance.
        clean: accuracy of the classifier alone, in [0, 1].
        tried: (radius, accuracy of the vote) in the order of trial; the last is one too large, unless the search ended
            at its largest.
        defense: the defense with that radius, around the classifier.
    """

    radius: float
    clean: float
    tried: tuple[tuple[float, float], ...]
    defense: RegionBased


def find_radius(
    defense: RegionBased,
    batches: Iterable[Any],
    *,
    step: float | str = 0.01,
    tolerance: float = 0.01,
    largest: float | str = 0.3,
) -> RadiusSearch:
    """Grow the radius while the accuracy on validation data does not drop by more than a tolerance.

    The search of Cao & Gong (arXiv 1709.05583) with the step and the tolerance that DEEPSEC took: the radius grows from
    ``step`` by ``step``, and the last one before accuracy has fallen by more than ``tolerance`` below that of the
    classifier alone is taken.

    Args:
        defense: around a classifier; its own radius does not matter, its other settings are those of the votes.
        batches: (images, labels) batches that can be gone through several times: a data loader or a list.
        step: in pixel units of [0, 1], a number or a fraction.
        tolerance: share of images, in [0, 1).
        largest: where the search ends at the latest.

    Raises:
        UserError: for settings outside these ranges, data that is empty or can be gone through only once, and where
            already the first radius costs more than the tolerance.
    """
    model = defense.protected()
    width, most = parse_number(step, "step"), parse_number(largest, "largest")
    if not 0 < width <= most <= 1:
        raise UserError(f"find_radius: step={step}, largest={largest}: they are radii, 0 < step ≤ largest ≤ 1")
    if not 0 <= tolerance < 1:
        raise UserError(f"find_radius: tolerance={tolerance}: give a share of the images, for example 0.01")
    if isinstance(batches, Iterator):
        raise UserError(
            "find_radius: the batches can be gone through only once: give a data loader or a list of (images, labels)"
        )
    with attacking(defense), torch.no_grad():
        clean = _accuracy(model, batches)
        found, tried = None, []
        for number in range(1, int(most / width + 1e-9) + 1):
            radius = round(number * width, 12)  # 0.3 and not 0.30000000000000004
            candidate = defense.around(model)
            candidate.radius = radius
            accuracy = _accuracy(candidate, batches)
            tried.append((radius, accuracy))
            if clean - accuracy > tolerance + 1e-12:
                break
            found = candidate
    if found is None:
        raise UserError(
            f"find_radius: accuracy falls from {clean:.4f} to {tried[0][1]:.4f} at the first radius, {tried[0][0]:g}: "
            "begin with a smaller step, or allow a larger tolerance"
        )
    return RadiusSearch(found.radius, clean, tuple(tried), found)


def _accuracy(model: nn.Module, batches: Iterable[Any]) -> float:
    right = total = 0
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), None)
    for values in batches:
        images, labels, _ = as_batch(values)
        right += int((model(images.to(device=device)).argmax(1) == labels.to(device=device)).sum())
        total += len(labels)
    if total == 0:
        raise UserError("find_radius: the validation data holds no image")
    return right / total

"""Finding the blobs: the δ₁, δ₂, θ and fill that do best on validation images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_robust.attacks import Attack
from lightning_robust.batch import Batch
from lightning_robust.callbacks.regions_build import Grid
from lightning_robust.callbacks.regions_directions import Direction
from lightning_robust.defenses.neutralizer import Neutralizer, Reading, attack_neutralized
from lightning_robust.errors import UserError
from lightning_robust.metrics import CellAccuracy, wilson_interval
from lightning_robust.metrics.regions import RegionFrequencies
from lightning_robust.regions import Blobs, Region, Threshold, blob


@dataclass(frozen=True)
class Candidate:
    """One blob of one direction.

    Attributes:
        roi: δ₁.
        roa: δ₂.
        theta: θ.
        fill: 0 or 1.
        mask: ``(H, W)`` bool.
        same_as: number of an earlier candidate with the same blob and fill, or its own number.
    """

    roi: Threshold
    roa: Threshold
    theta: float
    fill: int
    mask: Tensor
    same_as: int


@dataclass(frozen=True)
class Tuned:
    """What the search found for one direction.

    Attributes:
        candidate: the best.
        frequency: ``(H, W)`` how often each pixel was in ŪV at its thresholds.
        kept: whether it keeps the clean score within the tolerance.
        rows: all candidates with their scores, for the table.
    """

    candidate: Candidate
    frequency: Tensor
    kept: bool
    rows: list[dict[str, Any]]


def candidates(frequencies: Sequence[Sequence[RegionFrequencies]], grid: Grid, direction: int) -> list[Candidate]:
    """All blobs of a direction that are neither empty nor the whole image.

    Raises:
        UserError: where none is left.
    """
    found: list[Candidate] = []
    seen: dict[tuple[bytes, int], int] = {}
    empty = full = 0
    for row, roi in enumerate(grid.roi):
        for column, roa in enumerate(grid.roa):
            frequency = frequencies[row][column].frequency[direction, Region.V_ONLY]
            for theta in grid.theta:
                mask = blob(frequency, theta)
                if not mask.any():
                    empty += 1
                elif mask.all():
                    full += 1
                else:
                    for fill in grid.fill:
                        key = (mask.cpu().numpy().tobytes(), fill)
                        same = seen.setdefault(key, len(found))
                        found.append(Candidate(roi, roa, theta, fill, mask, same))
    if not found:
        raise UserError(
            f"no threshold leaves a blob: of {empty + full} choices of δ₁, δ₂ and θ {empty} give an empty one and "
            f"{full} the whole image: lower thetas (or roa_thresholds) for the former, raise them for the latter"
        )
    return found


def tune(
    wanted: Sequence[Direction],
    found: Sequence[Sequence[Candidate]],
    frequencies: Sequence[Sequence[RegionFrequencies]],
    grid: Grid,
    batches: Sequence[Batch],
    module: pl.LightningModule,
    attack: Attack,
    reading: Reading,
    tolerance: float,
    progress: Any,
) -> list[Tuned]:
    """Try all blobs on validation images, and take for each direction the one that does best.

    The paper's criterion: keep the score on clean images (here: lose at most ``tolerance``), and raise that on
    neutralised and attacked ones. Where two do alike, the one with the better neutralised score, then the smaller blob.

    Args:
        wanted: the directions.
        found: of each direction its candidates.
        frequencies: of :func:`count_regions`, [δ₁][δ₂].
        grid: what is tried.
        batches: of validation images, of this rank.
        module: the classifier.
        attack: that is defended against.
        reading: of :func:`~lightning_robust.defenses.neutralizer.attack_neutralized`.
        tolerance: share of the images.
        progress: called with a text before each batch.
    """
    cells = [f"clean/{number}" for number in range(len(wanted))]
    for number, own in enumerate(found):
        for place, candidate in enumerate(own):
            if candidate.same_as == place:
                cells += [f"mod/{number}/{place}", f"mod_adv/{number}/{place}"]
    metric = CellAccuracy(cells).to(module.device)
    for index, batch in enumerate(batches):
        for number, direction in enumerate(wanted):
            rows = (batch.labels == direction.source).nonzero()[:, 0]
            if not len(rows):
                continue
            images, labels = batch.images[rows], batch.labels[rows]
            with torch.no_grad():
                metric.update(f"clean/{number}", module(images).argmax(1) == labels)
            for place, candidate in enumerate(found[number]):
                if candidate.same_as != place:
                    continue
                progress(f"tuning {direction.label}, batch {index + 1}, blob {place + 1}/{len(found[number])}")
                defense = single_blob(module, candidate.mask, candidate.fill)
                with torch.no_grad():
                    metric.update(f"mod/{number}/{place}", defense(images).argmax(1) == labels)
                right = attack_neutralized(defense, attack, images, labels, reading)[1]
                metric.update(f"mod_adv/{number}/{place}", right)
    counts = metric.counts()
    return [
        _best(number, direction, found[number], frequencies, grid, counts, tolerance)
        for number, direction in enumerate(wanted)
    ]


def single_blob(module: pl.LightningModule, mask: Tensor, fill: int) -> Neutralizer:
    """The neutralizer of one blob, around the classifier."""
    blobs = Blobs(mask[None], torch.tensor([float(fill)], device=mask.device))
    return Neutralizer(module, blobs=blobs).of_class(0).to(module.device).eval()


def _best(
    number: int,
    direction: Direction,
    found: Sequence[Candidate],
    frequencies: Sequence[Sequence[RegionFrequencies]],
    grid: Grid,
    counts: dict[str, tuple[int, int]],
    tolerance: float,
) -> Tuned:
    right, images = counts[f"clean/{number}"]
    clean = right / images
    rows: list[dict[str, Any]] = []
    for candidate in found:
        mod, mod_adv = (counts[f"{kind}/{number}/{candidate.same_as}"][0] for kind in ("mod", "mod_adv"))
        low, high = wilson_interval(mod_adv, images)
        rows.append(
            {
                "direction": direction.label,
                "roi_threshold": str(candidate.roi),
                "roa_threshold": str(candidate.roa),
                "theta": candidate.theta,
                "fill": candidate.fill,
                "blob_share": float(candidate.mask.double().mean()),
                "images": images,
                "clean": clean,
                "mod": mod / images,
                "mod_adv": mod_adv / images,
                "mod_adv_low": low,
                "mod_adv_high": high,
                "keeps_clean": mod / images >= clean - tolerance - 1e-12,
            }
        )
    kept = any(row["keeps_clean"] for row in rows)

    def worth(place: int) -> tuple[float, ...]:
        row = rows[place]
        # where none keeps the clean score, the one that loses least of it
        first = (row["mod_adv"], row["mod"]) if kept else (row["mod"], row["mod_adv"])
        return (float(row["keeps_clean"]), *first, -row["blob_share"], -place)

    best = max(range(len(rows)), key=worth)
    for place, row in enumerate(rows):
        row["chosen"] = place == best
    candidate = found[best]
    table = frequencies[grid.roi.index(candidate.roi)][grid.roa.index(candidate.roa)]
    return Tuned(candidate, table.frequency[number, Region.V_ONLY], kept, rows)

"""Finding the blobs: regions of training images, and δ₁, δ₂, θ and the fill that do best on validation images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_robust.attacks import Attack
from lightning_robust.batch import Batch
from lightning_robust.callbacks.regions_directions import Direction
from lightning_robust.datamodules.base import ImageDataModule, Split
from lightning_robust.datamodules.selection import balanced_limit
from lightning_robust.defenses.neutralizer import Neutralizer, Reading, attack_neutralized
from lightning_robust.errors import UserError
from lightning_robust.metrics import CellAccuracy, wilson_interval
from lightning_robust.metrics.regions import RegionCounts, RegionFrequencies
from lightning_robust.regions import (
    ActivationMap,
    Blobs,
    Region,
    Threshold,
    blob,
    importance,
    isolate,
    pixel_change,
)


@dataclass(frozen=True)
class Grid:
    """What is tried.

    Attributes:
        roi: values of δ₁, of each image's importance.
        roa: values of δ₂, of each image's change.
        theta: values of θ, of the share of a class's images.
        fill: 0, 1 or both.
    """

    roi: tuple[Threshold, ...]
    roa: tuple[Threshold, ...]
    theta: tuple[float, ...]
    fill: tuple[int, ...]


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


def data_of(trainer: pl.Trainer, who: str) -> ImageDataModule:
    """The data module, with training and validation images of its own.

    Raises:
        UserError: where there is none, or where its validation images are its test images.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, ImageDataModule) or not data.has_val:
        raise UserError(
            f"{who} finds blobs in training images and tunes them on validation images, and tests them on neither: "
            "give it a data module that has all three (data.val_size above 0)"
        )
    val, test = data.dataset("val"), data.dataset("test")
    if val.source is test.source and set(val.rows.tolist()) & set(test.rows.tolist()):
        raise UserError(
            f"{who}: the validation images are the test images too, and nothing may be tuned on these: give the data a "
            "test split of its own"
        )
    return data


def own_batches(
    data: ImageDataModule, split: Split, limit: int | None, trainer: pl.Trainer, module: pl.LightningModule
) -> Iterator[Batch]:
    """This rank's share of the first images of a split, class-balanced, as they are (not augmented)."""
    dataset = data.dataset(split)
    labels = dataset.labels.numpy()
    chosen = range(len(labels)) if limit is None else balanced_limit(labels, limit, data.seed).tolist()
    mine = list(chosen)[trainer.global_rank :: trainer.world_size]
    for start in range(0, len(mine), data.eval_batch_size):
        samples = dataset.__getitems__(mine[start : start + data.eval_batch_size])
        images = samples.images.to(module.device).to(module.dtype)
        yield Batch(images, samples.labels.to(module.device))


def count_regions(
    batches: Iterator[Batch],
    module: pl.LightningModule,
    attacks: dict[str, Attack],
    activation: ActivationMap,
    grid: Grid,
    groups: Tensor,
    size: tuple[int, int],
    progress: Any,
) -> tuple[dict[str, list[list[RegionFrequencies]]], Tensor]:
    """How often each pixel lies in each region, for every attack and each pair of δ₁ and δ₂.

    Args:
        batches: of the training images, of this rank.
        module: the classifier.
        attacks: name to attack.
        activation: how importance is measured.
        grid: what is tried.
        groups: ``(K,)`` the direction of each class.
        size: (height, width).
        progress: called with a text before each batch.

    Returns:
        of each attack, [δ₁][δ₂]; and the number of images that were classified rightly, ``(G,)``. The same on every
        rank.
    """
    count = int(groups.max()) + 1
    metrics = {
        name: [[RegionCounts(count, size).to(module.device) for _ in grid.roa] for _ in grid.roi] for name in attacks
    }
    resolved: ActivationMap | None = None
    for number, batch in enumerate(batches):
        progress(f"regions of training images, batch {number + 1}")
        if resolved is None:
            resolved = activation.resolved(module, batch.images)
        with torch.no_grad():
            right = (module(batch.images).argmax(1) == batch.labels).nonzero()[:, 0]
        images, labels = batch.images[right], batch.labels[right]
        if not len(right):
            continue
        looked = importance(module, images, labels, resolved)
        rois = [threshold.region(looked) for threshold in grid.roi]
        mine = groups.to(labels.device)[labels]
        for name, attack in attacks.items():
            adversarial = attack.to_the_end().run(module, images, labels, rounding=False).images
            change = pixel_change(images, adversarial)
            for column, threshold in enumerate(grid.roa):
                roa = threshold.region(change)
                for row, roi in enumerate(rois):
                    metrics[name][row][column].update(isolate(roi, roa), mine)
    found = {name: [[metric.compute() for metric in row] for row in rows] for name, rows in metrics.items()}
    return found, next(iter(found.values()))[0][0].images


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
    if not images:
        raise UserError(
            f"there is no validation image of {direction.label}: give more of them (data.val_size, tune_images)"
        )
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

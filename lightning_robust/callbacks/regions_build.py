"""Regions of training images for the neutralizer: whose images, and how often a pixel lies in each region."""

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
from lightning_robust.errors import UserError
from lightning_robust.metrics.regions import RegionCounts, RegionFrequencies
from lightning_robust.regions import ActivationMap, Threshold, importance, isolate, pixel_change


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


def check_sources(
    data: ImageDataModule, wanted: Sequence[Direction], limits: dict[Split, tuple[int | None, str]]
) -> None:
    """Refuse splits that lack a class, before anything is computed.

    Args:
        data: the data.
        wanted: the directions.
        limits: of each split, how many of its images are taken, and the setting that says so.

    Raises:
        UserError: naming the class, the split and the settings.
    """
    for split, (limit, setting) in limits.items():
        there = set(data.dataset(split).labels[_chosen(data, split, limit)].tolist())
        for direction in wanted:
            if direction.source not in there:
                kind = {"train": "training", "val": "validation"}.get(split, split)
                more = "data.val_size, data.limit" if split == "val" else "data.limit"
                raise UserError(
                    f"NeutralizerStudy: among the {kind} images taken there is none of the source class of "
                    f"{direction.label}: give more of them ({more}, {setting})"
                )


def _chosen(data: ImageDataModule, split: Split, limit: int | None) -> list[int]:
    """Rows of a split: all, or as many of each class."""
    labels = data.dataset(split).labels.numpy()
    return list(range(len(labels))) if limit is None else [int(row) for row in balanced_limit(labels, limit, data.seed)]


def own_batches(
    data: ImageDataModule, split: Split, limit: int | None, trainer: pl.Trainer, module: pl.LightningModule
) -> Iterator[Batch]:
    """This rank's share of the first images of a split, class-balanced, as they are (not augmented)."""
    dataset = data.dataset(split)
    mine = _chosen(data, split, limit)[trainer.global_rank :: trainer.world_size]
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

"""What a one-pixel study writes and prints: rows of its tables, the images of its figure, and the paper's rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_robust.callbacks.measurement import num_classes
from lightning_robust.callbacks.one_pixel_runs import Runs
from lightning_robust.metrics.intervals import wilson_interval
from lightning_robust.metrics.one_pixel import AllTargetsScores, NonTargetedScores
from lightning_robust.report import print_table

# the abstract of arXiv 1710.08864, one pixel; of CIFAR-10 the mean of three networks
_CIFAR10 = {
    "attack": "paper: Kaggle CIFAR-10",
    "pixels": 1,
    "success_rate_nontargeted": 0.6797,
    "confidence": 0.7403,
}
_IMAGENET = {"attack": "paper: ImageNet", "pixels": 1, "success_rate_nontargeted": 0.1604, "confidence": 0.2291}

_COLUMNS = {
    "targeted success": "success_rate_targeted",
    "non-targeted success": "success_rate_nontargeted",
    "any change": "success_rate_any_change",
    "confidence": "confidence",
}


def summary(
    name: str, pixels: int, scores: AllTargetsScores | NonTargetedScores, means: dict[str, Tensor]
) -> dict[str, Any]:
    """One attack's row: counts, rates with their 95 % Wilson intervals, means; without what no image gives."""
    runs, images = int(scores.runs), int(scores.images)
    row: dict[str, Any] = {"attack": name, "pixels": pixels, "images": images, "runs": runs}
    for what, value in rates(scores, means).items():
        row[what] = float(value)
        if what.startswith("success_rate"):
            of = runs if what == "success_rate_targeted" else images
            row[f"{what}_low"], row[f"{what}_high"] = wilson_interval(round(float(value) * of), of)
    return row


def rates(scores: AllTargetsScores | NonTargetedScores, means: dict[str, Tensor]) -> dict[str, Tensor]:
    """The numbers to log: what is a scalar and not a count, as far as it is finite."""
    values = {**scores._asdict(), **means}
    return {
        what: value
        for what, value in values.items()
        if value.dim() == 0 and value.is_floating_point() and bool(value.isfinite())
    }


def pairs(scores: AllTargetsScores | NonTargetedScores, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each ordered pair of classes that was tried; without targets for each that came about."""
    successes = scores.pair_successes
    tried = scores.pair_attempts if isinstance(scores, AllTargetsScores) else scores.attempts[:, None] * (successes > 0)
    return [
        {
            "true_class": names[true],
            "class_reached": names[reached],
            "attempts": int(tried[true, reached]),
            "successes": int(successes[true, reached]),
        }
        for true, reached in tried.nonzero().tolist()
    ]


def gathered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all ranks, in the order of the data: call it on every rank."""
    if dist.is_available() and dist.is_initialized():
        parts: list[list[dict[str, Any]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, rows)
        rows = [row for part in parts for row in part]
    return sorted(rows, key=lambda row: row["image"])


def examples(runs: Sequence[Runs], clean: Sequence[Tensor], count: int) -> dict[str, Tensor]:
    """The first images that were fooled, each by the run that the model is surest of.

    Args:
        runs: of some batches.
        clean: ``(N, C, H, W)`` images of the first of these batches.
        count: how many images at most.

    Returns:
        ``clean`` and ``adversarial`` ``(n, C, H, W)``, ``labels``, ``predictions`` and ``confidence`` ``(n,)``; empty
        where none was fooled.
    """
    found: list[tuple[Tensor, ...]] = []
    for batch, images in zip(runs, clean, strict=False):
        # what the model took for the target to begin with is no example
        sure = torch.where(batch.success & (batch.places[:, 0, 0] >= 0), batch.confidence.double(), -1.0)
        for image in range(len(images)):
            of = (batch.image == image).nonzero()[:, 0]
            best = of[sure[of].argmax()]
            if sure[best] >= 0 and len(found) < count:
                after = batch.written(images, best[None])[0]
                found.append((images[image], after, batch.labels[image], batch.predicted[best], sure[best]))
    names = ("clean", "adversarial", "labels", "predictions", "confidence")
    return {name: torch.stack(part) for name, part in zip(names, zip(*found, strict=True), strict=bool(found))}


def published(module: pl.LightningModule, names: Sequence[str]) -> list[dict[str, Any]]:
    """What the paper reports, for images and classes like its own.

    Args:
        module: whose images and classes are looked at.
        names: of the classes; numbers, where the data has no names, may be anything.
    """
    shape, classes = getattr(module, "image_shape", ()), num_classes(module)
    cifar = all(str(name).isdigit() for name in names) or "frog" in names
    if tuple(shape) == (3, 32, 32) and classes == 10 and cifar:
        return [_CIFAR10]
    if len(shape) == 3 and min(shape[1:]) >= 224 and classes == 1000:
        return [_IMAGENET]
    return []


def print_rates(stage: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print the rates in words."""
    columns = {title: what for title, what in _COLUMNS.items() if any(what in row for row in rows)}
    shown = [
        {
            "attack": row["attack"],
            "pixels": row["pixels"],
            "images": row.get("images"),
            **{title: f"{100 * row[what]:.2f} %" if what in row else None for title, what in columns.items()},
        }
        for row in rows
    ]
    print_table(f"One-pixel study ({stage})", shown)

"""What measurements share that take long for an image: they measure the first so many of the data."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from lightning_robust.batch import Batch
from lightning_robust.callbacks.measurement import Measurement
from lightning_robust.errors import UserError


class FirstImages(Measurement):
    """Measures in ``validate`` and ``test``, on the first images of the data, the same on any number of devices.

    Args:
        limit_images: so many; ``None``: all.

    Raises:
        UserError: for fewer than one.
    """

    def __init__(self, limit_images: int | None = None) -> None:
        super().__init__(every_n_epochs=0)
        if limit_images is not None and limit_images < 1:
            raise UserError(f"{type(self).__name__}: limit_images={limit_images}: at least one image, or null for all")
        self.limit_images = limit_images
        self._seen = 0  # images of this rank that were measured

    def _begin(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self._seen = 0
        super()._begin(trainer, module, stage)

    def _wanted(self, trainer: pl.Trainer, batch: Batch, index: int, loader: Any) -> Batch | None:
        """The part of a batch that is within ``limit_images``."""
        if self.limit_images is not None:
            # rank r holds images r, r + world, …
            left = len(range(trainer.global_rank, self.limit_images, trainer.world_size)) - self._seen
            if left <= 0:
                return None
            batch = Batch(*(None if values is None else values[:left] for values in batch))  # type: ignore[arg-type]
        self._seen += len(batch.images)
        return batch

    def expected_images(self, trainer: pl.Trainer) -> int | None:
        """How many images this rank will measure; ``None`` where the data does not say."""
        loaders, batches = evaluation_loaders(trainer)
        sizes = [getattr(loader, "batch_size", None) for loader in loaders]
        if any(size is None for size in sizes) or float("inf") in batches:
            return None if self.limit_images is None else -(-self.limit_images // trainer.world_size)
        given = sum(
            min(int(count) * int(size or 0), len(sampler) if (sampler := getattr(loader, "sampler", None)) else 2**62)
            for loader, size, count in zip(loaders, sizes, batches, strict=True)
        )
        if self.limit_images is None:
            return given
        return min(given, len(range(trainer.global_rank, self.limit_images, trainer.world_size)))


def evaluation_loaders(trainer: pl.Trainer) -> tuple[list[Any], list[int | float]]:
    """The loaders of the running evaluation, and how many batches of each it takes on this rank."""
    loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
    counts = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
    return (loaders if isinstance(loaders, list) else [loaders]), counts

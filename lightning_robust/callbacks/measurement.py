"""What every measuring callback shares: when it measures, on which images, and where its results go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from pytorch_lightning.loggers import WandbLogger
from torch import Tensor

from lightning_robust.attacks import ThreatModel
from lightning_robust.batch import Batch, as_batch
from lightning_robust.errors import UserError
from lightning_robust.loggers.run_logger import RunLogger
from lightning_robust.report import atomic_file, save_figure, to_uint8_image, write_csv


class Measurement(pl.Callback):
    """Measures in ``fit`` every n epochs on some validation batches, and in ``validate`` and ``test`` on everything.

    Subclasses fill in :meth:`start`, :meth:`measure` and :meth:`publish`.

    Args:
        every_n_epochs: in ``fit``, measure after every so many epochs; 0: not in ``fit``.
        limit_batches: in ``fit``, measure on the images of the first so many validation batches; ``None``: on all. They
            are the same images on any number of devices.

    Attributes:
        limits_every_stage: set by a subclass whose ``limit_batches`` holds in ``validate`` and ``test``, too.
    """

    limits_every_stage = False

    def __init__(self, every_n_epochs: int = 1, limit_batches: int | None = None) -> None:
        name = type(self).__name__
        if every_n_epochs < 0:
            raise UserError(f"{name}: every_n_epochs={every_n_epochs}: 1 for every epoch, 0 for never in fit")
        if limit_batches is not None and limit_batches < 1:
            raise UserError(f"{name}: limit_batches={limit_batches}: at least one batch, or null for all")
        self.every_n_epochs, self.limit_batches = every_n_epochs, limit_batches
        self._running = False

    # -- to be filled in -----------------------------------------------------------------------------------------------

    def start(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """An evaluation begins: reset what is counted."""

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, index: int) -> None:
        """Count a batch; ``index`` is its number on this rank."""

    def publish(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """The evaluation ends: compute on every rank, log numbers, write figures and tables."""

    # -- when ----------------------------------------------------------------------------------------------------------

    def active(self, trainer: pl.Trainer) -> bool:
        """Whether this evaluation is to be measured."""
        if trainer.sanity_checking:
            return False
        if trainer.state.fn != "fit":
            return True
        return self.every_n_epochs > 0 and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _wanted(self, trainer: pl.Trainer, batch: Batch, index: int, loader: Any) -> Batch | None:
        """The part of a batch that is within ``limit_batches``."""
        if self.limit_batches is None or (trainer.state.fn != "fit" and not self.limits_every_stage):
            return batch
        size = getattr(loader, "batch_size", None) or len(batch.images)
        # rank r holds images r, r + world, …: so many of this rank's are among the first limit_batches · size
        wanted = self.limit_batches * size
        mine = len(range(trainer.global_rank, wanted, trainer.world_size))
        left = mine - index * size
        if left <= 0:
            return None
        mask = None if batch.mask is None else batch.mask[:left]
        return Batch(batch.images[:left], batch.labels[:left], mask)

    def _begin(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self._running = self.active(trainer)
        if self._running:
            self.start(trainer, module, stage)

    def _step(self, trainer: pl.Trainer, module: pl.LightningModule, values: Any, index: int) -> None:
        if not self._running:
            return
        loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        batch = self._wanted(trainer, as_batch(values), index, loaders)
        if batch is not None and len(batch.images):
            self.measure(trainer, module, batch, index)

    def _end(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if self._running:
            self.publish(trainer, module, stage)
        self._running = False

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin, if this epoch is measured."""
        self._begin(trainer, pl_module, "val")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure a batch."""
        self._step(trainer, pl_module, batch, batch_idx)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publish."""
        self._end(trainer, pl_module, "val")

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin."""
        self._begin(trainer, pl_module, "test")

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure a batch."""
        self._step(trainer, pl_module, batch, batch_idx)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publish."""
        self._end(trainer, pl_module, "test")


def log(module: pl.LightningModule, values: dict[str, Tensor | float], prog_bar: bool = False) -> None:
    """Log numbers that are the same on every rank, so that checkpoints and early stopping see them on each.

    Under its float64 the metrics' promise (the same number on any number of ranks) would be lost in rounding.
    """
    for name, value in values.items():
        module.log(name, torch.as_tensor(value, dtype=torch.float64), prog_bar=prog_bar, rank_zero_only=False)


def attack_mask(module: pl.LightningModule, batch: Batch, pixels: str | None = None) -> Tensor | None:
    """Where an attack may change the images of a batch.

    Args:
        module: says it as ``attack_pixels``, "foreground" or "image"; one that does not sees the image.
        batch: as the module was given it.
        pixels: in place of the module's.

    Returns:
        The batch's mask, or ``None``: everywhere.

    Raises:
        UserError: for the foreground of a batch that has no masks.
    """
    if (pixels or getattr(module, "attack_pixels", "image")) == "image":
        return None
    if batch.mask is None:
        raise UserError(
            "an attack is to keep to the foreground, and the data gives no masks: batches must be (images, labels, "
            "mask), or let it change the image"
        )
    return batch.mask


def as_presented(trainer: pl.Trainer, module: pl.LightningModule, batch: Batch) -> Batch:
    """Images that were not loaded by the Trainer, on the device and as the module wants them.

    A :class:`~lightning_robust.modules.ForegroundClassifier` cuts them out on their way.
    """
    values = tuple(part for part in batch if part is not None)
    return as_batch(trainer.strategy.batch_to_device(values, module.device, 0))


def run_folder(trainer: pl.Trainer) -> Path | None:
    """The run's folder on rank zero; ``None`` on other ranks and where the trainer keeps no run (``fast_dev_run``)."""
    if not trainer.is_global_zero:
        return None
    for logger in trainer.loggers:
        if isinstance(logger, RunLogger):
            return logger.folder
    own = [folder for logger in trainer.loggers if (folder := getattr(logger, "log_dir", None))]
    return Path(own[0]) if own else None


def num_classes(module: pl.LightningModule) -> int:
    """How many classes a module has.

    Raises:
        UserError: for a module that does not say.
    """
    count = getattr(module, "num_classes", None)
    if not isinstance(count, int):
        raise UserError(f"{type(module).__name__} has no attribute num_classes, which the callbacks count by: add it")
    return count


def image_size(module: pl.LightningModule) -> tuple[int, int]:
    """Height and width of a module's images.

    Raises:
        UserError: for a module that does not say.
    """
    shape = getattr(module, "image_shape", None)
    if not isinstance(shape, tuple) or len(shape) != 3:
        raise UserError(
            f"{type(module).__name__} has no attribute image_shape = (C, H, W), which the callbacks measure by: add it"
        )
    return int(shape[1]), int(shape[2])


def file_name(trainer: pl.Trainer, name: str, stage: str) -> str:
    """What a result is called: with its stage, and while fitting with the epoch."""
    name = name.replace("/", "_")
    epoch = f"_epoch{trainer.current_epoch:03d}" if trainer.state.fn == "fit" else ""
    return f"{name}_{stage}{epoch}"


def publish_figure(trainer: pl.Trainer, name: str, stage: str, figure: Figure) -> Path | None:
    """Write ``figures/<name>.png`` and show it in W&B; rank zero only."""
    folder = run_folder(trainer)
    if folder is None:
        return None
    path = folder / "figures" / f"{file_name(trainer, name, stage)}.png"
    save_figure(figure, path)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(f"{stage}/{name}", [to_uint8_image(figure)])
    return path


def publish_table(trainer: pl.Trainer, name: str, stage: str, rows: list[dict[str, Any]]) -> Path | None:
    """Write ``tables/<name>.csv`` and show it in W&B; rank zero only."""
    folder = run_folder(trainer)
    if folder is None or not rows:
        return None
    path = folder / "tables" / f"{file_name(trainer, name, stage)}.csv"
    write_csv(path, rows)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            columns = list(rows[0])
            logger.log_table(f"{stage}/{name}", columns=columns, data=[[row.get(c) for c in columns] for row in rows])
    return path


def publish_images(
    trainer: pl.Trainer, name: str, stage: str, pictures: dict[str, np.ndarray], columns: dict[str, list[Any]]
) -> None:
    """Show a table with pictures in W&B; rank zero only, and nowhere else: a run's folder has the figure of them.

    Args:
        trainer: the one that runs.
        name: of the table.
        stage: "val" or "test".
        pictures: column to ``(N, C, H, W)`` uint8 with one or three channels. W&B shows floats in [0, 1] as black.
        columns: further columns, N values each.
    """
    if run_folder(trainer) is None:
        return
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            drawn = [
                [wandb.Image(image.transpose(1, 2, 0).squeeze(), file_type="png") for image in images]
                for images in pictures.values()
            ]
            rows = [list(row) for row in zip(*drawn, *columns.values(), strict=True)]
            logger.log_table(f"{stage}/{name}", columns=[*pictures, *columns], data=rows)


def budget(threat_model: ThreatModel) -> str:
    """Norm and ε for a title; of the largest change in 255ths, where it is a whole number of them."""
    if not threat_model.bounded:
        return f"smallest {threat_model.norm}"
    eps = threat_model.radius
    if threat_model.norm == "l0":
        return f"{eps:g} pixel" + "s" * (eps != 1)
    steps = round(eps * 255)
    whole = threat_model.norm == "linf" and abs(eps * 255 - steps) < 1e-6
    return f"{threat_model.norm} ε = " + (f"{steps}/255" if whole else f"{eps:.4g}")


def publish_array(trainer: pl.Trainer, name: str, stage: str, values: Tensor) -> Path | None:
    """Write ``tables/<name>.npy``; rank zero only."""
    folder = run_folder(trainer)
    if folder is None:
        return None
    path = folder / "tables" / f"{file_name(trainer, name, stage)}.npy"
    with atomic_file(path) as temporary:
        np.save(temporary, values.cpu().numpy())
    return path


def refuse_same_name(trainer: pl.Trainer, callback: pl.Callback, name: str) -> None:
    """Two callbacks of one class that log and write under one name would overwrite each other.

    Raises:
        UserError: if there is another one.
    """
    others = [other for other in trainer.callbacks if type(other) is type(callback) and other is not callback]  # type: ignore[attr-defined]
    if any(getattr(other, "name", None) == name for other in others):
        raise UserError(
            f"{type(callback).__name__}: two of them log under the name {name!r}: give one of them another name"
        )


def class_names(trainer: pl.Trainer, module: pl.LightningModule) -> list[str]:
    """The data's class names, or numbers."""
    names = getattr(getattr(trainer, "datamodule", None), "class_names", None)
    count = int(getattr(module, "num_classes", 0)) or len(names or ())
    return list(names) if names and len(names) == count else [str(number) for number in range(count)]

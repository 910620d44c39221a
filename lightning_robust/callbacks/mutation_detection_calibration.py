"""Getting the detectors of a study ready: calibrated on validation images, for the weights as they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import pytorch_lightning as pl
from torch import Tensor

from lightning_robust.batch import Batch
from lightning_robust.callbacks.attack_progress import AttackProgress
from lightning_robust.callbacks.measurement import as_presented, run_folder
from lightning_robust.detectors import MutationTestingDetector
from lightning_robust.errors import UserError


def require_validation_images(trainer: pl.Trainer) -> None:
    """Refuse data that no detector can be calibrated on, before anything runs.

    Raises:
        UserError: naming the mend.
    """
    data = getattr(trainer, "datamodule", None)
    if not hasattr(data, "dataset") or not getattr(data, "has_val", False):
        raise UserError(
            "MutationDetection calibrates its detectors on validation images, and there are none: give a data module "
            "of this package training or validation files and a val_size, or detectors that are calibrated already"
        )


def calibrate_detectors(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    detectors: Mapping[str, MutationTestingDetector],
    given: Collection[str],
    count: int | None,
    progress: AttackProgress | None,
) -> None:
    """Calibrate the detectors, and write them to ``<run>/detectors/<name>.pt``; every rank comes to the same.

    Args:
        trainer: which has the data.
        module: whose weights they are calibrated for.
        detectors: by name.
        given: names of those that were calibrated before, and are used as they are.
        count: validation images; ``None``: all.
        progress: told which is calibrated.

    Raises:
        UserError: for one that was calibrated for another model, and what ``calibrate`` refuses.
    """
    found: tuple[Tensor, Tensor] | None = None
    for name, detector in detectors.items():
        if name in given:
            detector.require(module)
            continue
        if found is None:
            found = _validation_images(trainer, module, count)
        if progress:
            progress.reporter(f"calibrating {name}")(1, 1)
        detector.calibrate(module, *found)
    folder = run_folder(trainer)
    if folder is not None and not getattr(trainer, "fast_dev_run", False):
        for name, detector in detectors.items():
            detector.save(folder / "detectors" / f"{name}.pt")


def _validation_images(trainer: pl.Trainer, module: pl.LightningModule, count: int | None) -> tuple[Tensor, Tensor]:
    dataset = trainer.datamodule.dataset("val")  # type: ignore[attr-defined]
    count = len(dataset) if count is None else min(count, len(dataset))
    # spread over the data: some sets are sorted by class
    samples = dataset.__getitems__(np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist())
    batch = as_presented(trainer, module, Batch(samples.images, samples.labels, samples.masks))
    return batch.images.to(module.dtype), batch.labels

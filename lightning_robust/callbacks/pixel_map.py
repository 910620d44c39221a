"""The mean |∇x| map where it is needed before the images are: measured ahead, or read from a file."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_robust.batch import as_batch
from lightning_robust.callbacks.attack_progress import AttackProgress
from lightning_robust.callbacks.first_images import evaluation_loaders
from lightning_robust.callbacks.measurement import image_size
from lightning_robust.errors import UserError
from lightning_robust.metrics import InputGradient, input_gradient


def measured_map(trainer: pl.Trainer, module: pl.LightningModule, who: str) -> Tensor:
    """Go through the images of the evaluation that is about to begin, once, for their mean |∇x|.

    To be called on every rank: each goes through its own images, and all get the map of all.

    Args:
        trainer: the one that runs.
        module: whose loss it is.
        who: asks, for the line that says so.

    Returns:
        ``(H, W)`` float64.
    """
    metric = InputGradient(image_size(module)).to(module.device)
    rank_zero_info(f"{who} goes through the images once for the mean |∇x| map, then attacks them")
    loaders, counts = evaluation_loaders(trainer)
    done, report = 0, _bar(trainer, sum(counts))
    for loader, count in zip(loaders, counts, strict=True):
        for index, values in enumerate(_again(loader)):
            if index >= count:
                break
            batch = as_batch(trainer.strategy.batch_to_device(values, module.device, 0))
            with torch.autocast(module.device.type, enabled=False):
                metric.update(input_gradient(module, batch.images.to(module.dtype), batch.labels))
            done += 1
            report(done)
    return metric.compute().mean


def load_map(path: str | Path, size: tuple[int, int]) -> Tensor:
    """Read a map of one value a pixel, as InputGradientMap writes it.

    Args:
        path: ``.npy``.
        size: (height, width) that it must have.

    Returns:
        ``(H, W)`` float64.

    Raises:
        UserError: for a file that cannot be read, and a map of another size or with values that are not finite.
    """
    path = Path(path)
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"the map {path} cannot be read: {error}; give the .npy that InputGradientMap wrote") from None
    if not isinstance(values, np.ndarray) or values.shape != size or values.dtype.kind not in "iuf":
        shape = getattr(values, "shape", None)
        raise UserError(
            f"the map {path} has shape {shape}, and the images have {size[0]}×{size[1]} pixels: bring it to {size}"
        )
    if not np.isfinite(values).all():
        raise UserError(f"the map {path} holds NaN or infinity: its pixels have no order")
    return torch.from_numpy(values.astype(np.float64))


def _again(loader: Iterable[Any]) -> Iterable[Any]:
    """The same batches from workers of their own: Lightning has begun to read from those of the loader itself."""
    if not isinstance(loader, DataLoader):
        return loader
    mine = copy.copy(loader)
    mine._iterator = None
    return mine


def _bar(trainer: pl.Trainer, total: float) -> Callable[[int], None]:
    """A bar of its own: that of the evaluation begins with its first batch."""
    bar = AttackProgress.of(trainer)
    if bar is None or bar.progress is None:
        return lambda done: None
    progress = bar.progress
    task = progress.add_task("Mean |∇x| map", total=total)

    def report(done: int) -> None:
        progress.update(task, completed=done, visible=done < total)
        bar.refresh()

    return report

"""The predictions of a run, in the order of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning.callbacks import BasePredictionWriter
from torch import Tensor

from lightning_robust.callbacks.measurement import run_folder
from lightning_robust.report import write_csv

_COLUMNS = ("label", "predicted", "confidence")


class PredictionWriter(BasePredictionWriter):
    """Writes ``tables/predictions.csv`` after ``predict``: index, label, predicted, confidence of every image.

    Further columns of the predictions, such as those of
    :class:`~lightning_robust.callbacks.DetectAdversarial`, follow.

    The index is the image's place in the data; rows stand in its order on any number of devices.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Gather all ranks' rows, sort them and write them.

        Args:
            trainer: knows the run's folder.
            pl_module: not used.
            predictions: what ``predict_step`` gave for each batch of this rank.
            batch_indices: for each data loader each batch's places in the data.
        """
        places = [batch for loader in batch_indices for batch in loader]
        rows = [row for batch, indices in zip(predictions, places, strict=True) for row in _rows(batch, indices)]
        if dist.is_available() and dist.is_initialized():
            gathered: list[list[dict[str, Any]]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(gathered, rows)
            rows = [row for part in gathered for row in part]
        folder = run_folder(trainer)
        if folder is None:
            return
        path = folder / "tables" / "predictions.csv"
        write_csv(path, sorted(rows, key=lambda row: row["index"]))
        print(f"Predictions: {path}")


def _rows(batch: dict[str, Tensor], indices: Sequence[int]) -> list[dict[str, Any]]:
    names = list(dict.fromkeys((*_COLUMNS, *batch)))
    columns = [batch[name].tolist() for name in names]
    return [
        {"index": index, **dict(zip(names, values, strict=True))}
        for index, *values in zip(indices, *columns, strict=True)
    ]

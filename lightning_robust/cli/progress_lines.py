"""Progress for a log file: one line an epoch."""

from __future__ import annotations

import time

import pytorch_lightning as pl


class ProgressLines(pl.Callback):
    """Prints an epoch's numbers as one line, where there is no terminal to draw a bar on."""

    def __init__(self) -> None:
        self._epoch: int | None = None
        self._started = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the epoch before."""
        self._print(trainer)
        self._epoch, self._started = trainer.current_epoch, time.monotonic()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the last epoch."""
        self._print(trainer)

    def _print(self, trainer: pl.Trainer) -> None:
        # not in on_train_epoch_end: the module logs the epoch's loss only after its callbacks were called there
        if self._epoch is None or not trainer.is_global_zero:
            return
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name}
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if "success_rate" not in name)
        last = f"/{trainer.max_epochs - 1}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        print(f"epoch {self._epoch}{last}  {shown}  ({time.monotonic() - self._started:.1f} s)", flush=True)
        self._epoch = None

"""Lightning's Trainer with one more command."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_robust.cli.messages import report, spoken, users_mistake


class Trainer(pl.Trainer):
    """Lightning's Trainer; :meth:`train` leads from data to the table of results."""

    def train(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Fit, then test the best checkpoint.

        Args:
            model: what to train.
            datamodule: its data.
            ckpt_path: a checkpoint to go on from; "last" for the newest one.
            weights_only: load checkpoints without running any code in them.
        """
        self.fit(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=weights_only)
        # Without a checkpoint (fast_dev_run, checkpointing off) the weights in memory are all there is.
        callback = self.checkpoint_callback
        kept = isinstance(callback, ModelCheckpoint) and bool(callback.best_model_path)
        return self.test(
            model, datamodule=datamodule, ckpt_path="best" if kept else None, verbose=False, weights_only=weights_only
        )

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """Run on this rank; what the user did wrong is said by the rank that knows it.

        The others then lose their connection to it. Which of the ranks' exceptions reaches the main process is a race,
        so those that only tell of the lost connection are left out.
        """
        try:
            return super()._run(*args, **kwargs)
        except Exception as error:
            if self.world_size > 1:
                mistake = users_mistake(error)
                if mistake is not None:
                    report(mistake)
                elif spoken():
                    raise SystemExit(2) from None
            raise

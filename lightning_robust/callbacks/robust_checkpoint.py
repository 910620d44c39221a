"""The best checkpoint, judged by what the objective is after."""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_robust.callbacks.adversarial_accuracy import AdversarialAccuracy
from lightning_robust.errors import UserError


class RobustCheckpoint(ModelCheckpoint):
    """Keeps the epoch of highest validation accuracy under an attack, and the last one, whatever its accuracy.

    Adversarial training overfits: robust accuracy falls while clean accuracy still rises (Rice et al.,
    arXiv 2002.11569), so the best epoch is the most robust one. A naturally trained model has no robustness to choose
    by (its most robust epoch is the one that has learnt least): there clean accuracy decides.

    Args:
        attack: name of the attack of :class:`~lightning_robust.callbacks.AdversarialAccuracy` that decides.
        every_n_epochs: a multiple of that callback's, so that there is a number to decide by.
    """

    def __init__(self, attack: str, every_n_epochs: int = 1) -> None:
        self.attack = attack
        super().__init__(
            filename="best-{epoch}",
            monitor=f"val/robust_acc/{attack}",
            mode="max",
            save_last=True,
            every_n_epochs=every_n_epochs,
            enable_version_counter=False,
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let clean accuracy decide where nothing trains against an attack.

        Raises:
            UserError: if no callback measures what is to decide, or not in the epochs of this one.
        """
        objective = getattr(pl_module, "objective", None)
        if objective is not None and objective.attack is None:
            self.monitor = "val/acc"
        elif stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._require_measurement(trainer)
        super().setup(trainer, pl_module, stage)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the epoch if it is the best, and as ``last.ckpt`` in any case.

        Lightning's ``save_last`` writes ``last.ckpt`` only together with a new best one, so that a run would be resumed
        from its best epoch.
        """
        super().on_train_epoch_end(trainer, pl_module)
        if not self._should_skip_saving_checkpoint(trainer):  # which it is when this step is saved already
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing in a ``fast_dev_run``, in which Lightning would write ``last.ckpt`` after all."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            super().on_train_end(trainer, pl_module)

    def _require_measurement(self, trainer: pl.Trainer) -> None:
        measured = {
            name: callback.every_n_epochs
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, AdversarialAccuracy) and callback.every_n_epochs > 0
            for name in callback.fit_attacks
        }
        if self.attack not in measured:
            names = f"these are measured: {', '.join(measured)}" if measured else "none is measured"
            raise UserError(
                f"RobustCheckpoint: no AdversarialAccuracy measures an attack {self.attack!r} in fit ({names}): name "
                "one of its fit_attacks"
            )
        if self._every_n_epochs % measured[self.attack]:
            raise UserError(
                f"RobustCheckpoint: every_n_epochs={self._every_n_epochs}, but {self.attack!r} is measured every "
                f"{measured[self.attack]} epochs: give a multiple of it"
            )

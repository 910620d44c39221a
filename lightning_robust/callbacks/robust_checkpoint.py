"""The best checkpoint and the end of training, judged by what the objective is after."""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

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
        if not _trains_against_an_attack(pl_module):
            self.monitor = "val/acc"
        elif stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            every = _measured_every(trainer, self)
            if self._every_n_epochs % every:
                raise UserError(
                    f"RobustCheckpoint: every_n_epochs={self._every_n_epochs}, but {self.attack!r} is measured every "
                    f"{every} epochs: give a multiple of it"
                )
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


class RobustEarlyStopping(EarlyStopping):
    """Ends a ``fit`` whose validation accuracy under an attack no longer rises, as ``RobustCheckpoint`` judges it.

    Where nothing trains against an attack, clean accuracy decides. Only epochs in which the attack runs count.

    Args:
        attack: name of the attack of :class:`~lightning_robust.callbacks.AdversarialAccuracy` that decides.
        patience: so many measurements without a better one end the run. Before the learning rate first falls, robust
            accuracy stands still for long: give it more than that.
        min_delta: what a measurement has to be above the best one to be better, as a share.
    """

    def __init__(self, attack: str, patience: int, min_delta: float = 0.0) -> None:
        if patience < 1:
            raise UserError(f"RobustEarlyStopping: patience={patience}: at least one measurement")
        self.attack = attack
        self._every = 1
        super().__init__(
            monitor=f"val/robust_acc/{attack}",
            mode="max",
            patience=patience,
            min_delta=min_delta,
            check_on_train_epoch_end=False,
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let clean accuracy decide where nothing trains against an attack.

        Raises:
            UserError: if no callback measures what is to decide.
        """
        if not _trains_against_an_attack(pl_module):
            self.monitor = "val/acc"
        elif stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._every = _measured_every(trainer, self)
        super().setup(trainer, pl_module, stage)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look whether it rises, where it was measured."""
        if (trainer.current_epoch + 1) % self._every == 0:
            super().on_validation_end(trainer, pl_module)


def _trains_against_an_attack(module: pl.LightningModule) -> bool:
    objective = getattr(module, "objective", None)
    return objective is None or objective.attack is not None


def _measured_every(trainer: pl.Trainer, callback: RobustCheckpoint | RobustEarlyStopping) -> int:
    """After how many epochs the callback's attack runs.

    Raises:
        UserError: if it does not.
    """
    measured = {
        name: other.every_n_epochs
        for other in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(other, AdversarialAccuracy) and other.every_n_epochs > 0
        for name in other.fit_attacks
    }
    if callback.attack not in measured:
        names = f"these are measured: {', '.join(measured)}" if measured else "none is measured"
        raise UserError(
            f"{type(callback).__name__}: no AdversarialAccuracy measures an attack {callback.attack!r} in fit "
            f"({names}): name one of its fit_attacks"
        )
    return measured[callback.attack]

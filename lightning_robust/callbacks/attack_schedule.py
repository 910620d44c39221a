"""The training attack's budget over the epochs."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from lightning_robust.callbacks.measurement import log
from lightning_robust.errors import UserError
from lightning_robust.objectives import Objective


class AttackSchedule(pl.Callback):
    """Lets the budget ε of the training attack rise from a small one to the full one.

    A warm-up of ε helps large budgets and transformers to train at all (Debenedetti et al., arXiv 2209.07399). ε and
    the step size rise together, step by step, as a function of the optimizer steps taken, so a resumed run goes on
    where it was. Evaluation attacks with its own budgets. Logs ``train/eps``, which the progress bar shows.

    Args:
        warmup_epochs: epochs over which ε rises to the objective's own.
        start: share of ε to start from, in (0, 1].
    """

    def __init__(self, warmup_epochs: float = 5.0, start: float = 0.1) -> None:
        if warmup_epochs <= 0 or not 0 < start <= 1:
            raise UserError(
                f"AttackSchedule: warmup_epochs={warmup_epochs} must be over 0 and start={start} a share in (0, 1]"
            )
        self.warmup_epochs, self.start = warmup_epochs, start
        self._full: Objective | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the full budget.

        Raises:
            UserError: if the objective attacks nothing.
        """
        objective = getattr(pl_module, "objective", None)
        if not isinstance(objective, Objective) or objective.attack is None:
            raise UserError("AttackSchedule: the objective trains on clean images, so there is no budget to raise")
        self._full = objective

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the budget of this step."""
        assert self._full is not None
        steps = self.warmup_epochs * trainer.num_training_batches / trainer.accumulate_grad_batches
        through = min(1.0, trainer.global_step / max(steps, 1.0))
        share = self.start + (1 - self.start) * through
        _set(pl_module, self._full if share == 1 else self._full.with_budget(share))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the budget that the epoch ended with."""
        objective = pl_module.objective
        assert isinstance(objective, Objective)
        assert objective.threat_model is not None
        log(pl_module, {"train/eps": objective.threat_model.radius}, prog_bar=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the objective as it was given."""
        if self._full is not None:
            _set(pl_module, self._full)
            self._full = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The same after a run that ended early."""
        self.on_train_end(trainer, pl_module)


def _set(module: pl.LightningModule, objective: Objective) -> None:
    module.objective = objective  # type: ignore[assignment]

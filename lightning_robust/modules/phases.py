"""Training one network after another in a single fit of Lightning's trainer."""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping, StochasticWeightAveraging, WeightAveraging
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.utilities.types import LRSchedulerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_robust.errors import UserError

_ALONE = "train the teacher in a run of its own and give its checkpoint as --model.teacher"


def require_phases(trainer: pl.Trainer, first_epochs: int) -> None:
    """Refuse what cannot go through two phases, before the first one is trained.

    Args:
        trainer: the one that is about to fit.
        first_epochs: of the first phase, the teacher's.

    Raises:
        UserError: naming it.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise UserError(
            f"a teacher and a student in one run need one device or DDP, not {type(strategy).__name__}: {_ALONE}"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise UserError(
                f"{type(callback).__name__} would average over the teacher's epochs, while the student rests: {_ALONE}"
            )
        if isinstance(callback, EarlyStopping) and callback.patience <= first_epochs:
            raise UserError(
                f"EarlyStopping with patience={callback.patience} would end the run before the student is trained, who "
                f"rests for teacher_epochs={first_epochs}: give a larger patience, or {_ALONE}"
            )
    last = trainer.max_epochs
    if not trainer.fast_dev_run and last is not None and 0 <= last <= first_epochs:  # type: ignore[attr-defined]
        raise UserError(
            f"teacher_epochs={first_epochs} of max_epochs={last} leave the student none: raise --trainer.max_epochs, "
            "which counts both phases"
        )


def begin_phase(module: pl.LightningModule, optimizer: Optimizer, schedule: LambdaLR) -> None:
    """Go on with another optimizer and schedule, for what asks for gradients now.

    Args:
        module: the one that is being fitted, at an epoch's start.
        optimizer: of its parameters.
        schedule: stepped once an optimizer step.
    """
    strategy = module.trainer.strategy
    strategy.optimizers = [optimizer]
    strategy.lr_scheduler_configs = [LRSchedulerConfig(schedule, interval="step")]
    if isinstance(strategy, DDPStrategy):
        # which gradients are summed over the ranks is settled when a module is wrapped
        strategy.model = module
        strategy.configure_ddp()

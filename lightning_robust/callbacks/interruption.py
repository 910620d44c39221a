"""Signals: Ctrl-C and SIGTERM end training at a point from which it can go on, and an evaluation at once."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins.environments import SLURMEnvironment
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.exceptions import SIGTERMException


class Interruption(pl.Callback):
    """Lets the running batch of a ``fit`` finish before Ctrl-C or SIGTERM ends it, so that a checkpoint can be taken.

    Half a step cannot be resumed: the batch would be left out, or stepped on twice. A second Ctrl-C stops at once and
    without a checkpoint. On several devices all stop after the same training batch, and a SIGTERM that reaches the
    first process alone, as a scheduler's may, is passed on to the others. Under SLURM with requeueing SIGTERM stays
    Lightning's, which goes by the signal before it.
    :class:`~lightning_robust.callbacks.RunResults` adds this callback at the end of the trainer's list, so that every
    other callback has seen the batch.

    An evaluation has nothing to go on from: both signals end it at once. Lightning alone looks for SIGTERM after each
    batch but the last, and a batch under attack or a study after the last one may take hours, where a scheduler kills
    after some seconds.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None  # the signal that came
        self._point: str | None = None  # where the run stopped: "training" or "validation"
        self._previous: dict[signal.Signals, Any] = {}
        self._trainer: pl.Trainer | None = None

    # -- the signals ---------------------------------------------------------------------------------------------------

    def _signalled(self, number: int, frame: Any) -> None:
        before, self.asked = self.asked, signal.Signals(number)
        if before is not None:
            # a scheduler's may come twice, to this process and by way of the first; it kills those that take too long
            if self.asked is signal.SIGINT:
                raise self._end()
            return
        self._pass_on()
        if self.asked is signal.SIGINT:  # SIGTERM comes from programs, also to the ranks beside one that failed
            sys.stderr.write("\nCtrl-C: stopping after this batch (again: at once, without a checkpoint)\n")

    def _terminated(self, number: int, frame: Any) -> None:
        self.asked = signal.Signals(number)
        self._pass_on()
        self._release()
        raise self._end()

    def _pass_on(self) -> None:
        """Tell the processes of the other devices, unless a terminal does."""
        launcher = None if self._trainer is None else self._trainer.strategy.launcher
        if launcher is not None and self.asked is signal.SIGTERM:
            launcher.kill(self.asked)

    def _end(self) -> BaseException:
        return SIGTERMException() if self.asked is signal.SIGTERM else KeyboardInterrupt()

    def _take(self, number: signal.Signals, handler: Any) -> None:
        if threading.current_thread() is threading.main_thread():  # no other one may
            self._previous[number] = signal.signal(number, handler)

    def _release(self) -> None:
        for number, handler in self._previous.items():
            if signal.getsignal(number) in (self._signalled, self._terminated):
                signal.signal(number, handler)
        self._previous.clear()
        self._trainer = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take Ctrl-C over, where it has its usual meaning, and SIGTERM."""
        self.asked, self._point, self._trainer = None, None, trainer
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._take(signal.SIGINT, self._signalled)
        environment = trainer._accelerator_connector.cluster_environment
        if not (isinstance(environment, SLURMEnvironment) and environment.auto_requeue):
            self._take(signal.SIGTERM, self._signalled)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give it back."""
        self._release()
        if self.asked is not None:
            self._stop("training")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give them back."""
        self._release()

    def _begin_evaluation(self, trainer: pl.Trainer) -> None:
        if trainer.state.fn != "fit":
            self._trainer = trainer
            self._take(signal.SIGTERM, self._terminated)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take SIGTERM over, unless this is the validation of a fit."""
        self._begin_evaluation(trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take SIGTERM over."""
        self._begin_evaluation(trainer)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take SIGTERM over."""
        self._begin_evaluation(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give them back."""
        self._release()

    # -- the points ----------------------------------------------------------------------------------------------------

    def _stop(self, point: str) -> None:
        self._point = point
        raise self._end()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after a batch; after the last one of an epoch only once its validation has begun.

        From a checkpoint between the two Lightning would go on without the validation.
        """
        if batch_idx + 1 == trainer.num_training_batches:
            return
        asked = self.asked is not None
        if trainer.world_size > 1:  # the signal reaches one rank before the other
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
            if asked and trainer.strategy.reduce_boolean_decision(self.asked is signal.SIGTERM, all=False):
                self.asked = signal.SIGTERM
        if asked:
            self._stop("training")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop after a batch. Ranks have different numbers of them: each stops by itself."""
        if self.asked is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._stop("validation")

    # -- the checkpoint ------------------------------------------------------------------------------------------------

    def save(self, trainer: pl.Trainer, path: Any) -> bool:
        """Save a checkpoint to go on from, if the run stopped where that can be done; to be called on every rank.

        Args:
            trainer: the one that was interrupted.
            path: the file, which rank zero writes.

        Returns:
            Whether there is one.
        """
        if self._point is None:
            return False
        if self._point == "training":
            trainer.save_checkpoint(path, weights_only=False)
            return True
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging):  # while it validates, the weights are the averaged ones
                callback.on_validation_epoch_end(trainer, trainer.lightning_module)
        if trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy):
            return False  # a sharded state needs all ranks, and they are at different places
        if trainer.is_global_zero:
            # not save_checkpoint, which waits for the other ranks
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            _validate_again(checkpoint)
            trainer.strategy.save_checkpoint(checkpoint, path)
        return True


def _validate_again(checkpoint: dict[str, Any]) -> None:
    """Let a resumed run begin its validation anew.

    Lightning would evaluate as many batches less as were done, counted from the first, and the metrics would lack them.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    progress["current"] = dict.fromkeys(progress["current"], 0)
    # begun, and not a batch of it done: what Lightning takes for a validation to be gone on with
    progress["total"] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    progress["is_last_batch"] = False

"""Stops a training that has become NaN, before it spoils the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_robust.batch import as_batch
from lightning_robust.callbacks.measurement import run_folder
from lightning_robust.errors import UserError


class NonFiniteGuard(pl.Callback):
    """Stops at a loss or gradient that is NaN or infinite, with the batch saved and the weights as they were before it.

    The check comes before the optimizer's step, so the last checkpoint and the weights in memory are good. Ranks
    decide together: what is not finite on one stops all of them. The rank that saw it writes its batch into the run's
    folder as ``non_finite_batch_rank<r>.pt`` (``{"images", "labels", "epoch", "batch"}``); where every loss is finite
    and only a gradient is not, every rank does.

    An attack in training that meets NaN stops by itself, before there is a loss: its batch is saved likewise (not with
    ``ddp_fork`` and ``ddp_spawn``, where Lightning tells callbacks of no exception).
    """

    def __init__(self) -> None:
        self._batch: Any = None
        self._pending: list[tuple[int, Tensor, Any]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Agree on the folder: only rank zero knows the run's."""
        self._folder = Path(trainer.strategy.broadcast(str(run_folder(trainer) or trainer.default_root_dir)))
        self._pending = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the batch until its step is taken."""
        self._batch, self._index = batch, batch_idx

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Remember the loss; several of them, where gradients are accumulated."""
        self._pending.append((self._index, loss.detach(), self._batch))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Check loss and gradients.

        Raises:
            UserError: when one of them is not finite.
        """
        pending, self._pending = self._pending, []
        if not pending:  # a pass without backward, as weight averaging makes it
            return
        finite = torch.stack([torch.isfinite(loss).all() for _, loss, _ in pending])
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if trainer.scaler is not None:
            # the scaler of fp16 finds and skips infinite gradients by itself: it is the loss that all must agree on
            good = bool(finite.all())
        else:
            checks = [*finite, *(torch.isfinite(norm) for norm in torch._foreach_norm(gradients))]
            good = bool(torch.stack([check.to(finite.device) for check in checks]).all())
        if trainer.world_size > 1:  # an infinite loss on one rank may leave all gradients finite
            good = trainer.strategy.reduce_boolean_decision(good)
        if good:
            return

        bad_here = not bool(finite.all())
        bad_ranks = [bad_here]
        if trainer.world_size > 1:
            told = trainer.strategy.all_gather(torch.tensor(bad_here, device=pl_module.device))
            bad_ranks = told.flatten().tolist()
        row = int((~finite).int().argmax()) if bad_here else -1
        index, loss, batch = pending[row]
        if bad_here or not any(bad_ranks):
            self._save(trainer, index, batch)
        trainer.strategy.barrier("NonFiniteGuard")  # no rank may end the run before the others have written
        first = bad_ranks.index(True) if any(bad_ranks) else trainer.global_rank
        what = "a gradient became NaN or infinite"
        if any(bad_ranks):
            what = f"the loss became {float(loss):g}" if bad_here else "the loss became NaN or infinite"
        where = f" on device {first}" if trainer.world_size > 1 else ""
        raise UserError(
            f"{what} in epoch {trainer.current_epoch}, batch {index}{where}: stopped with the weights from before it "
            f"(the last checkpoint is good); the batch is saved in {self._file(first)}. Try a lower learning rate or "
            "look at that batch"
        )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save the batch in which an attack of training met NaN, and say which it was."""
        if not getattr(exception, "non_finite", False) or not trainer.training or self._batch is None:
            return
        self._save(trainer, self._index, self._batch)
        where = f" on device {trainer.global_rank}" if trainer.world_size > 1 else ""
        exception.args = (
            f"{exception}; this was in epoch {trainer.current_epoch}, batch {self._index}{where}: the batch is saved "
            f"in {self._file(trainer.global_rank)}",
        )

    def _save(self, trainer: pl.Trainer, index: int, batch: Any) -> None:
        images, labels, mask = as_batch(batch)
        self._folder.mkdir(parents=True, exist_ok=True)
        kept = {"images": images.cpu(), "labels": labels.cpu(), "epoch": trainer.current_epoch, "batch": index}
        if mask is not None:
            kept["masks"] = mask.cpu()
        torch.save(kept, self._file(trainer.global_rank))

    def _file(self, rank: int) -> Path:
        return self._folder / f"non_finite_batch_rank{rank}.pt"

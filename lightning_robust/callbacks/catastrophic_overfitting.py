"""Stops fast adversarial training when it overfits to its one-step attack."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_robust.batch import as_batch
from lightning_robust.callbacks.measurement import attack_mask, log
from lightning_robust.errors import UserError
from lightning_robust.objectives import CatastrophicOverfitting as Detector
from lightning_robust.objectives import FastFGSM


class CatastrophicOverfitting(pl.Callback):
    """Watches PGD-5 accuracy on a training batch; when it drops, restores the weights from before and stops.

    Single-step training can lose all its robustness within an epoch while its own attack sees nothing (Wong et al.,
    arXiv 2001.03994, who stop when PGD-5 accuracy on one batch falls by more than 20 points). Logs
    ``train/pgd5_acc``. Added to every training with the FastFGSM objective unless its ``detect_overfitting`` is off.

    Args:
        every_n_batches: how often to check; by default once an epoch, on the last batch.
    """

    def __init__(self, every_n_batches: int | None = None) -> None:
        self.every_n_batches = every_n_batches
        self._detector: Detector | None = None
        self._last: float | None = None
        self._good: dict[str, Tensor] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Read budget and tolerance from the objective.

        Raises:
            UserError: for another objective than FastFGSM.
        """
        objective = getattr(pl_module, "objective", None)
        if not isinstance(objective, FastFGSM):
            raise UserError("CatastrophicOverfitting watches training with the objective FastFGSM: take it out here")
        last = self._detector.last if self._detector is not None else self._last
        self._detector = Detector(drop=objective.drop)
        self._detector.last = last
        self._attack = objective.check_attack

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The weights to go back to, if the first check already fails (a resumed run's are restored by now)."""
        self._good = _copy(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check, if it is time."""
        last = batch_idx + 1 == trainer.num_training_batches
        if not (last if self.every_n_batches is None else (batch_idx + 1) % self.every_n_batches == 0):
            return
        values = as_batch(batch)
        images, labels, _ = values
        result = self._attack.run(pl_module, images, labels, mask=attack_mask(pl_module, values), rounding=False)
        counts = torch.stack(
            [(~result.success).sum().double(), torch.tensor(float(len(labels)), device=images.device).double()]
        )
        counts = trainer.strategy.reduce(counts, reduce_op="sum")
        accuracy = float(counts[0] / counts[1])
        log(pl_module, {"train/pgd5_acc": accuracy})
        assert self._detector is not None
        if self._detector.update(accuracy):
            _network(pl_module).load_state_dict(self._good)
            rank_zero_warn(
                f"catastrophic overfitting: PGD-5 accuracy on a training batch fell to {accuracy:.1%} in epoch "
                f"{trainer.current_epoch}; the weights of the last check are restored and training stops. Lower "
                "step_size or eps, or train with PGDAdversarial"
            )
            trainer.should_stop = True
        else:
            self._good = _copy(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The last check, for a resumed run."""
        return {"last": self._detector.last if self._detector is not None else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the last check."""
        self._last = state_dict["last"]
        if self._detector is not None:
            self._detector.last = self._last


def _copy(module: pl.LightningModule) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in _network(module).state_dict().items()}


def _network(module: pl.LightningModule) -> nn.Module:
    network = module.network
    assert isinstance(network, nn.Module)
    return network

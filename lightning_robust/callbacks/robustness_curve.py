"""Robust accuracy against the budget ε."""

from __future__ import annotations

import pytorch_lightning as pl
import torch

from lightning_robust.attacks import PGD, Attack, parse_number
from lightning_robust.batch import Batch
from lightning_robust.callbacks.adversarial_accuracy import Acceleration, Search
from lightning_robust.callbacks.attack_progress import AttackProgress
from lightning_robust.callbacks.measurement import (
    Measurement,
    attack_mask,
    log,
    num_classes,
    publish_figure,
    publish_table,
    refuse_same_name,
)
from lightning_robust.errors import UserError
from lightning_robust.metrics import RobustAccuracy
from lightning_robust.report import curve


class RobustnessCurve(Measurement):
    """Robust accuracy for a row of budgets, in ``validate`` and ``test``: a table, a figure, and numbers.

    A sound evaluation falls steadily with ε and reaches 0 for a large one (arXiv 1902.06705): what does not, hides its
    gradients. Steps of the attack scale with ε unless it has a fixed step size, which is refused here.

    Args:
        eps: budgets in pixel units, numbers or fractions.
        attack: what attacks, by default PGD-20; its own ε is replaced. Its step size must be left to follow ε.
        name: logged as ``<stage>/robust_acc_curve/<name>/eps=<ε>``.
        limit_batches: on the images of the first so many batches, the same on any number of devices; ``None`` for all.
        acceleration: as in :class:`~lightning_robust.callbacks.AdversarialAccuracy`.
    """

    limits_every_stage = True

    def __init__(
        self,
        eps: list[float | str],
        attack: Attack | None = None,
        name: str = "pgd",
        limit_batches: int | None = None,
        acceleration: Acceleration = "exact",
    ) -> None:
        super().__init__(every_n_epochs=0, limit_batches=limit_batches)
        if not eps:
            raise UserError("RobustnessCurve: give at least one ε, for example [0, 2/255, 4/255, 8/255, 16/255]")
        attack = PGD(steps=20) if attack is None else attack
        if getattr(attack, "step_size", None) is not None:
            raise UserError("RobustnessCurve: leave the attack's step_size out: it has to follow ε")
        if not hasattr(attack, "eps"):
            raise UserError(f"RobustnessCurve: {type(attack).__name__} has no budget eps to vary: give one such as PGD")
        self.eps = sorted({parse_number(value) for value in eps})
        self.attacks = {value: attack.replace(eps=value) for value in self.eps if value > 0}  # at 0 there is no attack
        self.norm = attack.threat_model.norm
        self.name, self.acceleration = name, acceleration

    @property
    def state_key(self) -> str:
        """Several curves may live in one trainer."""
        return self._generate_state_key(name=self.name)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse two that would write over each other."""
        refuse_same_name(trainer, self, self.name)

    def start(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Fresh counts."""
        self._metrics = {value: RobustAccuracy(num_classes(module)).to(module.device) for value in self.eps}
        self._search = Search(self.acceleration)
        self._progress = AttackProgress.of(trainer)

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, index: int) -> None:
        """Attack a batch at each budget."""
        # hooks of callbacks run outside autocast, but a user may have entered it
        with torch.autocast(module.device.type, enabled=False):
            self._attack(module, batch)
        if self._progress:
            self._progress.done()

    def _attack(self, module: pl.LightningModule, batch: Batch) -> None:
        images, labels = batch.images.to(module.dtype), batch.labels
        with torch.no_grad():
            logits = module(images)
        clean = logits.argmax(1) == labels
        for value in self.eps:
            robust = clean
            if value > 0:
                result = self.attacks[value].run(
                    module,
                    images,
                    labels,
                    mask=attack_mask(module, batch),
                    clean_logits=logits,
                    stand_in=self._search.model(module),
                    rounding=False,
                    progress=self._progress.reporter(f"{self.name} ε={value:.3g}") if self._progress else None,
                )
                robust = clean & ~result.success
            self._metrics[value].update(labels, clean, robust)

    def publish(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Log, write and draw."""
        robust = {value: metric.compute()["robust_acc"] for value, metric in self._metrics.items()}
        log(module, {f"{stage}/robust_acc_curve/{self.name}/eps={value:.4g}": acc for value, acc in robust.items()})
        rows = [{"eps": value, "eps_times_255": value * 255, "robust_acc": float(acc)} for value, acc in robust.items()]
        publish_table(trainer, f"robust_accuracy_curve_{self.name}", stage, rows)
        if trainer.is_global_zero:
            figure = curve(
                self.eps,
                {self.name: [float(acc) for acc in robust.values()]},
                xlabel=f"ε ({self.norm}, pixel units of [0, 1])",
                ylabel="robust accuracy",
                title=f"Robust accuracy against the budget ({stage})",
            )
            publish_figure(trainer, f"robust_accuracy_curve_{self.name}", stage, figure)
        self._search = Search(self.acceleration)  # the copy of the weights is of no further use

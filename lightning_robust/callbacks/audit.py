"""The audit of the model under test, on the first images of the test set."""

from __future__ import annotations

from typing import Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_robust.attacks import ThreatModel
from lightning_robust.audit import AuditResult, BudgetName, Estimate, Share, audit, budget_of, spoken
from lightning_robust.batch import Batch
from lightning_robust.callbacks.attack_progress import AttackProgress, end_bar
from lightning_robust.callbacks.first_images import FirstImages
from lightning_robust.callbacks.measurement import (
    log,
    num_classes,
    publish_figure,
    publish_table,
    refuse_same_name,
    run_folder,
)
from lightning_robust.defenses import Defense
from lightning_robust.errors import UserError
from lightning_robust.report.audit import audit_figures, check_rows, print_audit


class Audit(FirstImages):
    """Finds out in ``test`` whether the model's robust accuracy can be trusted (:func:`lightning_robust.audit.audit`).

    Writes ``audit.json`` into the run's folder, the table ``audit``, the figures ``audit_attacks``, ``audit_eps`` and
    ``audit_landscape``, and logs ``test/audit/robust_acc`` (worst case over everything that ran),
    ``test/audit/clean_acc``, ``test/audit/trusted`` (1 or 0) and ``test/audit/flagged`` (how many checks). On several
    devices each attacks its own images, and all decide alike. In ``validate`` the names begin with ``val``. Where
    something ends it early, ``audit.json`` holds what it had found.

    Args:
        eps: budget in pixel units of [0, 1], a number or a fraction such as 8/255.
        norm: norm of the budget.
        budget: "quick" (minutes on two cores for a small network), "standard" or "full" (AutoAttack, too).
        limit_images: audit the first so many images; ``None``: as many as the budget says.
        defense: what is put around the model, which is then audited together with it.
        batch_size: images that are attacked at a time on each device.
        seed: of all random numbers.
        name: ends the names of numbers and files; several in one trainer need names of their own.

    Raises:
        UserError: for settings that make no audit.
    """

    def __init__(
        self,
        eps: float | str = "8/255",
        norm: Literal["linf", "l2", "l1"] = "linf",
        budget: BudgetName = "quick",
        limit_images: int | None = None,
        defense: Defense | None = None,
        batch_size: int = 128,
        seed: int = 0,
        name: str = "",
    ) -> None:
        numbers = budget_of(budget)
        super().__init__(numbers.images if limit_images is None else limit_images)
        threat_model = ThreatModel(norm, eps)
        if threat_model.radius == 0:
            raise UserError("Audit: eps=0 leaves nothing to audit: give a budget such as 8/255")
        if batch_size < 1:
            raise UserError(f"Audit: batch_size={batch_size}: at least one image")
        if "/" in name:
            raise UserError(f"Audit: {name!r} cannot be a name: it becomes part of logged and file names")
        self.threat_model, self.budget = threat_model, numbers
        self.defense, self.batch_size, self.seed, self.name = defense, batch_size, seed, name
        self.result: AuditResult | None = None
        self._stage = ""
        self._batches: list[tuple[Tensor, Tensor]] = []

    @property
    def state_key(self) -> str:
        """Several of them may live in one trainer."""
        return self._generate_state_key(name=self.name)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse two that would write over each other."""
        refuse_same_name(trainer, self, self.name)

    def start(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Nothing is known yet."""
        num_classes(module)
        if self.limit_images is not None and self.limit_images < trainer.world_size:
            raise UserError(
                f"Audit: limit_images={self.limit_images} on {trainer.world_size} devices: at least one image for each"
            )
        self.result, self._batches, self._stage = None, [], stage

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, index: int) -> None:
        """Keep the images: an audit decides on all of them together."""
        self._batches.append((batch.images, batch.labels))

    def publish(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Audit on every rank, log on every rank, write on rank zero."""
        batches, self._batches = self._batches, []
        images, labels = (
            torch.zeros(0, 1, 1, 1),
            torch.zeros(0, dtype=torch.int64),
        )  # a mistake, which all ranks are told
        if batches:
            images = torch.cat([images for images, _ in batches]).to(module.dtype)
            labels = torch.cat([labels for _, labels in batches])
        places = trainer.global_rank + trainer.world_size * torch.arange(len(images))
        bar = AttackProgress.of(trainer)

        def tell(expected: Estimate) -> None:
            rank_zero_info(f"Audit ({self.budget.name}): at most about {spoken(expected.total)} on this machine")

        def told(name: str, done: float) -> None:
            if bar is not None and name:
                bar.reporter(f"audit: {name}")(round(100 * done), 100)

        def keep(unfinished: AuditResult) -> None:
            folder = run_folder(trainer)
            if folder is not None:
                unfinished.write(folder, f"{self._named('audit')}.json")

        inside = getattr(module, "network", module)
        names = [type(module).__name__, str(getattr(module, "hparams", {}).get("network") or type(inside).__name__)]
        model: torch.nn.Module = module
        if self.defense is not None:
            model = self.defense.around(module)
            names.append(type(self.defense).__name__)
        # hooks of callbacks run outside autocast, but a user may have entered it
        with torch.autocast(module.device.type, enabled=False):
            result = audit(
                model,
                images,
                labels,
                eps=self.threat_model.radius,
                norm=self.threat_model.norm,
                budget=self.budget,
                seed=self.seed,
                batch_size=self.batch_size,
                share=Share(places, together=trainer.world_size > 1),
                progress=told,
                on_estimate=tell,
                on_stop=keep,
                model_name=" + ".join(names),
                data_name=type(trainer.datamodule).__name__ if getattr(trainer, "datamodule", None) else "",  # type: ignore[attr-defined]
            )
        if bar is not None:
            bar.done()
        self.result = result
        self._publish(trainer, module, stage, result)

    def _publish(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str, result: AuditResult) -> None:
        root = f"{stage}/audit{f'_{self.name}' if self.name else ''}"
        log(
            module,
            {
                f"{root}/robust_acc": result.robust_accuracy,
                f"{root}/clean_acc": result.clean_accuracy,
                f"{root}/trusted": float(result.verdict == "trusted"),
                f"{root}/flagged": float(len(result.flagged)),
            },
        )
        folder = run_folder(trainer)
        if folder is None:
            return
        plain = result.to_plain()
        result.write(folder, f"{self._named('audit')}.json")
        publish_table(trainer, self._named("audit"), stage, check_rows(plain))
        for name, figure in audit_figures(plain).items():
            publish_figure(trainer, self._named(name), stage, figure)

    def _named(self, name: str) -> str:
        return f"{name}_{self.name}" if self.name else name

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Print the verdict."""
        result, self._stage = (self.result if self._stage else None), ""
        if result is None or not trainer.is_global_zero:
            return
        end_bar(trainer, pl_module, stage)
        print_audit(result.to_plain())

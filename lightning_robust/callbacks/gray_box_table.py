"""Attacks × defenses: what a defense shows to an attacker who does not know it, and what is left if he does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_robust.attacks import JSMA, Attack
from lightning_robust.batch import Batch
from lightning_robust.callbacks import gray_box_report as report
from lightning_robust.callbacks.adversarial_accuracy import Acceleration
from lightning_robust.callbacks.attack_cost import cost_rows, warning
from lightning_robust.callbacks.attack_progress import AttackProgress, end_bar
from lightning_robust.callbacks.first_images import FirstImages
from lightning_robust.callbacks.gray_box_cost import tasks
from lightning_robust.callbacks.gray_box_report import Plan
from lightning_robust.callbacks.gray_box_run import GrayBoxRun
from lightning_robust.callbacks.gray_box_settings import FOREIGN, QUERY, check, row_name
from lightning_robust.callbacks.measurement import (
    attack_mask,
    file_name,
    log,
    publish_figure,
    publish_table,
    refuse_same_name,
    run_folder,
)
from lightning_robust.defenses import Defense
from lightning_robust.errors import UserError
from lightning_robust.models import ManipulatedNetwork
from lightning_robust.report import print_table, write_csv


class GrayBoxTable(FirstImages):
    """The accuracy of defenses under attacks that do not know of them, and under those that do (Hwang et al. 2019).

    ``defenses`` protect the classifier, ``prm_defenses`` the classifier behind its Pixel Robustness Manipulator (with
    :class:`~lightning_robust.defenses.PixelShift` that is the paper's PRM + shift). In ``validate`` and ``test``, for
    each attack and defense:

    * ``transfer-from-base``: adversarial images of the classifier alone, shown to every defense. One gray-box reading
      of the paper: the attacker knows the classifier and nothing else.
    * ``prm-known-shift-unknown``: adversarial images of the classifier behind the manipulator, without a shift, shown
      to the ``prm_defenses``: the other reading.
    * ``white-box``: the attack on the defense as it is, drawing as it does, whose gradient goes through (or around)
      what it does.
    * ``adaptive``: the attack by :class:`~lightning_robust.attacks.EOT` over what the defense draws: at each step
      gradients, or the queries of a gradient-free attack, are averaged (the one-pixel attack then goes on until it is
      confident). An image is right where it also was in the white-box attack, which this attacker has, too. Of a
      defense that draws nothing it is that attack alone. ``further_adaptive`` attacks stand in rows of their own;
      OptMargin brings a neighbourhood itself, so it runs on the network inside, and the defense judges what comes of
      it.

    Accuracy is the share of images that the defense classifies rightly; of a defense that draws, with other draws than
    those that the attack met. ``worst_case`` counts an image as right where it is under every attack of the reading
    that has a budget. The rows "none" and "prm" are the classifier alone and behind its manipulator, without defense.
    A row's defense rates are 1 - (clean - defended) / (clean - attacked), as the paper's code has it
    (:func:`~lightning_robust.metrics.defense_rate`); where the attack took nothing they are not defined.

    A row **falls** where the adaptive attack leaves less than half of what the better of the gray-box readings left
    (a ``further_adaptive`` attack is held against their worst case): what the defense had shown, it owed to the
    attacker's ignorance. An attack without a budget is marked nowhere, since it wins against any usual network in the
    end: give CW and DeepFool an ``eps``.

    Logs ``<stage>/gray_box/<reading>/<defense>/<attack>``, ``<stage>/white_box/<defense>/<attack>``,
    ``<stage>/adaptive/<defense>/<attack>``, ``<stage>/gray_box/clean/<defense>`` and, where something was adaptive,
    ``<stage>/gray_box/falls/<defense>`` (1 or 0). Writes ``tables/gray_box_<stage>.csv`` and a figure. What is counted
    so far is kept in ``tables/gray_box_<stage>_partial.csv`` after each batch, and when a run is stopped: of the images
    of rank zero.

    Before it starts it prints an upper bound of the cost, from the attacks' settings and the time of one pass here, and
    warns where that is more than a day.

    Args:
        attacks: name to attack.
        defenses: name to defense, without a model; what draws needs a seed.
        prm_defenses: the same for the classifier behind its manipulator.
        white_box: attacks that run on the defenses as they are; by default those that go by gradients, but JSMA: each
            query of the others is a whole verdict, with all its votes, where the adaptive form asks for single draws.
        adaptive: attacks that run on them adapted; by default all but those of another library and ``Transfer``.
        eot_samples: draws that EOT averages over at each step; 30 in the published breaks, 8 are all shifts.
        further_adaptive: defense to another attack on it, for example OptMargin for a region vote; its row is called
            as its class.
        base: the network that the ``transfer-from-base`` attacker knows; by default the module's classifier. Give the
            original one, where the classifier was tuned behind its manipulator.
        limit_images: on the first so many images, the same on any number of devices; ``None``: all.
        acceleration: as in :class:`~lightning_robust.callbacks.AdversarialAccuracy`, for the gray-box attacks.
        name: ends the logged names' first part, and the names of table and figure; several in one trainer need names of
            their own.

    Raises:
        UserError: for names and settings that make no table.
    """

    def __init__(
        self,
        attacks: dict[str, Attack],
        defenses: dict[str, Defense] | None = None,
        prm_defenses: dict[str, Defense] | None = None,
        white_box: list[str] | None = None,
        adaptive: list[str] | None = None,
        eot_samples: int = 30,
        further_adaptive: dict[str, Attack] | None = None,
        base: nn.Module | None = None,
        limit_images: int | None = 200,
        acceleration: Acceleration = "exact",
        name: str = "",
    ) -> None:
        super().__init__(limit_images)
        self.attacks, self.base, self.name = dict(attacks), base, name
        self.defenses, self.prm_defenses = dict(defenses or {}), dict(prm_defenses or {})
        by_gradients = [label for label, attack in attacks.items() if not isinstance(attack, (*QUERY, JSMA))]
        ours = [label for label, attack in attacks.items() if not isinstance(attack, FOREIGN)]
        self.white_box = by_gradients if white_box is None else list(white_box)
        self.adaptive = ours if adaptive is None else list(adaptive)
        self.eot_samples, self.acceleration = eot_samples, acceleration
        self.further_adaptive = dict(further_adaptive or {})
        check(self)
        self._rows: tuple[str, list[dict[str, Any]]] | None = None
        self._cells: GrayBoxRun | None = None

    @property
    def state_key(self) -> str:
        """Several of them may live in one trainer."""
        return self._generate_state_key(name=self.name)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse two that would write over each other, and manipulated defenses without a manipulator.

        Raises:
            UserError: naming the mend.
        """
        refuse_same_name(trainer, self, self.name)
        if self.prm_defenses and not isinstance(getattr(pl_module, "network", None), ManipulatedNetwork):
            raise UserError(
                f"GrayBoxTable: prm_defenses protect a classifier behind a pixel robustness manipulator, and "
                f"{type(pl_module).__name__} has none: use PRMClassifier, or name them in defenses"
            )

    def start(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Put the defenses around the networks, and say what it will cost."""
        network = getattr(module, "network", None)
        whole: nn.Module = network if isinstance(network, nn.Module) else module
        manipulated = whole if isinstance(whole, ManipulatedNetwork) else None
        base = self.base if self.base is not None else manipulated.classifier if manipulated is not None else whole
        self._plan = Plan(
            attacks=self.attacks,
            defenses=list(self.defenses),
            prm_defenses=list(self.prm_defenses),
            manipulated=manipulated is not None,
            white_box=self.white_box,
            adaptive=self.adaptive,
            further={label: {row_name(attack): attack} for label, attack in self.further_adaptive.items()},
        )
        self._cells = GrayBoxRun(
            self._plan,
            {**self.defenses, **self.prm_defenses},
            base.to(module.device).eval(),
            manipulated,
            eot_samples=self.eot_samples,
            acceleration=self.acceleration,
            device=module.device,
            progress=AttackProgress.of(trainer),
        )
        self._stage = stage
        if trainer.is_global_zero:
            self._tell_the_cost(trainer, module, self._cells)

    def _tell_the_cost(self, trainer: pl.Trainer, module: pl.LightningModule, run: GrayBoxRun) -> None:
        images = self.expected_images(trainer)
        found = tasks(self._plan, run.sources, run.protected, run.inside, self.eot_samples, module)
        if images is None:
            rank_zero_info("GrayBoxTable: the data does not say how many images it has; the cost is for one")
        print_table("What the gray-box table takes, at most", cost_rows(found, images or 1))
        beyond = warning(found, images or 1)
        if beyond is not None:
            rank_zero_warn(f"GrayBoxTable: {beyond}")

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, index: int) -> None:
        """All cells of a batch."""
        assert self._cells is not None
        # hooks of callbacks run outside autocast, but a user may have entered it
        with torch.autocast(module.device.type, enabled=False):
            self._cells.measure(batch.images.to(module.dtype), batch.labels, attack_mask(module, batch))
        if self._cells.progress:
            self._cells.progress.done()
        self._keep(trainer, self._cells)

    # -- publishing ----------------------------------------------------------------------------------------------------

    @property
    def _table(self) -> str:
        return "_".join(filter(None, ("gray_box", self.name)))

    def _partial(self, trainer: pl.Trainer) -> Path | None:
        folder = run_folder(trainer)
        return folder / "tables" / f"{file_name(trainer, self._table, self._stage)}_partial.csv" if folder else None

    def _keep(self, trainer: pl.Trainer, run: GrayBoxRun) -> Path | None:
        """Write what this process has counted so far."""
        path = self._partial(trainer)
        if path is not None:
            write_csv(path, report.rows(self._plan, run.metric.own_counts(), partial=True))
        return path

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lose nothing that was computed."""
        if not self._running or self._cells is None:
            return
        self._running = False
        path = self._keep(trainer, self._cells)
        if path is not None:
            rank_zero_info(f"GrayBoxTable: what was counted so far is in {path}")

    def publish(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Log on every rank, write and draw."""
        assert self._cells is not None
        counts = self._cells.metric.counts()
        suffix = f"_{self.name}" if self.name else ""
        values = report.logged(self._plan, counts, suffix)
        log(module, {f"{stage}/{name}": value for name, value in values.items()})
        table = report.rows(self._plan, counts)
        publish_table(trainer, self._table, stage, table)
        if trainer.is_global_zero:
            publish_figure(trainer, self._table, stage, report.draw(self._plan, table, stage))
            self._rows = stage, table
        partial = self._partial(trainer)
        if partial is not None:
            partial.unlink(missing_ok=True)
        self._cells = None  # copies of the weights, and wrappers around them, are of no further use

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Print the table."""
        rows, self._rows = self._rows, None
        if rows is None:
            return
        end_bar(trainer, pl_module, stage)
        report.print_rows(rows[1], rows[0])

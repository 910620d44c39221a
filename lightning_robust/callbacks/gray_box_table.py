"""Attacks × defenses: what a defense shows to an attacker who does not know it, and what is left if he does."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_robust.attacks import EOT, JSMA, Attack, OptMargin
from lightning_robust.attacks.base import AttackResult
from lightning_robust.attacks.randomness import mix_seed
from lightning_robust.batch import Batch
from lightning_robust.callbacks import gray_box_report as report
from lightning_robust.callbacks.adversarial_accuracy import Acceleration, Search
from lightning_robust.callbacks.attack_cost import cost_rows, warning
from lightning_robust.callbacks.attack_progress import AttackProgress
from lightning_robust.callbacks.first_images import FirstImages
from lightning_robust.callbacks.gray_box_cost import tasks
from lightning_robust.callbacks.gray_box_report import ADAPTIVE, KNOWN, NONE, PRM, TRANSFER, WHITE, WORST, Plan
from lightning_robust.callbacks.gray_box_settings import QUERY, check, row_name
from lightning_robust.callbacks.measurement import (
    file_name,
    log,
    publish_figure,
    publish_table,
    refuse_same_name,
    run_folder,
)
from lightning_robust.defenses import Defense
from lightning_robust.errors import UserError
from lightning_robust.metrics import CellAccuracy
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
    * ``adaptive``: the attack by :class:`~lightning_robust.attacks.EOT` over what the defense draws; an image is right
      where it also was in the white-box attack, which this attacker has, too. Of a defense that draws nothing it is
      that attack alone. ``further_adaptive`` attacks stand in rows of their own; OptMargin brings a
      neighbourhood itself, so it runs on the network inside, and the defense judges what comes of it.

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
        white_box: attacks that run on the defenses as they are; by default those that go by gradients, but JSMA.
        adaptive: attacks that run on them by EOT; by default the same.
        eot_samples: draws that EOT averages over at each step.
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
        self.white_box = by_gradients if white_box is None else list(white_box)
        self.adaptive = by_gradients if adaptive is None else list(adaptive)
        self.eot_samples, self.acceleration = eot_samples, acceleration
        self.further_adaptive = dict(further_adaptive or {})
        check(self)
        self._rows: tuple[str, list[dict[str, Any]]] | None = None

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
        self._sources = {NONE: base.to(module.device).eval()}
        if manipulated is not None:
            self._sources[PRM] = manipulated
        self._inside = dict.fromkeys(self.defenses, base)
        self._inside |= dict.fromkeys(self.prm_defenses, cast(nn.Module, manipulated))
        given = {**self.defenses, **self.prm_defenses}
        self._protected = {
            label: given[label].around(inside).to(module.device).eval() for label, inside in self._inside.items()
        }
        # the attack must not choose the draws by which it is judged
        self._judges: dict[str, nn.Module] = {
            label: defense.with_seed(mix_seed(cast(int, defense.seed), 1)) if defense.random else defense
            for label, defense in self._protected.items()
        }
        self._plan = Plan(
            attacks=self.attacks,
            defenses=list(self.defenses),
            prm_defenses=list(self.prm_defenses),
            manipulated=manipulated is not None,
            white_box=self.white_box,
            adaptive=self.adaptive,
            further={label: {row_name(attack): attack} for label, attack in self.further_adaptive.items()},
        )
        self._metric = CellAccuracy(self._plan.cells()).to(module.device)
        self._searches = {label: Search(self.acceleration) for label in self._sources}
        self._progress = AttackProgress.of(trainer)
        self._stage = stage
        if trainer.is_global_zero:
            self._tell_the_cost(trainer, module)

    def _tell_the_cost(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        images = self.expected_images(trainer)
        found = tasks(self._plan, self._sources, self._protected, self._inside, self.eot_samples, module)
        if images is None:
            rank_zero_info("GrayBoxTable: the data does not say how many images it has; the cost is for one")
        print_table("What the gray-box table takes, at most", cost_rows(found, images or 1))
        beyond = warning(found, images or 1)
        if beyond is not None:
            rank_zero_warn(f"GrayBoxTable: {beyond}")

    # -- attacking -----------------------------------------------------------------------------------------------------

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, index: int) -> None:
        """All cells of a batch: first what a defense shows, then what is left of it."""
        images, labels = batch.images.to(module.dtype), batch.labels
        self._worst: dict[tuple[str, str], Tensor] = {}
        # hooks of callbacks run outside autocast, but a user may have entered it
        with torch.autocast(module.device.type, enabled=False):
            for judge, model in {**self._sources, **self._judges}.items():
                self._metric.update(f"clean/{judge}", _right(model, images, labels))
            for name in self.attacks:
                self._gray_box(name, images, labels)
            for label in self._protected:
                self._white_box(label, images, labels)
            for (reading, judge), right in self._worst.items():
                self._metric.update(f"{reading}/{judge}/{WORST}", right)
        if self._progress:
            self._progress.done()
        self._keep(trainer)

    def _gray_box(self, name: str, images: Tensor, labels: Tensor) -> None:
        """Images made on the networks without a defense, shown to the defenses."""
        for source, network in self._sources.items():
            reading = TRANSFER if source == NONE else KNOWN
            stand_in = self._searches[source].model(network)
            attack = self.attacks[name].to_the_end()  # at one model's boundary an image fools no other
            result = self._run(attack, network, images, labels, f"{name} on {source}", stand_in)
            self._count(reading, source, name, ~result.success)
            shown = self._judges if source == NONE else {label: self._judges[label] for label in self.prm_defenses}
            if source == NONE and PRM in self._sources:
                shown = {PRM: self._sources[PRM], **shown}
            for judge, model in shown.items():
                self._count(reading, judge, name, _right(model, result.images, labels))

    def _white_box(self, label: str, images: Tensor, labels: Tensor) -> None:
        """Images made on a defense, as it is and adapted to it."""
        defense, judge = self._protected[label], self._judges[label]
        known: dict[str, Tensor] = {}
        for name in self.white_box:
            attack = self.attacks[name].to_the_end() if defense.random else self.attacks[name]
            result = self._run(attack, defense, images, labels, f"{name} on {label}")
            known[name] = _right(judge, result.images, labels)
            self._count(WHITE, label, name, known[name])
        for name in self.adaptive:
            attack = self.attacks[name]
            if defense.random:
                attack = EOT(attack=attack, samples=self.eot_samples)
            right = known.get(name, torch.ones_like(labels, dtype=torch.bool))
            if defense.random or name not in known:  # else there is nothing to average over: it is the same attack
                result = self._run(attack, defense, images, labels, f"adaptive {name} on {label}")
                right = right & _right(judge, result.images, labels)
            self._count(ADAPTIVE, label, name, right)
        for name, attack in self._plan.further.get(label, {}).items():
            model = self._inside[label] if isinstance(attack, OptMargin) else defense
            result = self._run(attack, model, images, labels, f"{name} on {label}")
            self._count(ADAPTIVE, label, name, _right(judge, result.images, labels))

    def _run(
        self,
        attack: Attack,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        what: str,
        stand_in: nn.Module | None = None,
    ) -> AttackResult:
        progress = self._progress.reporter(what) if self._progress else None
        return attack.run(model, images, labels, stand_in=stand_in, rounding=False, progress=progress)

    def _count(self, reading: str, judge: str, name: str, right: Tensor) -> None:
        self._metric.update(f"{reading}/{judge}/{name}", right)
        if name in self._plan.counts_to_worst(reading, judge):
            before = self._worst.get((reading, judge))
            self._worst[reading, judge] = right if before is None else before & right

    # -- publishing ----------------------------------------------------------------------------------------------------

    @property
    def _table(self) -> str:
        return "_".join(filter(None, ("gray_box", self.name)))

    def _partial(self, trainer: pl.Trainer) -> Path | None:
        folder = run_folder(trainer)
        return folder / "tables" / f"{file_name(trainer, self._table, self._stage)}_partial.csv" if folder else None

    def _keep(self, trainer: pl.Trainer) -> Path | None:
        """Write what this process has counted so far."""
        path = self._partial(trainer)
        if path is not None:
            write_csv(path, report.rows(self._plan, self._metric.own_counts(), partial=True))
        return path

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lose nothing that was computed."""
        if not self._running or not hasattr(self, "_metric"):
            return
        self._running = False
        path = self._keep(trainer)
        if path is not None:
            rank_zero_info(f"GrayBoxTable: what was counted so far is in {path}")

    def publish(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Log on every rank, write and draw."""
        counts = self._metric.counts()
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
        # copies of the weights, and wrappers around them, are of no further use
        self._searches, self._sources, self._protected, self._judges, self._inside = {}, {}, {}, {}, {}

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Print the table."""
        rows, self._rows = self._rows, None
        if rows is None:
            return
        bar = trainer.progress_bar_callback
        if bar is not None:  # a live bar would be drawn once more, below the table
            bar.teardown(trainer, pl_module, stage)
        report.print_rows(rows[1], rows[0])


def _right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        right: Tensor = model(images).argmax(1) == labels
    return right

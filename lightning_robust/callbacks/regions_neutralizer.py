"""Does it help to blank what is attacked and unimportant? The scores of arXiv 2011.10794, and of who knows of it."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_robust.attacks import FGSM, Attack
from lightning_robust.batch import Batch
from lightning_robust.callbacks import regions_scores as report
from lightning_robust.callbacks.attack_progress import AttackProgress, end_bar
from lightning_robust.callbacks.first_images import FirstImages
from lightning_robust.callbacks.measurement import (
    class_names,
    file_name,
    image_size,
    log,
    num_classes,
    publish_figure,
    publish_table,
    refuse_same_name,
    run_folder,
)
from lightning_robust.callbacks.regions_build import Grid, check_sources, count_regions, data_of, own_batches
from lightning_robust.callbacks.regions_directions import directions
from lightning_robust.callbacks.regions_figures import draw_blobs
from lightning_robust.callbacks.regions_published import Problem, check_problem
from lightning_robust.callbacks.regions_scores import READINGS
from lightning_robust.callbacks.regions_scoring import Scorer
from lightning_robust.callbacks.regions_tuning import Tuned, candidates, tune
from lightning_robust.defenses.neutralizer import Neutralizer, Reading
from lightning_robust.errors import UserError
from lightning_robust.metrics import CellAccuracy
from lightning_robust.regions import ActivationMap, Blobs, Threshold, save_blobs
from lightning_robust.regions.extra import require
from lightning_robust.report import atomic_file
from lightning_robust.report.regions_scores import score_figure

_ROI = (Threshold("otsu"), Threshold("relative", 0.25), Threshold("relative", 0.75))
_ROA = (Threshold("relative", 0.25), Threshold("relative", 0.75))


class NeutralizerStudy(FirstImages):
    """Blanks what is attacked and unimportant, and measures what it is worth (Chattopadhyay et al., arXiv 2011.10794).

    In ``test``, for each attack: the regions of ``build_images`` training images give each class, how often each pixel
    is attacked and unimportant (ŪV); at every δ₁, δ₂, θ and fill that is given, that gives a blob. Blobs are tried on
    ``tune_images`` validation images, and of each direction the one is taken that keeps the clean score (to within
    ``tolerance``) and is best under attack. Test images are then scored, as the paper has it and beyond:

    * ``clean`` (score_clean) and ``adv`` (score_adv): without a blob.
    * ``mod`` (score_mod): neutralised images.
    * ``write``, ``held``, ``adaptive`` (score_mod-adv): neutralised images, attacked with the same budget, by who may
      write into the blob; by who may not (it is blanked again; the paper does not say which of the two it measured);
      and by who may not and knows of the blob: an image is right where it is under "held", under the same attack by
      who knows, and under PGD by who knows (:func:`~lightning_robust.defenses.neutralizer.attack_neutralized`).

    Each with the blob of the "known" class (an oracle), of the "predicted" class, and of the "pair" (all classes' blobs
    at once). Scores are of all test images of a direction's source class, with 95 % Wilson intervals. Who knows the
    class could as well write it on the image, and some blobs do: ``leak`` is the share of the *other* classes' clean
    images that are taken for the source class once its blob is put on them. Where it is large, the known class's scores
    are worth nothing. Logged as ``test/<name>/<attack>/<direction>/…``: ``adv``, ``leak``, ``<blob>/mod``,
    ``<blob>/write``, ``<blob>/held``, ``<blob>/adaptive``, the tuned ``theta``, ``fill`` and ``blob_share``; and
    ``test/<name>/clean/<direction>``.

    Tables: the scores, with the paper's beside; all that was tried in tuning, with the choice marked; the blobs as
    ``<name>_<attack>_blobs_test.npz`` for :class:`~lightning_robust.defenses.Neutralizer`. Figures: blobs, and scores.
    Nothing is ever tuned on test images, so it does not run in ``validate``.

    Args:
        attacks: name to attack; by default FGSM at 8/255.
        activation: how importance is measured.
        roi_thresholds: δ₁ to try; one each for no tuning.
        roa_thresholds: δ₂ to try.
        thetas: θ to try, shares of the images of a class.
        fills: 0, 1 or both.
        tolerance: how much of the clean score on validation images a blob may cost.
        tune_reading: what is made best under attack: "held", "write" or "adaptive".
        build_images: training images, class-balanced; ``None``: all.
        tune_images: validation images, class-balanced; ``None``: all.
        adaptive_steps: of PGD in the adaptive reading, in the budget of the attack; 0: the attack alone.
        limit_images: test images; ``None``: all.
        published: show the paper's numbers beside, of "mnist01", "fashion", "cats_dogs" or "malaria".
        name: starts the logged names, and those of tables and figures.

    Raises:
        UserError: for settings that make no study; when it runs for data without validation images of their own, a
            class of which no training image is classified rightly, and thresholds that leave no blob.
    """

    def __init__(
        self,
        attacks: dict[str, Attack] | None = None,
        activation: ActivationMap = ActivationMap(),  # noqa: B008 - frozen
        roi_thresholds: list[Threshold] | None = None,
        roa_thresholds: list[Threshold] | None = None,
        thetas: list[float] | None = None,
        fills: list[int] | None = None,
        tolerance: float = 0.02,
        tune_reading: Reading = "held",
        build_images: int | None = 2000,
        tune_images: int | None = 200,
        adaptive_steps: int = 20,
        limit_images: int | None = None,
        published: Problem | None = None,
        name: str = "neutralizer",
    ) -> None:
        super().__init__(limit_images)
        self.attacks: dict[str, Attack] = {"fgsm": FGSM(eps="8/255")} if attacks is None else dict(attacks)
        if not self.attacks:
            raise UserError("NeutralizerStudy: name at least one attack, for example fgsm")
        for label in (name, *self.attacks):
            if not label or "/" in label:
                raise UserError(
                    f"NeutralizerStudy: {label!r} cannot be a name: it becomes part of logged and file names"
                )
        if tune_reading not in READINGS:
            raise UserError(f"NeutralizerStudy: tune_reading={tune_reading!r}: choose write, held or adaptive")
        for setting, value in (("build_images", build_images), ("tune_images", tune_images)):
            if value is not None and value < 1:
                raise UserError(f"NeutralizerStudy: {setting}={value}: at least one image, or null for all")
        if not 0 <= tolerance < 1 or adaptive_steps < 0:
            raise UserError("NeutralizerStudy: tolerance is a share of the images from 0 on, adaptive_steps 0 or more")
        shares = [0.1, 0.3, 0.5, 0.7, 0.9] if thetas is None else list(thetas)
        values = [0, 1] if fills is None else list(fills)
        if not shares or not all(0 < theta <= 1 for theta in shares):
            raise UserError(f"NeutralizerStudy: thetas={thetas}: they are shares of the images, above 0 and at most 1")
        if not values or not set(values) <= {0, 1}:
            raise UserError(f"NeutralizerStudy: fills={fills}: 0 (black), 1 (white) or both")
        self.grid = Grid(
            tuple(_ROI if roi_thresholds is None else roi_thresholds),
            tuple(_ROA if roa_thresholds is None else roa_thresholds),
            tuple(shares),
            tuple(values),
        )
        if not self.grid.roi or not self.grid.roa:
            raise UserError("NeutralizerStudy: give at least one of roi_thresholds and one of roa_thresholds")
        for attack in self.attacks.values():
            if adaptive_steps and (attack.threat_model.norm == "l0" or not attack.threat_model.bounded):
                raise UserError(
                    "NeutralizerStudy: PGD in the adaptive reading needs the attack's budget in linf, l2 or l1: give "
                    "the attack an eps, or set adaptive_steps to 0"
                )
        check_problem(published, "NeutralizerStudy")
        require("captum", "NeutralizerStudy")
        self.activation, self.tolerance, self.tune_reading = activation, tolerance, tune_reading
        self.build_images, self.tune_images, self.adaptive_steps = build_images, tune_images, adaptive_steps
        self.published, self.name = published, name
        self._rows: tuple[list[dict[str, Any]], list[dict[str, Any]]] | None = None

    @property
    def state_key(self) -> str:
        """Several of them may live in one trainer."""
        return self._generate_state_key(name=self.name)

    def active(self, trainer: pl.Trainer) -> bool:
        """In ``test`` alone."""
        return bool(trainer.testing)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse two that would write over each other, and data without validation images of their own."""
        refuse_same_name(trainer, self, self.name)
        if stage == "validate":
            rank_zero_warn("NeutralizerStudy tunes on validation images and measures in test alone: run test")
        if stage == "test":
            data_of(trainer, "NeutralizerStudy")

    # -- before the test images ----------------------------------------------------------------------------------------

    def start(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Find the blobs."""
        classes, self._size = num_classes(module), image_size(module)
        self._directions = directions(class_names(trainer, module), None, "NeutralizerStudy")
        self._progress = AttackProgress.of(trainer)
        data = data_of(trainer, "NeutralizerStudy")
        groups = torch.full((classes,), -1)
        for number, direction in enumerate(self._directions):
            groups[direction.source] = number
        check_sources(
            data,
            self._directions,
            {"train": (self.build_images, "build_images"), "val": (self.tune_images, "tune_images")},
        )
        rank_zero_info(
            f"NeutralizerStudy finds blobs in {self.build_images or 'all'} training images and tunes them on "
            f"{self.tune_images or 'all'} validation images, then measures"
        )
        self._tuned: dict[str, list[Tuned]] = {}
        # hooks of callbacks run outside autocast, but a user may have entered it
        with torch.autocast(module.device.type, enabled=False):
            frequencies, images = count_regions(
                own_batches(data, "train", self.build_images, trainer, module),
                module,
                self.attacks,
                self.activation,
                self.grid,
                groups,
                self._size,
                self._tell,
            )
            for direction, count in zip(self._directions, images.tolist(), strict=True):
                if not count:
                    raise UserError(
                        f"NeutralizerStudy: of {direction.label} no training image is classified rightly, and the "
                        "region of importance is that of the true class: train the model further, or raise build_images"
                    )
            held = list(own_batches(data, "val", self.tune_images, trainer, module))
            for name, attack in self.attacks.items():
                found = [candidates(frequencies[name], self.grid, number) for number in range(len(self._directions))]
                self._tuned[name] = tune(
                    self._directions,
                    found,
                    frequencies[name],
                    self.grid,
                    held,
                    module,
                    attack,
                    self.tune_reading,
                    self.tolerance,
                    self._tell,
                )
        self._tell(None)
        self._defenses = {name: self._protect(module, tuned) for name, tuned in self._tuned.items()}
        self._scorer = Scorer(self.attacks, self._defenses, self.adaptive_steps, self._tell)
        cells = self._scorer.cells(self._directions)
        self._metric = CellAccuracy(cells).to(module.device)
        self._examples: dict[int, Tensor] = {}
        self._publish_tuning(trainer, stage, [str(name) for name in class_names(trainer, module)])

    def _tell(self, text: str | None) -> None:
        if self._progress:
            if text is None:
                self._progress.done()
            else:
                self._progress.reporter(f"{self.name} {text}")(0, 1)

    def _protect(self, module: pl.LightningModule, tuned: list[Tuned]) -> Neutralizer:
        masks = torch.stack([found.candidate.mask for found in tuned])
        fill = torch.tensor([float(found.candidate.fill) for found in tuned], device=masks.device)
        classes = [direction.source for direction in self._directions]
        order = torch.tensor(classes, device=masks.device).argsort()
        blobs = Blobs(masks[order], fill[order])
        return Neutralizer(module, blobs=blobs).to(module.device).eval()

    def _publish_tuning(self, trainer: pl.Trainer, stage: str, names: list[str]) -> None:
        """All that was tried, and the blobs: before the test, so that they are there whatever comes."""
        rows = [{"attack": name, **row} for name, tuned in self._tuned.items() for each in tuned for row in each.rows]
        publish_table(trainer, f"{self.name}_tuning", stage, rows)
        for name, tuned in self._tuned.items():
            for direction, each in zip(self._directions, tuned, strict=True):
                if not each.kept:
                    rank_zero_warn(
                        f"NeutralizerStudy: {name}, {direction.label}: every blob costs more than "
                        f"{self.tolerance:.0%} of the clean score on validation images; the one that costs least is "
                        "taken"
                    )
        folder = run_folder(trainer)
        if folder is None:
            return
        for name, defense in self._defenses.items():
            path = folder / "tables" / f"{file_name(trainer, f'{self.name}_{name}_blobs', stage)}.npz"
            with atomic_file(path) as temporary:
                save_blobs(temporary, Blobs(defense.masks, defense.fill, tuple(names)))

    # -- test images ---------------------------------------------------------------------------------------------------

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, index: int) -> None:
        """All scores of a batch, direction by direction."""
        with torch.autocast(module.device.type, enabled=False):
            for number, direction in enumerate(self._directions):
                own = batch.labels == direction.source
                images, others = batch.images[own].to(module.dtype), batch.images[~own].to(module.dtype)
                if len(images):
                    self._examples.setdefault(number, images[0].cpu())
                self._scorer.direction(self._metric, module, direction, images, batch.labels[own], others)
        self._tell(None)

    # -- publishing ----------------------------------------------------------------------------------------------------

    def publish(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Log on every rank, write and draw."""
        counts = self._metric.counts()
        rows = report.rows(
            self.attacks,
            self._directions,
            self._tuned,
            counts,
            self.published,
        )
        values = {cell: right / images for cell, (right, images) in counts.items() if images}
        for name, tuned in self._tuned.items():
            for direction, each in zip(self._directions, tuned, strict=True):
                start = f"{name}/{direction.key}"
                values |= {
                    f"{start}/theta": each.candidate.theta,
                    f"{start}/fill": float(each.candidate.fill),
                    f"{start}/blob_share": float(each.candidate.mask.double().mean()),
                }
        log(module, {f"{stage}/{self.name}/{cell}": value for cell, value in values.items() if math.isfinite(value)})
        publish_table(trainer, self.name, stage, rows)
        if run_folder(trainer) is not None:
            draw_blobs(trainer, stage, self.name, self.attacks, self._directions, self._tuned, self._examples)
            figure = score_figure(rows, title=f"Scores with the blob of the known class ({stage}), 95 % intervals")
            publish_figure(trainer, self.name, stage, figure)
        if trainer.is_global_zero:
            self._rows = rows, report.tuned_rows(self._directions, self._tuned)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Print the tables."""
        rows, self._rows = self._rows, None
        if rows is None:
            return
        end_bar(trainer, pl_module, stage)
        report.print_rows(*rows, self.tune_reading)

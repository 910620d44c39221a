"""The one-pixel study of Su, Vargas and Sakurai (arXiv 1710.08864): every image to every class, and what it shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_robust.attacks import Attack
from lightning_robust.attacks.one_pixel import OnePixel
from lightning_robust.batch import Batch
from lightning_robust.callbacks.adversarial_accuracy import Acceleration, Search
from lightning_robust.callbacks.attack_progress import AttackProgress, end_bar
from lightning_robust.callbacks.measurement import (
    Measurement,
    attack_mask,
    budget,
    class_names,
    log,
    num_classes,
    publish_figure,
    publish_table,
    refuse_same_name,
)
from lightning_robust.callbacks.one_pixel_report import (
    examples,
    gathered,
    pairs,
    print_rates,
    published,
    rates,
    summary,
)
from lightning_robust.callbacks.one_pixel_runs import Course, Runs, all_targets, without_target
from lightning_robust.callbacks.one_pixel_unfinished import Unfinished, fingerprint
from lightning_robust.errors import UserError
from lightning_robust.loggers.run_logger import RunLogger
from lightning_robust.metrics.one_pixel import (
    AllTargetsScores,
    AllTargetsSuccess,
    NonTargetedScores,
    NonTargetedSuccess,
)
from lightning_robust.report.one_pixel import class_pairs, classes_reached, pixel_examples


class OnePixelStudy(Measurement):
    """Attacks with few pixels, in ``validate`` and ``test``, and draws up the statistics of Su et al. (1710.08864).

    With ``targeted`` every image is driven to every other class. For each attack, as ``<stage>/<name>/<attack>/…``:
    ``success_rate_targeted`` (of all pairs of image and target), ``success_rate_nontargeted`` (images of which at least
    one target was reached), ``success_rate_any_change`` (images of which at least one search ended at a wrong class),
    ``confidence`` (mean target probability over the successes), ``mean_classes_reached``, ``mean_queries`` and
    ``mean_generations``. Without ``targeted`` each image is attacked once, so that its true class loses probability:
    ``success_rate_nontargeted``, ``confidence`` (of the class that it is then taken for), ``mean_queries`` and
    ``mean_generations``. The definitions are those of :mod:`lightning_robust.metrics.one_pixel`.

    Tables: the rates of all attacks with their 95 % Wilson intervals; for each attack every run (image, target, changed
    pixels, result), the pairs of classes, and the histogram of how many classes an image reached. Figures: examples
    with the changed pixels circled, the pairs, and the histogram. The paper's own rates stand beside the measured ones
    where images and classes are like its own.

    A study takes long, so a killed one goes on: every ``checkpoint_every`` generations each rank saves its populations,
    and each finished batch its results. The same command finds them again by a fingerprint of weights, settings, images
    and labels, and neither attacks a finished batch again nor begins the one under way anew; the result is that of a
    study that was not killed. Other weights, settings, data, batch size or number of devices start anew. The files are
    removed when a study ends; those of a study that is given up lie in the folder until somebody removes it.

    Args:
        attacks: name to :class:`~lightning_robust.attacks.one_pixel.OnePixel`, for example one each for 1, 3 and 5
            pixels.
        targeted: drive each image to every other class, K - 1 runs an image; else one run without a target.
        only_correct: attack only the images that are classified rightly. Otherwise the formulas are taken at their
            word: a misclassified image is a success without a change, for the class it is taken for or without target.
        limit_images: of the first so many images of the data, the same on any number of devices; ``None``: of all.
        acceleration: as in :class:`~lightning_robust.callbacks.AdversarialAccuracy`.
        checkpoint_every: generations between two savings; 0 for never, and no going on either.
        resume_folder: where the files to go on from lie; by default ``<root>/<run's name>/unfinished_<name>``, beside
            the folders of the run's versions. Without a run's folder (``fast_dev_run``) nothing is saved by default.
        examples: images in the figure of examples, at most 20; 0 for no figure.
        name: starts the logged names and those of tables and figures.

    Raises:
        UserError: for settings that make no study.
    """

    def __init__(
        self,
        attacks: dict[str, Attack],
        targeted: bool = True,
        only_correct: bool = True,
        limit_images: int | None = None,
        acceleration: Acceleration = "exact",
        checkpoint_every: int = 10,
        resume_folder: str | None = None,
        examples: int = 20,
        name: str = "one_pixel",
    ) -> None:
        super().__init__(every_n_epochs=0)
        if not attacks:
            raise UserError("OnePixelStudy: name at least one attack, for example pixels1")
        for label in (name, *attacks):
            if not label or "/" in label:
                raise UserError(f"OnePixelStudy: {label!r} cannot be a name: it becomes part of logged and file names")
        if limit_images is not None and limit_images < 1:
            raise UserError(f"OnePixelStudy: limit_images={limit_images}: at least one image, or null for all")
        if acceleration not in ("exact", "bf16", "none"):
            raise UserError(f"OnePixelStudy: acceleration={acceleration!r}: choose exact, bf16 or none")
        if checkpoint_every < 0 or examples < 0:
            raise UserError("OnePixelStudy: checkpoint_every and examples are 0 or more")
        self.attacks = {label: _checked(label, attack) for label, attack in attacks.items()}
        self.targeted, self.only_correct = targeted, only_correct
        self.limit_images, self.acceleration, self.checkpoint_every = limit_images, acceleration, checkpoint_every
        self.resume_folder, self.examples, self.name = resume_folder, examples, name
        self._report: tuple[str, list[dict[str, Any]]] | None = None

    @property
    def state_key(self) -> str:
        """Several of them, each with its own attacks, may live in one trainer."""
        return self._generate_state_key(name=self.name, attacks=sorted(self.attacks))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse two that would write over each other."""
        refuse_same_name(trainer, self, self.name)

    def start(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Fresh counts, and a stand-in of the weights as they are now."""
        classes, device = num_classes(module), module.device
        kind = AllTargetsSuccess if self.targeted else NonTargetedSuccess
        self._metrics = {name: kind(classes).to(device) for name in self.attacks}
        self._means = {
            (name, what): MeanMetric().set_dtype(torch.float64).to(device)
            for name in self.attacks
            for what in ("queries", "generations")
        }
        self._runs: dict[str, list[Runs]] = {name: [] for name in self.attacks}
        self._clean: list[Tensor] = []  # images of the first batches, for the figure
        self._seen = 0
        self._weights: str | None = None
        self._said = False
        self._search = Search(self.acceleration)
        self._progress = AttackProgress.of(trainer)
        self._unfinished = self._files(trainer)

    def _files(self, trainer: pl.Trainer) -> Unfinished | None:
        if self.checkpoint_every == 0:
            return None
        if self.resume_folder is not None:
            return Unfinished(Path(self.resume_folder))
        if getattr(trainer, "fast_dev_run", False):
            return None
        homes = [logger.root_dir for logger in trainer.loggers if isinstance(logger, RunLogger)]
        return Unfinished(Path(homes[0]) / f"unfinished_{self.name}") if homes else None

    def _wanted(self, trainer: pl.Trainer, batch: Batch, index: int, loader: Any) -> Batch | None:
        """The part of a batch that is within ``limit_images``."""
        if self.limit_images is None:
            return batch
        # rank r holds images r, r + world, …
        left = len(range(trainer.global_rank, self.limit_images, trainer.world_size)) - self._seen
        if left <= 0:
            return None
        return Batch(batch.images[:left], batch.labels[:left], None if batch.mask is None else batch.mask[:left])

    # -- attacking -----------------------------------------------------------------------------------------------------

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, index: int) -> None:
        """Attack a batch with each attack."""
        images, labels = batch.images.to(module.dtype), batch.labels
        # hooks of callbacks run outside autocast, but a user may have entered it
        with torch.autocast(module.device.type, enabled=False):
            with torch.no_grad():
                logits = module(images)
            place = torch.arange(self._seen, self._seen + len(images), device=labels.device)
            number = trainer.global_rank + trainer.world_size * place
            self._seen += len(images)
            mask = attack_mask(module, batch)
            if self.only_correct:
                rows = (logits.argmax(1) == labels).nonzero()[:, 0]
                images, labels, logits, number = images[rows], labels[rows], logits[rows], number[rows]
                mask = None if mask is None else mask[rows]
            if not len(images):
                return
            for name in self.attacks:
                runs = self._attack(module, name, images, labels, logits, number, mask)
                self._count(name, runs)
        if trainer.is_global_zero and sum(map(len, self._clean)) < self.examples:
            self._clean.append(images.float().cpu())
        if self._progress:
            self._progress.done()

    def _attack(
        self,
        module: pl.LightningModule,
        name: str,
        images: Tensor,
        labels: Tensor,
        logits: Tensor,
        number: Tensor,
        mask: Tensor | None,
    ) -> Runs:
        """The results of a batch, found or taken from an earlier study that was killed."""
        attack, files, state = self.attacks[name], self._unfinished, None
        if files is not None:
            if self._weights is None:
                self._weights = fingerprint(module)
            facts: tuple[Any, ...] = (attack, self.targeted, self.acceleration, num_classes(module))
            facts = (*facts, images, labels, number)
            if mask is not None:
                facts = (*facts, mask)
            key = f"{name}_{fingerprint(self._weights, *facts)}"
            saved = files.load(key)
            if saved is not None and not self._said:
                self._said = True
                rank_zero_info(f"OnePixelStudy goes on where an earlier run stopped, from {files.folder}")
            if isinstance(saved, Runs):
                return saved
            state = saved
        runs = (all_targets if self.targeted else without_target)(
            attack,
            module,
            images,
            labels,
            Course(
                logits=logits,
                number=number,
                mask=mask,
                stand_in=self._search.model(module),
                state=state,
                checkpoint=None if files is None else lambda reached: files.save(key, reached),
                every=max(self.checkpoint_every, 1),
                progress=self._progress.reporter(name) if self._progress else None,
            ),
        )
        if files is not None:
            files.save(key, runs)
        return runs

    def _count(self, name: str, runs: Runs) -> None:
        metric = self._metrics[name]
        if isinstance(metric, AllTargetsSuccess):
            metric.update(runs.labels, runs.image, runs.target, runs.predicted, runs.confidence)
        else:
            metric.update(runs.labels, runs.predicted, runs.confidence)
        for what in ("queries", "generations"):
            self._means[name, what].update(getattr(runs, what).double().to(self._means[name, what].device))
        self._runs[name].append(runs)

    # -- publishing ----------------------------------------------------------------------------------------------------

    def publish(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Log numbers on every rank; write tables and figures; keep the rates for the table at the end."""
        names, rows = class_names(trainer, module), []
        histograms: dict[str, Tensor] = {}
        for name, attack in self.attacks.items():
            scores = self._metrics[name].compute()
            means = {f"mean_{what}": self._means[name, what].compute() for what in ("queries", "generations")}
            values = rates(scores, means)
            log(module, {f"{stage}/{self.name}/{name}/{what}": value for what, value in values.items()})
            scores = type(scores)(*(value.cpu() for value in scores))
            rows.append(summary(name, attack.pixels, scores, means))
            if isinstance(scores, AllTargetsScores):
                histograms[name] = scores.classes_reached
            self._publish_attack(trainer, name, stage, names, scores)
        if histograms:
            counts = [
                {"attack": name, "classes_reached": reached, "images": images}
                for name, histogram in histograms.items()
                for reached, images in enumerate(histogram.tolist())
            ]
            publish_table(trainer, f"{self.name}_classes_reached", stage, counts)
            figure = classes_reached(histograms, title=f"How many classes an image can be driven to ({stage})")
            publish_figure(trainer, f"{self.name}_classes_reached", stage, figure)
        rows += published(module, class_names(trainer, module))
        publish_table(trainer, self.name, stage, rows)
        if trainer.is_global_zero:
            self._report = stage, rows
        if self._unfinished is not None:
            self._unfinished.remove()
        self._search = Search(self.acceleration)  # the copy of the weights is of no further use
        self._runs, self._clean = {}, []

    def _publish_attack(
        self, trainer: pl.Trainer, name: str, stage: str, names: list[str], scores: AllTargetsScores | NonTargetedScores
    ) -> None:
        rows = gathered([row for runs in self._runs[name] for row in runs.rows(names)])
        if not trainer.is_global_zero or not rows:
            return
        label = f"{self.name}_{name}"
        publish_table(trainer, f"{label}_runs", stage, rows)
        publish_table(trainer, f"{label}_pairs", stage, pairs(scores, names))
        kind = "to each other class" if self.targeted else "without a target"
        title = f"{name}: {budget(self.attacks[name].threat_model)}, {kind} ({stage})"
        column = "target class that was reached" if self.targeted else "class that the image was taken for"
        figure = class_pairs(scores.pair_successes, names, title=title, column_label=column)
        publish_figure(trainer, f"{label}_pairs", stage, figure)
        if shown := examples(self._runs[name], self._clean, self.examples):
            figure = pixel_examples(**shown, class_names=names, title=title)
            publish_figure(trainer, f"{label}_examples", stage, figure)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Print the rates."""
        report, self._report = self._report, None
        if report is None:
            return
        end_bar(trainer, pl_module, stage)
        print_rates(*report)


def _checked(name: str, attack: Attack) -> OnePixel:
    if not isinstance(attack, OnePixel):
        raise UserError(f"OnePixelStudy: {name} is a {type(attack).__name__}: the study is made with OnePixel")
    if attack.outputs != "logits":
        raise UserError(f"OnePixelStudy: modules give logits: set outputs of {name} to logits")
    return attack

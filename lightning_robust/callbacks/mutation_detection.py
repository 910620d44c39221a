"""The detection study: can adversarial images be told at the door by mutation testing, and at what cost?"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_robust.attacks import EOT, Attack
from lightning_robust.batch import Batch
from lightning_robust.callbacks.adversarial_accuracy import Acceleration, Search
from lightning_robust.callbacks.attack_progress import AttackProgress, end_bar
from lightning_robust.callbacks.measurement import (
    Measurement,
    attack_mask,
    log,
    num_classes,
    publish_table,
    refuse_same_name,
)
from lightning_robust.callbacks.mutation_detection_calibration import calibrate_detectors, require_validation_images
from lightning_robust.callbacks.mutation_detection_report import draw, print_study, published, rates, row
from lightning_robust.detectors import Mutants, MutationTestingDetector
from lightning_robust.errors import UserError
from lightning_robust.metrics import RobustAccuracy
from lightning_robust.metrics.detection import NORMAL, WRONG, DetectionScores, SystemAccuracy


class MutationDetection(Measurement):
    """Measures, in ``test``, how well mutation testing detects each attack (arXiv 1805.05010, 1812.05793).

    Detectors are calibrated on validation images, never on test images. Then κ and the decision of each detector are
    taken of the rightly classified test images (kind "normal"), of those that the model gets wrong by itself
    ("wrong"; of the whole test set, since there are few), and of the images of each attack that fool the model. As
    ``test/<name>/<detector>/<kind>/…``: ``kappa`` (mean, over ``kappa_mutants`` mutants) and ``kappa_interval`` (95 %),
    ``detection_rate`` or, of natural images, ``false_alarm_rate``, ``mutants`` (mean number that a decision took),
    ``undecided`` (share at the cap), ``auroc`` (of κ against the normal images) and ``system_acc``: of natural images
    (under "normal") the share that is let through and right; of an attack the share of the attacked images that do not
    get through with a wrong class. Also ``test/<name>/<detector>/kappa_nor`` and ``…/threshold``, and
    ``test/<name>/success_rate/<attack>``.

    ``adaptive`` attacks know the detector: an :class:`~lightning_robust.attacks.EOT` among them runs on the average of
    the model and the mutants of each detector (:class:`~lightning_robust.detectors.Mutants`), others as they are, such
    as a CW with high confidence. Their numbers stand beside those of the other attacks, and are the ones that say how
    much security the detector adds.

    Tables: all numbers, and the histograms of κ. Figures: ROC curves and histograms of κ for each detector. The areas
    of the authors' README stand beside the measured ones where images, classes and attack are like theirs. The
    calibrated detectors are written to ``<run>/detectors/<name>.pt``, for
    :class:`~lightning_robust.callbacks.DetectAdversarial` or
    :class:`~lightning_robust.detectors.DetectingClassifier`.

    Args:
        attacks: name to attack.
        detectors: name to detector. One that is calibrated already is used as it is.
        adaptive: name to attack by one who knows the detectors.
        kappa_mutants: mutants that κ is measured with; at most the cap of each detector.
        limit_images: of the first so many test images, the same on any number of devices; ``None``: of all.
        calibration_images: validation images to calibrate on, spread evenly over the data; ``None``: all.
        acceleration: what attacks search on, as in :class:`~lightning_robust.callbacks.AdversarialAccuracy`.
        name: starts the logged names and those of tables and figures.

    Raises:
        UserError: for settings that make no study.
    """

    def __init__(
        self,
        attacks: dict[str, Attack],
        detectors: dict[str, MutationTestingDetector],
        adaptive: dict[str, Attack] | None = None,
        kappa_mutants: int = 500,
        limit_images: int | None = None,
        calibration_images: int | None = 1000,
        acceleration: Acceleration = "exact",
        name: str = "detection",
    ) -> None:
        super().__init__(every_n_epochs=0)
        adaptive = dict(adaptive or {})
        if not attacks or not detectors:
            raise UserError("MutationDetection: name at least one attack and one detector")
        for label in (name, *attacks, *adaptive, *detectors):
            if not label or "/" in label:
                raise UserError(
                    f"MutationDetection: {label!r} cannot be a name: it becomes part of logged and file names"
                )
        taken = [label for label in adaptive if label in attacks]
        taken += [label for label in (*attacks, *adaptive) if label in (NORMAL, WRONG, "success_rate")]
        if taken:
            raise UserError(f"MutationDetection: the attack name {taken[0]!r} is taken: rename it")
        for setting, value in (("limit_images", limit_images), ("calibration_images", calibration_images)):
            if value is not None and value < 1:
                raise UserError(f"MutationDetection: {setting}={value}: at least one image, or null for all")
        if kappa_mutants < 1:
            raise UserError(f"MutationDetection: kappa_mutants={kappa_mutants}: κ is a share of at least one mutant")
        if acceleration not in ("exact", "bf16", "none"):
            raise UserError(f"MutationDetection: acceleration={acceleration!r}: choose exact, bf16 or none")
        self.attacks, self.adaptive, self.detectors = dict(attacks), adaptive, dict(detectors)
        self.kappa_mutants, self.limit_images, self.calibration_images = kappa_mutants, limit_images, calibration_images
        self.acceleration, self.name = acceleration, name
        self._given = {label for label, detector in self.detectors.items() if detector.calibration is not None}
        self._report: tuple[str, list[dict[str, Any]]] | None = None

    @property
    def state_key(self) -> str:
        """Several of them may live in one trainer."""
        return self._generate_state_key(name=self.name, detectors=sorted(self.detectors))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse two that would write over each other, and data that the detectors cannot be calibrated on."""
        refuse_same_name(trainer, self, self.name)
        if stage == "test" and set(self.detectors) - self._given:
            require_validation_images(trainer)

    def active(self, trainer: pl.Trainer) -> bool:
        """In ``test`` alone: what is validated on are the images of the calibration."""
        return trainer.state.fn == "test"

    def start(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Fresh counts."""
        kinds = [NORMAL, WRONG, *self.attacks, *self.adaptive]
        sets = [NORMAL, *self.attacks, *self.adaptive]
        device = module.device
        self._mutants = {name: min(self.kappa_mutants, each.cap) for name, each in self.detectors.items()}
        self._scores = {name: DetectionScores(kinds, count).to(device) for name, count in self._mutants.items()}
        self._system = {name: SystemAccuracy(sets).to(device) for name in self.detectors}
        # of an adaptive attack that aims at a detector there is one for each
        self._success = {name: RobustAccuracy(num_classes(module)).to(device) for name in self._runs()}
        self._search, self._progress = Search(self.acceleration), AttackProgress.of(trainer)
        self._seen, self._ready = 0, False

    def _runs(self) -> list[str]:
        aimed = [
            f"{name}_{each}" for name, attack in self.adaptive.items() if _aimed(attack) for each in self.detectors
        ]
        return [*self.attacks, *(name for name, attack in self.adaptive.items() if not _aimed(attack)), *aimed]

    def _calibrate(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Get the detectors ready for the weights as they are now, once."""
        if not self._ready:
            calibrate_detectors(trainer, module, self.detectors, self._given, self.calibration_images, self._progress)
            self._ready = True

    # -- measuring -----------------------------------------------------------------------------------------------------

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, index: int) -> None:
        """Attack a batch with each attack and show everything to each detector."""
        images, labels = batch.images.to(module.dtype), batch.labels
        # hooks of callbacks run outside autocast, but a user may have entered it
        with torch.autocast(module.device.type, enabled=False):
            self._calibrate(trainer, module)
            with torch.no_grad():
                right = module(images).argmax(1) == labels
            # rank r holds images r, r + world, …
            place = torch.arange(self._seen, self._seen + len(images), device=labels.device)
            self._seen += len(images)
            number = trainer.global_rank + trainer.world_size * place
            within = torch.ones_like(right) if self.limit_images is None else number < self.limit_images
            shown: dict[str, Tensor] = {NORMAL: images[right & within], WRONG: images[~right]}
            clean, truth = images[right & within], labels[right & within]
            mask = attack_mask(module, batch)
            mask = None if mask is None else mask[right & within]
            for name, attack in {**self.attacks, **self.adaptive}.items():
                if len(clean) and not _aimed(attack, name in self.adaptive):
                    shown[name] = self._attacked(name, name, attack, module, module, clean, truth, mask)
            for name, detector in self.detectors.items():
                aimed = {
                    kind: self._attacked(
                        kind, f"{kind}_{name}", attack, module, Mutants(module, detector), clean, truth, mask
                    )
                    for kind, attack in self.adaptive.items()
                    if len(clean) and _aimed(attack)
                }
                self._show(name, detector, module, {**shown, **aimed}, len(clean), within[~right])
        if self._progress:
            self._progress.done()

    def _attacked(
        self,
        kind: str,
        run: str,
        attack: Attack,
        module: pl.LightningModule,
        model: torch.nn.Module,
        images: Tensor,
        labels: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """The images of an attack that fool the model."""
        result = attack.run(
            model,
            images,
            labels,
            mask=mask,
            stand_in=self._search.model(module) if model is module else None,
            rounding=False,
            progress=self._progress.reporter(run) if self._progress else None,
        )
        self._success[run].update(labels, labels, ~result.success)
        return result.images[result.success]

    def _show(
        self,
        name: str,
        detector: MutationTestingDetector,
        module: pl.LightningModule,
        shown: dict[str, Tensor],
        attacked: int,
        wrong_within: Tensor,
    ) -> None:
        """All kinds at once, so that each mutant is asked about all of them."""
        kinds = [kind for kind, images in shown.items() if len(images)]
        if not kinds:
            return
        found = detector.decide(module, torch.cat([shown[kind] for kind in kinds]), at_least=self._mutants[name])
        assert found.all_changes is not None
        sizes = [len(shown[kind]) for kind in kinds]
        columns = (found.all_changes, found.adversarial, found.decided, found.mutants)
        for kind, changes, flagged, decided, used in zip(kinds, *(c.split(sizes) for c in columns), strict=True):
            self._scores[name].update(kind, changes, flagged, decided, used)
            if kind in (NORMAL, WRONG):
                rejected = flagged if kind == NORMAL else flagged[wrong_within]
                self._system[name].update(NORMAL, torch.full_like(rejected, kind == NORMAL), rejected)
            else:
                # on the others the attack failed
                self._system[name].update(kind, torch.zeros_like(flagged), flagged)
                failed = torch.ones(attacked - len(flagged), dtype=torch.bool, device=flagged.device)
                self._system[name].update(kind, failed, ~failed)
        for kind in (*self.attacks, *self.adaptive):
            if attacked and kind not in kinds:  # it failed on all images
                failed = torch.ones(attacked, dtype=torch.bool, device=module.device)
                self._system[name].update(kind, failed, ~failed)

    # -- publishing ----------------------------------------------------------------------------------------------------

    def publish(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Log numbers on every rank; write tables and figures; keep the numbers for the table at the end."""
        self._calibrate(trainer, module)  # a rank without images has not yet
        start = f"{stage}/{self.name}"
        for run, metric in self._success.items():
            log(module, {f"{start}/success_rate/{run}": metric.compute()["success_rate"]})
        rows: list[dict[str, Any]] = []
        counted: list[dict[str, Any]] = []
        for name, detector in self.detectors.items():
            found, threshold = detector.calibrated, detector.test.threshold
            log(module, {f"{start}/{name}/kappa_nor": found.kappa_nor, f"{start}/{name}/threshold": threshold})
            scores, system = self._scores[name].compute(), self._system[name].compute()
            counts = {kind: values.cpu() for kind, values in self._scores[name].counts().items()}
            for kind, of in scores.items():
                values = rates(kind, of, system.get(kind))
                log(module, {f"{start}/{name}/{kind}/{what}": value for what, value in values.items()})
                theirs = published(module, detector, self.attacks.get(kind))
                rows.append(
                    row(name, detector.mutation.title, kind, of, values, theirs)
                    | {"kappa_nor": found.kappa_nor, "kappa_nor_interval": found.interval, "threshold": threshold}
                )
                counted += [
                    {
                        "detector": name,
                        "kind": kind,
                        "changes": changes,
                        "mutants": self._mutants[name],
                        "images": images,
                    }
                    for changes, images in enumerate(counts[kind].tolist())
                    if images
                ]
            areas = {kind: float(of.auroc) for kind, of in scores.items()}
            draw(trainer, f"{self.name}_{name}", stage, detector, f"{name}: {detector.mutation.title}", counts, areas)
        publish_table(trainer, self.name, stage, rows)
        publish_table(trainer, f"{self.name}_kappa", stage, counted)
        if trainer.is_global_zero:
            self._report = stage, rows
        self._search = Search(self.acceleration)  # the copy of the weights is of no further use

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Print the tables."""
        report, self._report = self._report, None
        if report is None:
            return
        end_bar(trainer, pl_module, stage)
        print_study(*report)


def _aimed(attack: Attack, adaptive: bool = True) -> bool:
    """Whether an adaptive attack runs on the mutants of a detector."""
    return adaptive and isinstance(attack, EOT)

"""Accuracy under attack, for any number of named attacks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_robust.attacks import Attack, AttackResult, accelerate
from lightning_robust.batch import Batch
from lightning_robust.callbacks.attack_progress import AttackProgress
from lightning_robust.callbacks.measurement import (
    Measurement,
    attack_mask,
    budget,
    class_names,
    log,
    num_classes,
    publish_figure,
    publish_images,
    publish_table,
    refuse_same_name,
)
from lightning_robust.errors import UserError
from lightning_robust.metrics import RobustAccuracy
from lightning_robust.report import adversarial_examples

Acceleration = Literal["exact", "bf16", "none"]


class Search:
    """What the search of an evaluation runs on in place of the model; successes are confirmed on the model itself.

    It is made for the first batch and not at the evaluation's start, where another callback may not have put the
    weights in place yet that are to be evaluated (weight averaging does it there).
    """

    def __init__(self, acceleration: Acceleration) -> None:
        self._acceleration: Acceleration = acceleration
        self._model: nn.Module | None = None

    def model(self, module: nn.Module) -> nn.Module | None:
        """The stand-in, or ``None`` for a search on the model itself."""
        if self._acceleration == "none":
            return None
        if self._model is None:
            dtype = torch.bfloat16 if self._acceleration == "bf16" else None
            self._model = accelerate(module, dtype=dtype)  # type: ignore[assignment]
        return self._model


@dataclass
class _Examples:
    """The first images of a set with what an attack made of them, for a figure."""

    clean: Tensor
    adversarial: Tensor
    labels: Tensor
    clean_predictions: Tensor
    adversarial_predictions: Tensor


class AdversarialAccuracy(Measurement):
    """Clean accuracy, robust accuracy and success rate for named attacks; per class; with a figure of examples.

    For each attack: ``<stage>/robust_acc/<name>`` (share of images classified rightly clean *and* attacked) and
    ``<stage>/success_rate/<name>`` (share of the rightly classified images that the attack fools); with more than one
    attack ``<stage>/robust_acc/worst_case``, counted image by image: an image is robust only if every attack fails
    (Carlini et al., arXiv 1902.06705). In ``test`` also a table per class, the rate that survives rounding to 8 bits,
    and the figure. For an attack without a budget (CW, DeepFool, …), whose robust accuracy is about zero for any model,
    also ``<stage>/mean_norm/<name>``: the mean norm of its perturbation over the rightly classified images it fools.

    Attacks run in the precision of the weights (autocast is off), on what ``acceleration`` names, and stop at success
    as they are set. Every success is confirmed on the model itself.

    Args:
        attacks: name to attack; the names appear in logs, tables and figures.
        every_n_epochs: in ``fit``, how often.
        limit_batches: in ``fit``, on the images of so many validation batches; ``None`` for all.
        acceleration: "exact" searches on a stand-in with BatchNorm folded and channels last (equal up to rounding),
            "bf16" on one in bfloat16 (faster on CPUs and GPUs that have it), "none" on the model itself.
        examples: images in the figure of each attack.
        fit_attacks: names of the attacks that run in ``fit``; by default all.
        name: ends the names of the worst case and of the table; several in one trainer need names of their own.
        pixels: where the attacks may change an image: "foreground", the masks that come with the data, or "image"; by
            default what the module says (:class:`~lightning_robust.modules.ForegroundClassifier`), else the image.
    """

    def __init__(
        self,
        attacks: dict[str, Attack],
        every_n_epochs: int = 1,
        limit_batches: int | None = 1,
        acceleration: Acceleration = "exact",
        examples: int = 6,
        fit_attacks: list[str] | None = None,
        name: str = "",
        pixels: Literal["foreground", "image"] | None = None,
    ) -> None:
        super().__init__(every_n_epochs, limit_batches)
        if pixels not in (None, "foreground", "image"):
            raise UserError(f"AdversarialAccuracy: pixels={pixels!r}: choose foreground or image")
        if not attacks:
            raise UserError("AdversarialAccuracy: name at least one attack")
        bad = [label for label in attacks if not label or "/" in label or label.startswith("worst_case")]
        if bad:
            raise UserError(
                f"AdversarialAccuracy: {bad[0]!r} cannot be an attack's name: it becomes part of a logged name"
            )
        unknown = [label for label in fit_attacks or () if label not in attacks]
        if unknown:
            raise UserError(
                f"AdversarialAccuracy: fit_attacks names {unknown[0]!r}, which is not among {', '.join(attacks)}"
            )
        if acceleration not in ("exact", "bf16", "none"):
            raise UserError(f"AdversarialAccuracy: acceleration={acceleration!r}: choose exact, bf16 or none")
        self.name, self.pixels = name, pixels
        self.attacks, self.acceleration, self.examples = dict(attacks), acceleration, examples
        self.fit_attacks = list(fit_attacks) if fit_attacks is not None else list(attacks)
        self._metrics: dict[str, RobustAccuracy] = {}

    @property
    def state_key(self) -> str:
        """Several of them, each with its own attacks, may live in one trainer."""
        return self._generate_state_key(name=self.name, attacks=sorted(self.attacks))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse names that two callbacks would log twice."""
        others = [c for c in trainer.callbacks if isinstance(c, AdversarialAccuracy) and c is not self]  # type: ignore[attr-defined]
        twice = sorted({name for other in others for name in other.attacks} & set(self.attacks))
        if twice:
            raise UserError(f"AdversarialAccuracy: the attack name {twice[0]!r} is used by two callbacks: rename one")
        refuse_same_name(trainer, self, self.name)  # they share the worst case and the table

    @property
    def _worst_case(self) -> str:
        return f"worst_case_{self.name}" if self.name else "worst_case"

    def start(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Fresh counts, and a stand-in of the weights as they are now."""
        self._names = self.fit_attacks if trainer.state.fn == "fit" else list(self.attacks)
        counted = [*self._names, self._worst_case] if len(self._names) > 1 else self._names
        self._metrics = {name: RobustAccuracy(num_classes(module)).to(module.device) for name in counted}
        self._norms = {
            name: MeanMetric().set_dtype(torch.float64).to(module.device)
            for name in self._names
            if not self.attacks[name].threat_model.bounded
        }
        self._search = Search(self.acceleration)
        self._examples: dict[str, _Examples] = {}
        self._progress = AttackProgress.of(trainer)

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, index: int) -> None:
        """Attack a batch with each attack."""
        # hooks of callbacks run outside autocast, but a user may have entered it
        with torch.autocast(module.device.type, enabled=False):
            self._attack(trainer, module, batch)
        if self._progress:
            self._progress.done()

    def _attack(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch) -> None:
        images, labels = batch.images.to(module.dtype), batch.labels
        with torch.no_grad():
            logits = module(images)
        clean = logits.argmax(1)
        robust = clean == labels
        testing = trainer.state.fn != "fit"
        mask = attack_mask(module, batch, self.pixels)
        for name in self._names:
            result = self.attacks[name].run(
                module,
                images,
                labels,
                mask=mask,
                clean_logits=logits,
                stand_in=self._search.model(module),
                rounding=testing,
                progress=self._progress.reporter(name) if self._progress else None,
            )
            # success is confirmed on the model already
            self._metrics[name].update(labels, clean, ~result.success, result.success_8bit if testing else None)
            if name in self._norms:
                fooled = result.success & (clean == labels)
                size = result.norms[self.attacks[name].threat_model.norm]
                self._norms[name].update(size[fooled].double())
            robust = robust & ~result.success
            if testing and self.examples and trainer.is_global_zero and name not in self._examples:
                self._examples[name] = self._some(module, images, labels, clean, result)
        if self._worst_case in self._metrics:
            self._metrics[self._worst_case].update(labels, clean, robust)

    def _some(
        self, module: pl.LightningModule, images: Tensor, labels: Tensor, clean: Tensor, result: AttackResult
    ) -> _Examples:
        # rightly classified ones: on the others there is nothing to see
        rows = (clean == labels).nonzero()[: self.examples, 0]
        adversarial = result.images[rows]
        with torch.no_grad():
            predicted = module(adversarial).argmax(1) if len(rows) else labels[rows]
        parts = (images[rows], adversarial, labels[rows], clean[rows], predicted)
        return _Examples(*(part.float().cpu() if part.is_floating_point() else part.cpu() for part in parts))

    def publish(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Log numbers on every rank; write the table and the figures."""
        rows: list[dict[str, Any]] = []
        names = class_names(trainer, module)
        for name, metric in self._metrics.items():
            values = metric.compute()
            log(module, {f"{stage}/robust_acc/{name}": values["robust_acc"]}, prog_bar=len(self._metrics) < 4)
            log(module, {f"{stage}/success_rate/{name}": values["success_rate"]})
            if trainer.state.fn != "fit" and name != self._worst_case:
                log(module, {f"{stage}/success_rate_8bit/{name}": values["success_rate_8bit"]})
            if name in self._norms:
                size = self._norms[name].compute()  # on every rank, since it sums over them
                if bool(size.isfinite()):  # not where no image was fooled at all
                    log(module, {f"{stage}/mean_norm/{name}": size})
            rows += [{"attack": name, "class": names[int(row.pop("class"))], **row} for row in metric.per_class()]
        if trainer.state.fn != "fit":
            table = "_".join(filter(None, ("robust_accuracy_per_class", self.name)))
            publish_table(trainer, table, stage, rows)
            for name, some in self._examples.items():
                if len(some.labels) == 0:
                    continue
                threat_model = getattr(self.attacks[name], "threat_model", None)
                figure = adversarial_examples(
                    some.clean,
                    some.adversarial,
                    some.labels,
                    some.clean_predictions,
                    some.adversarial_predictions,
                    class_names=names,
                    title=f"{name}: {type(self.attacks[name]).__name__}"
                    + (f", {budget(threat_model)}" if threat_model else ""),
                )
                publish_figure(trainer, f"adversarial_examples_{name}", stage, figure)
                self._publish_examples(trainer, name, stage, some, names)
        self._search = Search(self.acceleration)  # the copy of the weights is of no further use

    def _publish_examples(self, trainer: pl.Trainer, name: str, stage: str, some: _Examples, names: list[str]) -> None:
        change = some.adversarial - some.clean
        # as in the figure: grey is no change, white and black the largest
        difference = 0.5 + change / (2 * change.abs().max().clamp_min(1e-12))
        publish_images(
            trainer,
            f"adversarial_examples_table_{name}",
            stage,
            {
                "clean": _uint8(some.clean),
                "adversarial": _uint8(some.adversarial),
                "difference": _uint8(difference),
            },
            {
                "label": [names[label] for label in some.labels],
                "clean prediction": [names[label] for label in some.clean_predictions],
                "adversarial prediction": [names[label] for label in some.adversarial_predictions],
            },
        )


def _uint8(images: Tensor) -> np.ndarray:
    return (images * 255).round().clamp(0, 255).to(torch.uint8).numpy()

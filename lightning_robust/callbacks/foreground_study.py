"""What a background costs: the study of Vaishnavi et al. (arXiv 1911.11946) of one model, and the columns it lacks."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_robust.attacks import PGD, Attack, AutoAttack
from lightning_robust.batch import Batch
from lightning_robust.callbacks.adversarial_accuracy import Acceleration, Search
from lightning_robust.callbacks.attack_progress import AttackProgress, end_bar
from lightning_robust.callbacks.first_images import FirstImages
from lightning_robust.callbacks.foreground_views import (
    HELD,
    MASKS,
    PREDICTED,
    View,
    models_of,
    names_of_views,
    own_attacker,
    own_view,
    views_of,
)
from lightning_robust.callbacks.measurement import budget, log, publish_table, refuse_same_name
from lightning_robust.errors import UserError
from lightning_robust.metrics import (
    CellAccuracy,
    ForegroundGradient,
    SizeStatistics,
    input_gradient,
    intersection_over_union,
    wilson_interval,
)
from lightning_robust.models import ForegroundNetwork, MaskAttack
from lightning_robust.report import print_table

_STRONG = "strong"
_CHANGES = {MASKS: "image"}  # who goes for the masks does so anywhere


class ForegroundStudy(FirstImages):
    """How robust a classifier is that sees whole images, foregrounds alone, and foregrounds cut out by wrong masks.

    In ``validate`` and ``test``, on data with masks, of any classifier. It is shown each image in several *views*:

    * ``whole``: the image itself (masks are missing);
    * ``given``: cut out by its mask; ``dilated_<r>`` and ``eroded_<r>``: by its mask, larger or smaller by r pixels;
    * ``predicted``: cut out by the masks of its own predictor, where the module has one.

    As ``<stage>/<name>/<view>/clean`` the accuracy, and for each *attacker* robust accuracy: ``<view>/foreground`` (may
    change the pixels of the mask alone), ``<view>/image`` (all pixels of what the classifier is given: of an image that
    is cut out also its blank background; of predicted masks those by which the predictor is misled, white-box through
    predictor and classifier together), ``predicted/held`` (who takes the predicted masks as they are, the paper's
    assumption), and ``predicted/masks`` (who goes for the masks alone, ``mask_attack``, not for the class); with
    ``<name>/mask_iou`` and ``mask_iou_attacked``, the predicted masks' IoU with the true ones before and after that.
    ``<name>/strong`` is the accuracy under ``strong`` (AutoAttack), on the first ``strong_images``, in the
    view that the module was made for, where it may change what the classifier sees.

    In that same view the mean |∇x| of a pixel of the foreground (``<name>/gradient_inside``) and of the background
    (``gradient_outside``), and each image's IoU of as many of its weakest pixels as its foreground has with its
    foreground (``iou``; about ``iou_by_chance`` where the two know nothing of each other). And, for
    ``python -m lightning_robust.report.foreground``, which makes the paper's table of several runs: ``own_view``
    (0 whole, 1 given, 2 predicted) and ``adversarial`` (1 where its training attacks).

    Args:
        attack: of all columns but ``strong``; by default PGD-20 at L∞ 8/255 with steps of 2/255.
        strong: an attack that takes longer; by default AutoAttack with the norm and budget of ``attack``.
        strong_images: it attacks the first so many images; 0: none.
        radii: by which masks are dilated and eroded, in pixels.
        limit_images: measure the first so many images; ``None``: all.
        acceleration: as in :class:`~lightning_robust.callbacks.AdversarialAccuracy`.
        name: starts the logged names, and that of the table.
        mask_attack: of ``predicted/masks``; by default 20 steps with the norm and budget of ``attack``, or of L∞ 8/255
            where that has none.

    Raises:
        UserError: for settings that make no study, and data without masks.
    """

    def __init__(
        self,
        attack: Attack | None = None,
        strong: Attack | None = None,
        strong_images: int = 200,
        radii: list[int] | None = None,
        limit_images: int | None = None,
        acceleration: Acceleration = "exact",
        name: str = "foreground",
        mask_attack: MaskAttack | None = None,
    ) -> None:
        super().__init__(limit_images)
        self.attack = PGD(eps="8/255", step_size="2/255", steps=20) if attack is None else attack
        self.radii = sorted(set([1, 2] if radii is None else radii))
        if self.radii and self.radii[0] < 1:
            raise UserError(f"ForegroundStudy: radii={radii}: masks are dilated and eroded by 1 pixel or more")
        if strong_images < 0:
            raise UserError(f"ForegroundStudy: strong_images={strong_images}: 0 leaves that attack out")
        if acceleration not in ("exact", "bf16", "none"):
            raise UserError(f"ForegroundStudy: acceleration={acceleration!r}: choose exact, bf16 or none")
        if not name or "/" in name:
            raise UserError(f"ForegroundStudy: {name!r} cannot be a name: it becomes part of logged and file names")
        if strong is None and strong_images:
            model = self.attack.threat_model
            if not model.bounded or model.norm == "l0":
                raise UserError(
                    f"ForegroundStudy: {type(self.attack).__name__} has no budget for AutoAttack to share: give "
                    "strong, or strong_images 0"
                )
            strong = AutoAttack(eps=model.radius, norm=model.norm)
        self.strong, self.strong_images = strong, strong_images
        self.acceleration: Acceleration = acceleration
        self.name = name
        if mask_attack is None:
            model = self.attack.threat_model
            known = model.bounded and model.norm != "l0"
            mask_attack = MaskAttack(eps=model.radius, norm=model.ball, steps=20) if known else MaskAttack(steps=20)
        self.mask_attack = mask_attack
        self._rows: tuple[str, list[dict[str, Any]]] | None = None

    @property
    def state_key(self) -> str:
        """Several of them may live in one trainer."""
        return self._generate_state_key(name=self.name)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse two that would write over each other."""
        refuse_same_name(trainer, self, self.name)

    def start(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Fresh counts."""
        self._own = own_view(module)
        cells = [
            f"{view}/{what}"
            for view, attackers in names_of_views(module, self.radii).items()
            for what in ("clean", *attackers)
        ]
        if self.strong_images:
            cells.append(_STRONG)
        self._metric = CellAccuracy(cells).to(module.device)
        self._gradient = ForegroundGradient().to(module.device)
        # of predicted masks, before and after the attack on them
        predicts = PREDICTED in names_of_views(module, self.radii)
        self._ious = [SizeStatistics().to(module.device) for _ in range(2 * predicts)]
        self._searches = {name: Search(self.acceleration) for name in models_of(module)}
        self._progress = AttackProgress.of(trainer)

    # -- measuring -----------------------------------------------------------------------------------------------------

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, index: int) -> None:
        """All views of a batch."""
        whole = getattr(module, "whole_batch", None) or batch
        # within limit_images, as the batch is
        batch = Batch(*(None if part is None else part[: len(batch.images)] for part in whole))  # type: ignore[arg-type]
        batch = batch._replace(images=batch.images.to(module.dtype))
        first = self._seen - len(batch.images)  # this rank's place of the batch's first image
        # hooks of callbacks run outside autocast, but a user may have entered it
        with torch.autocast(module.device.type, enabled=False):
            for name, view in views_of(module, batch, self.radii).items():
                self._measure(module, name, view, batch)
                if name == self._own and self.strong_images:
                    mine = len(range(trainer.global_rank, self.strong_images, trainer.world_size)) - first
                    self._strong(module, view, batch, max(mine, 0))
        if self._progress:
            self._progress.done()

    def _measure(self, module: pl.LightningModule, name: str, view: View, batch: Batch) -> None:
        models, labels = models_of(module), batch.labels
        with torch.no_grad():
            logits = models[view.model](view.images)
        clean = logits.argmax(1) == labels
        self._metric.update(f"{name}/clean", clean)
        for attacker, mask in view.attackers.items():
            found = self._run(models, view.model, self.attack, view.images, labels, mask, f"{name}, {attacker}", logits)
            self._metric.update(f"{name}/{attacker}", clean & found)
        if view.held is not None:
            images, mask = view.held
            found = self._run(models, "classifier", self.attack, images, labels, mask, f"{name}, {HELD}")
            self._metric.update(f"{name}/{HELD}", clean & found)
        if name == PREDICTED:
            self._mislead(models["network"], batch, clean)
        if name == self._own:
            masks = batch.mask
            assert masks is not None
            gradients = input_gradient(models[view.model], view.images, labels)
            self._gradient.update(gradients, (masks[:, None] if masks.dim() == 3 else masks).bool())

    def _mislead(self, network: nn.Module, batch: Batch, clean: Tensor) -> None:
        """Attack the predicted masks."""
        assert isinstance(network, ForegroundNetwork)
        assert batch.mask is not None
        truth = (batch.mask[:, None] if batch.mask.dim() == 3 else batch.mask).bool()
        attacked = self.mask_attack(network, batch.images, batch.labels, truth)
        with torch.no_grad():
            right = network(attacked).argmax(1) == batch.labels
            for metric, images in zip(self._ious, (batch.images, attacked), strict=True):
                metric.update(intersection_over_union(network.segmenter(images)[:, 0] > 0, truth[:, 0]))
        self._metric.update(f"{PREDICTED}/{MASKS}", clean & right)

    def _strong(self, module: pl.LightningModule, view: View, batch: Batch, count: int) -> None:
        images, labels = view.images[:count], batch.labels[:count]
        if not len(images):
            return
        assert self.strong is not None
        mask = view.attackers[own_attacker(self._own)]
        mask = None if mask is None else mask[:count]
        found = self._run(models_of(module), view.model, self.strong, images, labels, mask, _STRONG)
        self._metric.update(_STRONG, found)

    def _run(
        self,
        models: dict[str, nn.Module],
        which: str,
        attack: Attack,
        images: Tensor,
        labels: Tensor,
        mask: Tensor | None,
        what: str,
        logits: Tensor | None = None,
    ) -> Tensor:
        """Which images withstand ``(N,)``."""
        result = attack.run(
            models[which],
            images,
            labels,
            mask=mask,
            clean_logits=logits,
            stand_in=self._searches[which].model(models[which]),
            rounding=False,
            progress=self._progress.reporter(f"{self.name}: {what}") if self._progress else None,
        )
        return ~result.success

    # -- publishing ----------------------------------------------------------------------------------------------------

    def publish(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Log numbers on every rank; write the table; keep what is printed at the end."""
        counts, gradient = self._metric.counts(), self._gradient.compute()
        values = {cell: right / images for cell, (right, images) in counts.items() if images}
        ious = (float(metric.compute().mean) for metric in self._ious)  # on every rank
        values |= dict(zip(("mask_iou", "mask_iou_attacked"), ious, strict=False))
        values |= {
            "gradient_inside": float(gradient.inside),
            "gradient_outside": float(gradient.outside),
            "iou": float(gradient.iou),
            "iou_by_chance": float(gradient.iou_by_chance),
            "own_view": float(["whole", "given", "predicted"].index(self._own)),
            "adversarial": float(
                getattr(getattr(module, "objective", None), "attack", None) is not None
                or getattr(module, "mask_attack", None) is not None
            ),
            "images": float(gradient.images),
        }
        log(module, {f"{stage}/{self.name}/{what}": value for what, value in values.items() if value == value})
        self._searches = {}  # the copies of the weights are of no further use
        if trainer.is_global_zero:
            rows = [self._row(cell, *pair) for cell, pair in counts.items()]
            publish_table(trainer, self.name, stage, rows)
            self._rows = stage, rows

    def _row(self, cell: str, right: int, images: int) -> dict[str, Any]:
        view, _, what = cell.rpartition("/")
        strong = what == _STRONG
        attack = self.strong if strong else None if what == "clean" else self.attack
        by = None if attack is None else f"{type(attack).__name__}, {budget(attack.threat_model)}"
        if what == MASKS:
            by = f"MaskAttack, {budget(self.mask_attack.threat_model)}"
        low, high = wilson_interval(right, images) if images else (None, None)
        return {
            "view": self._own if strong else view,
            "attack": by or "none",
            "changes": "nothing" if attack is None else own_attacker(self._own) if strong else _CHANGES.get(what, what),
            "accuracy": right / images if images else None,
            "low": low,
            "high": high,
            "images": images,
        }

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Print the table."""
        found, self._rows = self._rows, None
        if found is None:
            return
        end_bar(trainer, pl_module, stage)
        shown = [
            {
                "view": row["view"] + (" (its own)" if row["view"] == self._own else ""),
                "attack": row["attack"],
                "may change": row["changes"],
                "accuracy": None if row["accuracy"] is None else f"{row['accuracy']:.2%}",
                "95 % interval": None if row["low"] is None else f"{row['low']:.1%} to {row['high']:.1%}",
                "images": row["images"],
            }
            for row in found[1]
        ]
        print_table(f"Foreground study ({found[0]})", shown)

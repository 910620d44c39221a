"""Where a model looks and where an attacker writes, image by image and class by class (arXiv 2011.10794)."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_robust.attacks import FGSM, Attack
from lightning_robust.batch import Batch
from lightning_robust.callbacks import regions_report as report
from lightning_robust.callbacks.attack_progress import AttackProgress, end_bar
from lightning_robust.callbacks.measurement import (
    Measurement,
    attack_mask,
    class_names,
    image_size,
    log,
    num_classes,
    publish_array,
    publish_table,
    refuse_same_name,
    run_folder,
)
from lightning_robust.callbacks.regions_counting import Counted
from lightning_robust.callbacks.regions_directions import check_pairs, directions, rounds
from lightning_robust.callbacks.regions_figures import draw_regions
from lightning_robust.callbacks.regions_published import Problem, check_problem
from lightning_robust.errors import UserError
from lightning_robust.metrics.regions import MapMeans
from lightning_robust.regions import ActivationMap, Threshold, importance, pixel_change
from lightning_robust.regions.extra import require


class RegionMaps(Measurement):
    """Region of importance, region of attack and the four regions between them, per image and per class.

    Chattopadhyay et al. ("Spatially correlated patterns in adversarial images", arXiv 2011.10794). Of every image that
    is classified rightly: the class activation map of its true class (importance), how far each pixel is moved by an
    attack (change, the L2 norm over channels), the regions that ``roi_threshold`` and ``roa_threshold`` cut from them,
    and the four regions UV, UV̄, ŪV and ŪV̄. Of every class or direction (source → target) the *representatives*: the
    pixel-wise means of the maps, each cut by ``representative_threshold``; or with ``union`` the union of the images'
    regions.

    Directions are both ways of two classes, the ``pairs`` asked for (attacked towards their target), or else each
    class. As ``<stage>/<name>/<attack>/<direction>/…``: ``images``; ``ssim`` (mean over images of the SSIM of
    importance and change, each scaled to [0, 1]) and ``ssim_representatives`` (of the two mean maps); ``share_uv``,
    ``share_u_only``, ``share_v_only``, ``share_neither`` (mean over images) and ``overlap`` (share of UV over what
    chance would give, in the representatives). The table has more: 95 % intervals, Moran's I of importance, of change
    and between them with permutation p-values, and connected components.

    In ``fit`` it draws every ``every_n_epochs`` epochs, so that one sees regions form, and logs ``ssim`` alone.

    Sums are kept class by class: the numbers are the same on any number of devices and with any batch size, and memory
    does not grow with the number of images. The examples are the first images of the first device. The attacks of a
    module that says so (as :class:`~lightning_robust.modules.ForegroundClassifier` does) keep to the masks of the data.

    Args:
        attacks: name to attack; by default FGSM at 8/255.
        activation: how importance is measured.
        roi_threshold: δ₁ of each image's importance, which is in [0, 1].
        roa_threshold: δ₂ of each image's change, in pixel units.
        representative_threshold: of the mean maps, both of them.
        union: make the representatives of unions in place of means. Of many images they are large.
        pairs: (source, target) class numbers, of a problem of three classes or more; by default see above.
        permutations: of the pixels, for the p-values; of those between two maps, moves of one of them.
        examples: images of each direction that are drawn; 0 for none.
        published: print the paper's numbers beside, of "mnist01", "fashion", "cats_dogs" or "malaria".
        every_n_epochs: in ``fit``, measure after every so many epochs; 0: not in ``fit``.
        limit_batches: in ``fit``, on the images of so many validation batches; ``None`` for all.
        name: starts the logged names, and those of tables and figures.

    Raises:
        UserError: for settings that make no measurement; when it runs for a layer that does not do; in ``test`` where
            no class has an image that is classified rightly.
    """

    def __init__(
        self,
        attacks: dict[str, Attack] | None = None,
        activation: ActivationMap = ActivationMap(),  # noqa: B008 - frozen
        roi_threshold: Threshold = Threshold("otsu"),  # noqa: B008 - frozen
        roa_threshold: Threshold = Threshold("relative", 0.5),  # noqa: B008 - frozen
        representative_threshold: Threshold = Threshold("otsu"),  # noqa: B008 - frozen
        union: bool = False,
        pairs: list[list[int]] | None = None,
        permutations: int = 999,
        examples: int = 3,
        published: Problem | None = None,
        every_n_epochs: int = 0,
        limit_batches: int | None = 1,
        name: str = "regions",
    ) -> None:
        super().__init__(every_n_epochs, limit_batches)
        self.attacks: dict[str, Attack] = {"fgsm": FGSM(eps="8/255")} if attacks is None else dict(attacks)
        if not self.attacks:
            raise UserError("RegionMaps: name at least one attack, for example fgsm")
        for label in (name, *self.attacks):
            if not label or "/" in label:
                raise UserError(f"RegionMaps: {label!r} cannot be a name: it becomes part of logged and file names")
        if permutations < 1 or examples < 0:
            raise UserError("RegionMaps: permutations is 1 or more (999 are usual), examples 0 or more")
        if pairs is not None:
            check_pairs(pairs, "RegionMaps")
        check_problem(published, "RegionMaps")
        require("captum", "RegionMaps")
        require("scipy", "RegionMaps")
        self.activation, self.roi_threshold, self.roa_threshold = activation, roi_threshold, roa_threshold
        self.representative_threshold, self.union = representative_threshold, union
        self.pairs, self.permutations, self.examples = pairs, permutations, examples
        self.published, self.name = published, name
        self._rows: tuple[str, list[dict[str, Any]]] | None = None

    @property
    def state_key(self) -> str:
        """Several of them may live in one trainer."""
        return self._generate_state_key(name=self.name)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse two that would write over each other, and pairs that the problem does not have."""
        refuse_same_name(trainer, self, self.name)
        directions([str(number) for number in range(num_classes(pl_module))], self.pairs)

    def start(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Fresh counts."""
        classes, size, device = num_classes(module), image_size(module), module.device
        self._directions = directions(class_names(trainer, module), self.pairs)
        self._rounds = rounds(self._directions, classes)
        groups = len(self._directions)
        self._importance = MapMeans(groups, size).to(device)
        self._counted = {name: Counted.of(groups, size, device) for name in self.attacks}
        self._resolved: ActivationMap | None = None
        self._progress = AttackProgress.of(trainer)

    # -- measuring -----------------------------------------------------------------------------------------------------

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, index: int) -> None:
        """All maps of a batch."""
        # hooks of callbacks run outside autocast, but a user may have entered it
        with torch.autocast(module.device.type, enabled=False):
            images, labels = batch.images.to(module.dtype), batch.labels
            if self._resolved is None:
                self._resolved = self.activation.resolved(module, images)
            with torch.no_grad():
                right = (module(images).argmax(1) == labels).nonzero()[:, 0]
            if len(right):
                held = attack_mask(module, batch)
                held = None if held is None else held[right]
                self._count(trainer, module, images[right], labels[right], held)
        if self._progress:
            self._progress.done()

    def _count(
        self, trainer: pl.Trainer, module: pl.LightningModule, images: Tensor, labels: Tensor, held: Tensor | None
    ) -> None:
        assert self._resolved is not None
        looked = importance(module, images, labels, self._resolved)
        roi = self.roi_threshold.region(looked)
        for number, part in enumerate(self._rounds):
            groups = part.groups(labels)
            self._importance.update(looked, groups)
            rows = (groups >= 0).nonzero()[:, 0]
            if not len(rows):
                continue
            for name, attack in self.attacks.items():
                what = f"{self.name} {name}" + (f" {number + 1}/{len(self._rounds)}" if len(self._rounds) > 1 else "")
                aims = part.targets(labels)
                adversarial = attack.to_the_end().run(
                    module,
                    images[rows],
                    labels[rows],
                    targets=None if aims is None else aims[rows],
                    mask=None if held is None else held[rows],
                    rounding=False,
                    progress=self._progress.reporter(what) if self._progress else None,
                )
                self._counted[name].count(
                    images[rows],
                    looked[rows],
                    roi[rows],
                    pixel_change(images[rows], adversarial.images),
                    self.roa_threshold,
                    groups[rows],
                    keep=self.examples if trainer.is_global_zero else 0,
                )

    # -- publishing ----------------------------------------------------------------------------------------------------

    def publish(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Log on every rank, write and draw.

        Raises:
            UserError: outside of ``fit`` where no image was classified rightly.
        """
        looked = self._importance.compute()
        lacking = [self._directions[int(g)] for g in (looked.images == 0).nonzero()[:, 0]]
        if lacking:
            names = ", ".join(direction.label for direction in lacking)
            told = (
                f"RegionMaps: of {names} no image was classified rightly, and the region of importance is that of the "
                "true class: train the model further, or measure more images"
            )
            if len(lacking) == len(self._directions) and trainer.state.fn != "fit":
                raise UserError(told)
            rank_zero_warn(told)
        rows: list[dict[str, Any]] = []
        publish_array(trainer, f"{self.name}_importance", stage, looked.mean)
        for name, attack in self.attacks.items():
            counted = self._counted[name]
            measured = counted.measured(looked)
            representatives = report.representatives(measured, self.representative_threshold, self.union)
            own = report.rows(
                name,
                attack,
                self._directions,
                measured,
                representatives,
                permutations=self.permutations if trainer.is_global_zero else 1,
                problem=self.published,
            )
            rows += own
            for direction, row in zip(self._directions, own, strict=True):
                start = f"{stage}/{self.name}/{name}/{direction.key}"
                logged = ("ssim",) if trainer.state.fn == "fit" else report.LOGGED  # an epoch's line stays readable
                values = {what: row[what] for what in logged if math.isfinite(row[what])}
                log(module, {f"{start}/{what}": value for what, value in values.items()})
            if run_folder(trainer) is not None:
                publish_array(trainer, f"{self.name}_{name}_change", stage, measured.change)
                publish_array(trainer, f"{self.name}_{name}_regions", stage, representatives)
                kind = "unions of the images' regions" if self.union else f"mean maps, {self.representative_threshold}"
                draw_regions(
                    trainer,
                    stage,
                    f"{self.name}_{name}",
                    attack,
                    self._directions,
                    counted.examples,
                    measured,
                    representatives,
                    kind,
                )
        publish_table(trainer, self.name, stage, rows)
        if trainer.is_global_zero:
            for text in report.warnings(rows, self._resolved):
                rank_zero_warn(f"RegionMaps: {text}")
            if trainer.state.fn != "fit":
                self._rows = stage, rows

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Print the tables."""
        rows, self._rows = self._rows, None
        if rows is None:
            return
        end_bar(trainer, pl_module, stage)
        report.print_rows(*rows)

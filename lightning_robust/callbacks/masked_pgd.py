"""Whether an attack works where mean |∇x| is large: the masked PGD experiment of Hwang et al. (2019)."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_robust.attacks import PGD, Attack
from lightning_robust.attacks.base import expand_mask
from lightning_robust.attacks.randomness import image_keys, mix_seed, uniform
from lightning_robust.batch import Batch
from lightning_robust.callbacks.adversarial_accuracy import Acceleration, Search
from lightning_robust.callbacks.attack_progress import AttackProgress, end_bar
from lightning_robust.callbacks.first_images import FirstImages
from lightning_robust.callbacks.measurement import (
    attack_mask,
    budget,
    image_size,
    log,
    publish_array,
    publish_figure,
    publish_table,
    refuse_same_name,
)
from lightning_robust.callbacks.pixel_map import load_map, measured_map
from lightning_robust.errors import UserError
from lightning_robust.metrics import CellAccuracy, top_pixels
from lightning_robust.report import curve, print_table

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_KINDS = {"top": "largest mean |∇x|", "bottom": "smallest mean |∇x|", "random": "random pixels"}
_WITHIN = {"top": "largest, within", "bottom": "smallest, within", "random": "random, within"}


class MaskedPGD(FirstImages):
    """Robust accuracy where only p % of the pixels carry the attack: those of largest, and of smallest mean |∇x|.

    The experiment of Hwang et al. (ICLR 2019 Debugging ML workshop) that shows what the map is good for: an image is
    attacked as a whole, and then only the pixels of a mask keep what the attack did, x̃ = m · x_adv + (1 - m) · x. Their
    claim is that for every p the accuracy with the bottom p % is at least that with the top p %. As a baseline the same
    with p % random pixels, others for each image. In ``validate`` and ``test``; logs ``<stage>/<name>/top/p=<p>``,
    ``…/bottom/p=<p>``, ``…/random/p=<p>``, ``<stage>/<name>/clean``, ``<stage>/<name>/attacked`` (all pixels) and
    ``<stage>/<name>/bottom_at_least_top`` (share of the p for which the claim holds); writes a table and a figure.
    Accuracy is robust accuracy: images that are classified rightly clean *and* with the mask.

    Where something is left of an attack that is cut to pieces depends on the attack. ``attack_within_mask`` is the
    stronger reading: for each mask an attack that may only change the mask's pixels, and makes the most of them; it
    takes three attacks for each p, logged as ``…/top_within/p=<p>`` and so on.

    Of a module whose attacks keep to the foreground (:class:`~lightning_robust.modules.ForegroundClassifier`) both
    readings keep to it, too: what lies outside carries nothing.

    The map is complete before the first mask is made: the callback goes through this evaluation's images once itself,
    all of them, or reads a map that :class:`~lightning_robust.callbacks.InputGradientMap` wrote.

    Args:
        attack: what attacks; by default PGD-20 at L∞ 8/255 with steps of 2/255. On the whole image it goes on to the
            end, whatever ``stop_at_success`` says: an image at the decision boundary falls back when half of its
            change is taken away.
        shares: shares p of the pixels, between 0 and 1.
        map: a file ``(H, W)`` .npy, such as ``tables/input_gradient_test.npy`` of a run; else the map is measured.
        attack_within_mask: also attack within each mask.
        limit_images: attack the first so many images, the same on any number of devices; ``None``: all.
        acceleration: as in :class:`~lightning_robust.callbacks.AdversarialAccuracy`.
        seed: of the random pixels.
        name: starts the logged names, and those of table and figure.

    Raises:
        UserError: for settings that make no experiment, and a map that cannot be used.
    """

    def __init__(
        self,
        attack: Attack | None = None,
        shares: list[float] | None = None,
        map: str | None = None,
        attack_within_mask: bool = False,
        limit_images: int | None = None,
        acceleration: Acceleration = "exact",
        seed: int = 0,
        name: str = "masked_pgd",
    ) -> None:
        super().__init__(limit_images)
        self.attack = PGD(eps="8/255", step_size="2/255", steps=20) if attack is None else attack
        self.shares = sorted({float(share) for share in (SHARES if shares is None else shares)})
        bad = [share for share in self.shares if not 0 < share < 1]
        if not self.shares or bad:
            mend = f": did you mean {bad[0] / 100:g}?" if bad and 1 < bad[0] < 100 else ""
            raise UserError(f"MaskedPGD: shares={shares} are shares of the pixels between 0 and 1, such as 0.1{mend}")
        if acceleration not in ("exact", "bf16", "none"):
            raise UserError(f"MaskedPGD: acceleration={acceleration!r}: choose exact, bf16 or none")
        if not name or "/" in name:
            raise UserError(f"MaskedPGD: {name!r} cannot be a name: it becomes part of logged and file names")
        self.map, self.attack_within_mask = map, attack_within_mask
        self.acceleration, self.seed, self.name = acceleration, seed, name
        self._given: Tensor | None = None
        self._rows: tuple[str, list[dict[str, Any]]] | None = None

    @property
    def state_key(self) -> str:
        """Several of them may live in one trainer."""
        return self._generate_state_key(name=self.name)

    @property
    def readings(self) -> list[str]:
        """The kinds of masks, and how they are used: "top", "bottom", "random", and the same with "_within"."""
        return [*_KINDS, *(f"{kind}_within" for kind in _KINDS if self.attack_within_mask)]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Read the map, if there is one, before anything runs.

        Raises:
            UserError: for a map that cannot be used.
        """
        refuse_same_name(trainer, self, self.name)
        if self.map is not None:
            self._given = load_map(self.map, image_size(pl_module))

    def start(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Fresh counts, and the whole map."""
        cells = [_cell(reading, share) for reading in self.readings for share in self.shares]
        self._metric = CellAccuracy(["clean", "attacked", *cells]).to(module.device)
        self._search = Search(self.acceleration)
        self._progress = AttackProgress.of(trainer)
        values = self._given if self._given is not None else measured_map(trainer, module, "MaskedPGD")
        self._map = values.to(module.device)
        if self._given is None:
            publish_array(trainer, f"{self.name}_map", stage, values)

    # -- attacking -----------------------------------------------------------------------------------------------------

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, index: int) -> None:
        """Attack a batch and cut the result to pieces."""
        # hooks of callbacks run outside autocast, but a user may have entered it
        with torch.autocast(module.device.type, enabled=False):
            images, labels = batch.images.to(module.dtype), batch.labels
            with torch.no_grad():
                clean = module(images).argmax(1) == labels
            self._metric.update("clean", clean)
            rows = clean.nonzero()[:, 0]  # what is misclassified to begin with is not robust
            allowed = attack_mask(module, batch)
            if allowed is not None:
                allowed = expand_mask(allowed, images)[rows]
            found = self._attack(module, images[rows], labels[rows], allowed) if len(rows) else {}
            for cell in self._metric.cells:
                if cell != "clean":
                    right = torch.zeros_like(clean)
                    if cell in found:
                        right[rows] = found[cell]
                    self._metric.update(cell, right)
        if self._progress:
            self._progress.done()

    def _attack(
        self, module: pl.LightningModule, images: Tensor, labels: Tensor, allowed: Tensor | None
    ) -> dict[str, Tensor]:
        """Of each cell, which images are still classified rightly ``(n,)``."""
        found: dict[str, Tensor] = {}
        adversarial = self._run(module, self.attack.to_the_end(), images, labels, allowed, "all pixels").images
        found["attacked"] = _right(module, adversarial, labels)
        keys = image_keys(images, mix_seed(self.seed))
        drawn = uniform(keys, torch.Size((len(images), *self._map.shape)), torch.float64)
        orders = {"top": self._map, "bottom": -self._map, "random": drawn}
        for kind, order in orders.items():
            for share in self.shares:
                mask = top_pixels(order, share)  # (H, W), of the random ones (n, H, W)
                chosen = mask if mask.dim() == 2 else mask[:, None]
                found[_cell(kind, share)] = _right(module, torch.where(chosen, adversarial, images), labels)
                if self.attack_within_mask:
                    what = f"{kind} {share:.0%}"
                    within = chosen if allowed is None else chosen * allowed
                    result = self._run(module, self.attack, images, labels, within, what)
                    found[_cell(f"{kind}_within", share)] = ~result.success
        return found

    def _run(
        self, module: pl.LightningModule, attack: Attack, images: Tensor, labels: Tensor, mask: Tensor | None, what: str
    ) -> Any:
        return attack.run(
            module,
            images,
            labels,
            mask=mask,
            stand_in=self._search.model(module),
            rounding=False,
            progress=self._progress.reporter(f"{self.name} {what}") if self._progress else None,
        )

    # -- publishing ----------------------------------------------------------------------------------------------------

    def publish(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Log on every rank, write and draw."""
        values = self._metric.compute()
        rows: list[dict[str, Any]] = []
        for share in self.shares:
            found = {reading: float(values[_cell(reading, share)]) for reading in self.readings}
            holds = {"bottom_at_least_top": found["bottom"] >= found["top"]}
            if self.attack_within_mask:
                holds["bottom_at_least_top_within"] = found["bottom_within"] >= found["top_within"]
            pixels = int(top_pixels(self._map, share).sum())
            rows.append({"p": round(100 * share, 6), "pixels": pixels, **found, **holds})
        held = {
            what: sum(row[what] for row in rows) / len(rows) for what in rows[0] if what.startswith("bottom_at_least")
        }
        log(module, {f"{stage}/{self.name}/{name}": value for name, value in {**values, **held}.items()})
        publish_table(trainer, self.name, stage, rows)
        if trainer.is_global_zero:
            self._draw(trainer, stage, rows, float(values["clean"]), float(values["attacked"]))
            self._rows = stage, rows
        self._search = Search(self.acceleration)  # the copy of the weights is of no further use

    def _draw(self, trainer: pl.Trainer, stage: str, rows: list[dict[str, Any]], clean: float, attacked: float) -> None:
        nothing = float("nan")
        lines = {}
        for reading in self.readings:
            within = reading.endswith("_within")
            label = (_WITHIN if within else _KINDS)[reading.removesuffix("_within")]
            lines[label] = [clean, *(row[reading] for row in rows), nothing if within else attacked]
        attack = f"{type(self.attack).__name__}, {budget(self.attack.threat_model)} ({stage})"
        dashed = "; dashed: attacked within the mask" if self.attack_within_mask else ""
        figure = curve(
            [0, *(row["p"] for row in rows), 100],
            lines,
            xlabel="p: share of the pixels that carry the attack (%)",
            ylabel="robust accuracy",
            title=f"Robust accuracy where p % of the pixels carry the attack\n{attack}{dashed}",
        )
        drawn = list(zip(figure.axes[0].lines, figure.legends[0].legend_handles, strict=True))
        for (line, handle), (whole, _) in zip(drawn[len(_KINDS) :], drawn, strict=False):
            for part in (line, handle):
                part.set(color=whole.get_color(), linestyle="--")  # type: ignore[union-attr]
        publish_figure(trainer, self.name, stage, figure)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Print the table."""
        rows, self._rows = self._rows, None
        if rows is None:
            return
        end_bar(trainer, pl_module, stage)
        shown = [
            {
                "p": f"{row['p']:g} %",
                **{reading.replace("_", " "): f"{100 * row[reading]:.2f} %" for reading in self.readings},
                "bottom ≥ top": "yes" if row["bottom_at_least_top"] else "NO",
            }
            for row in rows[1]
        ]
        print_table(f"Robust accuracy where p % of the pixels carry the attack ({rows[0]})", shown)


def _cell(reading: str, share: float) -> str:
    return f"{reading}/p={100 * share:g}"


def _right(module: pl.LightningModule, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        right: Tensor = module(images).argmax(1) == labels
    return right

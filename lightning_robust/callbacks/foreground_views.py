"""What the foreground study shows a classifier, and where each attacker may change it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_robust.batch import Batch
from lightning_robust.errors import UserError
from lightning_robust.models import ForegroundNetwork, compose, grow_masks

WHOLE, GIVEN, PREDICTED = "whole", "given", "predicted"
FOREGROUND, IMAGE, HELD, MASKS = "foreground", "image", "held", "masks"


@dataclass(frozen=True)
class View:
    """One way in which images come to a classifier.

    Attributes:
        model: "classifier", which takes images as they are, or "network", with a mask predictor before it.
        images: ``(N, C, H, W)`` that it is given.
        attackers: name to where the attacker may change them, ``(N, 1, H, W)`` bool; ``None``: everywhere.
        held: what the attacker works on who leaves predicted masks as they are: the images that they leave and the
            masks.
    """

    model: str
    images: Tensor
    attackers: dict[str, Tensor | None]
    held: tuple[Tensor, Tensor] | None = None


def names_of_views(module: pl.LightningModule, radii: list[int]) -> dict[str, list[str]]:
    """The views of a module, and the attackers of each."""
    views = {WHOLE: [FOREGROUND, IMAGE], GIVEN: [FOREGROUND, IMAGE]}
    for radius in radii:
        views |= {f"dilated_{radius}": [FOREGROUND], f"eroded_{radius}": [FOREGROUND]}
    if isinstance(getattr(module, "network", None), ForegroundNetwork):
        views[PREDICTED] = [FOREGROUND, IMAGE, HELD, MASKS]
    return views


def own_view(module: pl.LightningModule) -> str:
    """The view that a module was made for."""
    return {"given": GIVEN, "predicted": PREDICTED}.get(str(getattr(module, "masks", "")), WHOLE)


def own_attacker(view: str) -> str:
    """The attacker of the source: changes what the classifier sees."""
    return FOREGROUND if view == GIVEN else IMAGE


def models_of(module: pl.LightningModule) -> dict[str, nn.Module]:
    """The classifier alone, and the network with its mask predictor where it has one."""
    network: Any = getattr(module, "network", module)
    return {"classifier": getattr(network, "classifier", network) if _predicts(module) else network, "network": network}


def views_of(module: pl.LightningModule, batch: Batch, radii: list[int]) -> dict[str, View]:
    """All views of a batch.

    Args:
        module: any classifier; a :class:`~lightning_robust.modules.ForegroundClassifier` cuts images out as it is set,
            others are shown black backgrounds.
        batch: whole images, with their masks.
        radii: by which masks are dilated and eroded.

    Raises:
        UserError: for a batch without masks.
    """
    images, masks = batch.images, batch.mask
    if masks is None:
        raise UserError(
            "ForegroundStudy needs masks, and the batches are (images, labels): give data with masks, such as GTSRBIC, "
            "COCOIC, MaskedImageFolder or MNIST with masks"
        )
    masks = (masks[:, None] if masks.dim() == 3 else masks).bool()
    views = {WHOLE: View("classifier", images, {FOREGROUND: masks, IMAGE: None})}
    shown, seen = _cut_out(module, images, masks, 0)
    views[GIVEN] = View("classifier", shown, {FOREGROUND: seen, IMAGE: None})
    for radius in radii:
        for name, grow in ((f"dilated_{radius}", radius), (f"eroded_{radius}", -radius)):
            shown, seen = _cut_out(module, images, masks, grow)
            views[name] = View("classifier", shown, {FOREGROUND: seen})
    network = getattr(module, "network", None)
    if isinstance(network, ForegroundNetwork):
        with torch.no_grad():
            found = network.predict_masks(images)
            left = compose(images, found, network.fill, network.noise_key)
        views[PREDICTED] = View("network", images, {FOREGROUND: masks, IMAGE: None}, (left, found))
    return views


def _predicts(module: pl.LightningModule) -> bool:
    return isinstance(getattr(module, "network", None), ForegroundNetwork)


def _cut_out(module: pl.LightningModule, images: Tensor, masks: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    cut: Any = getattr(module, "cut_out", None)
    if cut is None:
        masks = grow_masks(masks, radius)
        return compose(images, masks), masks
    found: tuple[Tensor, Tensor] = cut(images, masks, int(getattr(module, "grow", 0)) + radius)
    return found

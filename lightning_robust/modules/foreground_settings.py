"""What finds the masks of a foreground classifier, as plain settings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_robust.errors import UserError
from lightning_robust.models import create_segmenter
from lightning_robust.models.segmentation import SEGMENTERS, SegmenterName


@dataclass(frozen=True, kw_only=True)
class SegmenterSettings:
    """The mask predictor of a :class:`~lightning_robust.modules.ForegroundClassifier`.

    Args:
        name: "unet", or one of torchvision's, see :func:`~lightning_robust.models.create_segmenter`.
        width: of the U-Net.
        depth: of the U-Net.
        pretrained: torchvision's networks begin with published weights of their backbone.
        weights: start from this file: a state dict, or a checkpoint of a ForegroundClassifier with such a segmenter.
        soft: the mask is the sigmoid of the segmenter's logit, and not its threshold.
        temperature: of that sigmoid, by which the gradient goes through a threshold, too.
    """

    name: SegmenterName = "unet"
    width: int = 16
    depth: int = 3
    pretrained: bool = False
    weights: str | None = None
    soft: bool = False
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in SEGMENTERS:
            raise UserError(f"segmenter.name={self.name!r}: choose from {', '.join(SEGMENTERS)}")
        if not self.temperature > 0:
            raise UserError(f"segmenter.temperature={self.temperature}: give a positive number")

    def build(self, image_shape: tuple[int, int, int]) -> nn.Module:
        """The network: images ``(N, C, H, W)`` in [0, 1] to logits ``(N, 1, H, W)``.

        Raises:
            UserError: for settings that do not fit the images, and weights that cannot be had.
        """
        return create_segmenter(
            self.name,
            image_shape,
            pretrained=self.pretrained,
            weights=self.weights,
            width=self.width,
            depth=self.depth,
        )

    def to_plain(self) -> dict[str, Any]:
        """As a checkpoint holds them, which brings the weights itself."""
        return {**dataclasses.asdict(self), "pretrained": False, "weights": None}

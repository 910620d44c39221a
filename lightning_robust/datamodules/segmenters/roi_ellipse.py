"""The ellipse in the region of interest: no look at the image at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_robust.datamodules.segmenters.base import BoolArray, Box, Pixels, checked_range, ellipse


@dataclass(frozen=True, kw_only=True)
class RoiEllipse:
    """The ellipse that the annotated region of interest holds: exact for round signs seen from the front.

    Args:
        scale: Its axes, as a multiple of the region's sides.

    Raises:
        UserError: for a number out of range.
    """

    scale: float = 1.0
    name: ClassVar[str] = "ellipse"
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        checked_range(self, "scale", 0.05, 10)

    def check(self) -> None:
        """It needs no library."""

    def __call__(self, image: Pixels, box: Box, key: int) -> BoolArray:
        """The ellipse, whatever the image shows."""
        return ellipse((image.shape[0], image.shape[1]), box.scaled(self.scale))

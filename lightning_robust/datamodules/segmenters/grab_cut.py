"""GrabCut (Rother, Kolmogorov & Blake, SIGGRAPH 2004) by OpenCV."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lightning_robust.datamodules.segmenters.base import BoolArray, Box, Pixels, checked_range, ellipse, require
from lightning_robust.datamodules.segmenters.regular import regular


@dataclass(frozen=True, kw_only=True)
class GrabCut:
    """OpenCV's GrabCut: mixtures of Gaussians of colours, and cuts, in turns; it starts from the region of interest.

    What is found is filled and its convex hull taken, as with :class:`GraphCut`: the mixtures otherwise settle on one
    of a sign's two colours, the more so the more turns there are.

    Args:
        iterations: Turns.
        core: Axes of the ellipse that is foreground for certain, as a share of the region's sides; 0 for none.
        convex: Whether to take the convex hull.

    Raises:
        UserError: for a number out of range.
    """

    iterations: int = 1
    core: float = 0.5
    convex: bool = True
    name: ClassVar[str] = "grab_cut"
    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        checked_range(self, "iterations", 1, 100)
        checked_range(self, "core", 0, 1)

    def check(self) -> None:
        """Say early that OpenCV is missing."""
        require("cv2", "the segmenter grab_cut")

    def __call__(self, image: Pixels, box: Box, key: int) -> BoolArray:
        """Find the object in the box."""
        cv2: Any = importlib.import_module("cv2")

        height, width = image.shape[:2]
        labels = np.full((height, width), cv2.GC_BGD, dtype=np.uint8)
        top, left = (max(int(np.floor(value)), 1) for value in (box.top, box.left))
        bottom, right = min(int(np.ceil(box.bottom)) + 1, height - 1), min(int(np.ceil(box.right)) + 1, width - 1)
        labels[top:bottom, left:right] = cv2.GC_PR_FGD
        if not (labels == cv2.GC_PR_FGD).any():
            return np.zeros((height, width), dtype=bool)
        if self.core:
            labels[ellipse((height, width), box.scaled(self.core))] = cv2.GC_FGD
        cv2.setNumThreads(1)
        cv2.setRNGSeed(key % 2**31)
        models = np.zeros((1, 65)), np.zeros((1, 65))
        blue_first = np.ascontiguousarray(image[..., ::-1])
        cv2.grabCut(blue_first, labels, None, *models, self.iterations, cv2.GC_INIT_WITH_MASK)
        return regular((labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD), self.convex)

"""Segmentation of a centred object by colour and a minimal cut (Boykov & Jolly, ICCV 2001)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from lightning_robust.datamodules.segmenters.base import BoolArray, Box, Pixels, checked_range, require
from lightning_robust.datamodules.segmenters.regular import regular

Reals = npt.NDArray[np.float64]

_HARD = 1e6  # the capacity that ties a seed to its side
_RIGHT = np.array([[0, 0, 0], [0, 0, 1], [0, 0, 0]])
_DOWN = np.array([[0, 0, 0], [0, 0, 0], [0, 1, 0]])
_COLORS = 256  # background colours at most


@dataclass(frozen=True, kw_only=True)
class GraphCut:
    """Colour-based graph cut for objects that are centred, regular and stand out: traffic signs.

    After the segmenter of Vaishnavi et al. (arXiv 1911.11946), who say that seed pixels are drawn at random near the
    centre and that the minimal cut follows colour. All numbers are ours: no more is published.

    Seeds near the centre are foreground, the image's border is background. Each side's colours make a kernel density;
    a seed whose colour is rather the background's is dropped. A pixel's own weight is the log ratio of the densities,
    and a prior that it lies near the centre; neighbours (4 each) hold together by ``smoothness`` · exp(−‖ΔRGB‖² / 2σ²),
    σ² being the image's mean. PyMaxflow finds the cut. Of what is cut out, the part in the middle is kept, its holes
    are filled and, since signs are convex, its convex hull is taken.

    Args:
        seeds: Foreground seeds that are drawn.
        spread: Standard deviation of their distance from the centre, as a share of the image's sides.
        border: Width of the background frame, as a share of the sides; at least one pixel.
        bandwidth: Of the kernel densities, in pixel units of [0, 1].
        smoothness: Weight of two equal neighbours.
        prior: Weight of the distance from the centre; 0 for none.
        radius: Where the prior changes its sign, as a share of the sides.
        reject: A seed is dropped where the background's density exceeds so many times the other seeds'.
        convex: Whether to take the convex hull.
        work_size: Larger images are segmented at so many pixels of their longer side.

    Raises:
        UserError: for numbers out of range.
    """

    seeds: int = 80
    spread: float = 0.2
    border: float = 0.05
    bandwidth: float = 0.08
    smoothness: float = 4.0
    prior: float = 3.0
    radius: float = 0.45
    reject: float = 2.0
    convex: bool = True
    work_size: int = 48
    name: ClassVar[str] = "graph_cut"
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for setting, low, high in (
            ("seeds", 1, 10_000),
            ("spread", 0.01, 1),
            ("border", 0, 0.3),
            ("bandwidth", 0.005, 1),
            ("smoothness", 0, 1000),
            ("prior", 0, 1000),
            ("radius", 0.05, 1),
            ("reject", 0, 1e6),
            ("work_size", 8, 1024),
        ):
            checked_range(self, setting, low, high)

    def check(self) -> None:
        """Say early that PyMaxflow is missing."""
        require("maxflow", "the segmenter graph_cut")

    def __call__(self, image: Pixels, box: Box, key: int) -> BoolArray:
        """Find the object; ``box`` is not used."""
        height, width = image.shape[:2]
        scale = self.work_size / max(height, width)
        if scale >= 1:
            return self._segment(image, key)
        size = max(round(width * scale), 3), max(round(height * scale), 3)
        mask = self._segment(np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)), key)
        return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))

    def _segment(self, image: Pixels, key: int) -> BoolArray:
        rng = np.random.default_rng(key)
        height, width = image.shape[:2]
        # dark images are as common as bright ones: stretch them, and lift their shadows
        pixels = image / 255
        pixels = np.clip(pixels / max(float(np.percentile(pixels, 98)), 0.02), 0, 1) ** 0.7
        frame = _frame(height, width, self.border)
        rows, columns = (np.arange(n)[:, None] / n + 0.5 / n - 0.5 for n in (height, width))
        distance = np.hypot(rows, columns.T)

        drawn = rng.normal(0, self.spread, (4 * self.seeds, 2))
        near = drawn[np.hypot(*drawn.T) < 1.8 * self.spread][: self.seeds]
        seed_rows, seed_columns = (
            np.clip(((near[:, axis] + 0.5) * n).astype(int), 0, n - 1) for axis, n in enumerate((height, width))
        )
        inside = ~frame[seed_rows, seed_columns]
        seed_rows, seed_columns = seed_rows[inside], seed_columns[inside]
        outside = pixels[frame]
        outside = outside[rng.permutation(len(outside))[:_COLORS]]
        if not len(seed_rows):
            return np.zeros((height, width), dtype=bool)
        background = _density(pixels, outside, self.bandwidth)
        own = _density(pixels[seed_rows, seed_columns][None], pixels[seed_rows, seed_columns], self.bandwidth)[0]
        others = own - 1 / len(own)  # a seed is no witness for itself
        kept = (background[seed_rows, seed_columns] <= self.reject * others) | (
            distance[seed_rows, seed_columns] < 0.15
        )
        seed_rows, seed_columns = seed_rows[kept], seed_columns[kept]
        if not len(seed_rows):
            return np.zeros((height, width), dtype=bool)
        foreground = _density(pixels, pixels[seed_rows, seed_columns], self.bandwidth)
        weight = np.clip(np.log((foreground + 1e-3) / (background + 1e-3)), -3, 3)
        weight += self.prior * (1 - (distance / self.radius) ** 2)
        source, sink = np.maximum(weight, 0), np.maximum(-weight, 0)
        sink[frame] = _HARD
        source[seed_rows, seed_columns], sink[seed_rows, seed_columns] = _HARD, 0
        return regular(_cut(pixels, source, sink, self.smoothness), self.convex)


def _frame(height: int, width: int, share: float) -> BoolArray:
    """The image's border."""
    frame = np.ones((height, width), dtype=bool)
    rows, columns = (max(1, round(share * n)) for n in (height, width))
    frame[rows:-rows, columns:-columns] = False
    return frame


def _density(pixels: Reals, colors: Reals, bandwidth: float) -> Reals:
    """Mean Gaussian kernel of the colours (K, 3), unnormalised, at each pixel (H, W, 3); returns (H, W) in [0, 1]."""
    flat = pixels.reshape(-1, 3)
    squared = (flat**2).sum(1)[:, None] + (colors**2).sum(1) - 2 * flat @ colors.T
    return np.exp(-squared / (2 * bandwidth**2)).mean(1).reshape(pixels.shape[:2])


def _cut(pixels: Reals, source: Reals, sink: Reals, smoothness: float) -> BoolArray:
    """The minimal cut of the grid of pixels (H, W, 3) with weights (H, W) to both sides; True on the source's side."""
    import maxflow

    height, width = source.shape
    right, down = ((np.diff(pixels, axis=axis) ** 2).sum(-1) for axis in (1, 0))
    variance = max((right.mean() + down.mean()) / 2, 1e-6)
    graph = maxflow.Graph[float](height * width, 2 * height * width)
    nodes = graph.add_grid_nodes((height, width))
    for squared, structure, pad in ((right, _RIGHT, ((0, 0), (0, 1))), (down, _DOWN, ((0, 1), (0, 0)))):
        weights = np.pad(smoothness * np.exp(-squared / (2 * variance)), pad)
        graph.add_grid_edges(nodes, weights, structure, symmetric=True)
    graph.add_grid_tedges(nodes, source, sink)
    graph.maxflow()
    return ~np.asarray(graph.get_grid_segments(nodes), dtype=bool)

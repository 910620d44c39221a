"""Figures that say how good segmented masks are, where no true masks are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lightning_robust.datamodules.segmenters import BoolArray, Box
from lightning_robust.datamodules.selection import Rows
from lightning_robust.metrics.pixels import intersection_over_union


def box_mask(size: tuple[int, int], box: Box) -> BoolArray:
    """The pixels whose centres lie in a box; (H, W)."""
    rows, columns = np.arange(size[0])[:, None], np.arange(size[1])[None]
    inside: BoolArray = (rows >= box.top) & (rows <= box.bottom) & (columns >= box.left) & (columns <= box.right)
    return inside


def bounding_box(mask: BoolArray) -> Box:
    """The smallest box around a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return Box(float(columns[0]), float(rows[0]), float(columns[-1]), float(rows[-1]))


def failed(mask: BoolArray, least: float, most: float) -> bool:
    """Whether a mask covers less of its image than ``least`` or more than ``most``."""
    return not least <= mask.mean() <= most


def quality_rows(
    masks: Sequence[BoolArray],
    boxes: Sequence[Box],
    labels: Rows,
    class_names: Sequence[str],
    least: float,
    most: float,
    shapes: Sequence[BoolArray] | None = None,
) -> list[dict[str, Any]]:
    """A row for all images and one for each class.

    * ``foreground``: mean share of the pixels that are foreground.
    * ``failed``: share of the images whose mask covers less than ``least`` or more than ``most``.
    * ``roi_iou``: mean intersection over union of mask and region of interest; π/4 is that of a perfect round sign and
      1/2 that of a triangle.
    * ``box_iou``: mean intersection over union of the mask's bounding box and the region of interest: 1 is perfect.
    * ``shape_iou``, ``shape_covered``: where shapes are given, mean intersection over union of mask and shape, and the
      mean share of the shape that the mask covers.
    """
    names = ["foreground", "failed", "roi_iou", "box_iou"] + ["shape_iou", "shape_covered"] * (shapes is not None)
    figures = np.zeros((len(masks), len(names)))
    for row, (mask, box) in enumerate(zip(masks, boxes, strict=True)):
        region = box_mask(mask.shape, box)
        tight = box_mask(mask.shape, bounding_box(mask)) if mask.any() else mask
        figures[row, :4] = mask.mean(), failed(mask, least, most), _iou(mask, region), _iou(tight, region)
        if shapes is not None:
            figures[row, 4:] = _iou(mask, shapes[row]), (mask & shapes[row]).sum() / max(shapes[row].sum(), 1)
    parts = [("all", np.arange(len(masks)))]
    parts += [(name, np.flatnonzero(labels == number)) for number, name in enumerate(class_names)]
    return [
        {"class": name, "images": len(rows)} | dict(zip(names, figures[rows].mean(0).tolist(), strict=True))
        for name, rows in parts
        if len(rows)
    ]


def _iou(one: BoolArray, other: BoolArray) -> float:
    return float(intersection_over_union(torch.from_numpy(one), torch.from_numpy(other)))

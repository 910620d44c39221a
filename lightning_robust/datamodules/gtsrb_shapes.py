"""The shapes of German traffic signs, against which masks are judged."""

from __future__ import annotations

from typing import Final

import numpy as np

from lightning_robust.datamodules.segmenters import BoolArray, Box, ellipse

_TRIANGLES: Final = (11, *range(18, 32))  # point up; 13 points down, 12 stands on a corner, 14 has eight sides
_ROUNDED: Final = 0.05  # the width of a triangle's point, as a share of half its base


def sign_shape(label: int, size: tuple[int, int], box: Box) -> BoolArray:
    """The shape of a class of signs, upright, as large as its region of interest.

    Not a true mask: signs that are turned or seen from the side differ from it, and triangles have rounder corners.

    Args:
        label: Class number.
        size: (H, W) of the image.
        box: The region of interest.

    Returns:
        (H, W).
    """
    rows, columns = np.arange(size[0])[:, None], np.arange(size[1])[None]
    down = (rows - (box.top + box.bottom) / 2) / max((box.bottom - box.top + 1) / 2, 0.5)
    across = np.abs(columns - (box.left + box.right) / 2) / max((box.right - box.left + 1) / 2, 0.5)
    inside: BoolArray = (np.abs(down) <= 1) & (across <= 1)
    if label in _TRIANGLES:
        return inside & (across <= (1 + down) / 2 + _ROUNDED)
    if label == 13:
        return inside & (across <= (1 - down) / 2 + _ROUNDED)
    if label == 12:
        return inside & (across + np.abs(down) <= 1)
    if label == 14:
        return inside & (across + np.abs(down) <= np.sqrt(2))
    return ellipse(size, box)

"""What is known of a sign's shape before its colours are looked at: it is one piece, without holes, and convex."""

from __future__ import annotations

import numpy as np

from lightning_robust.datamodules.segmenters.base import BoolArray


def regular(mask: BoolArray, convex: bool) -> BoolArray:
    """The connected part in the middle (else the largest), without holes and thin spikes, or its convex hull."""
    from scipy import ndimage  # scikit-learn brings it

    parts, count = ndimage.label(mask)
    if not count:
        return mask
    middle = parts[mask.shape[0] // 2, mask.shape[1] // 2]
    mask = parts == (middle or 1 + np.argmax(np.bincount(parts[parts > 0])[1:]))
    mask = ndimage.binary_opening(ndimage.binary_fill_holes(mask), np.ones((3, 3)))
    return convex_hull(mask) if convex else mask


def convex_hull(mask: BoolArray) -> BoolArray:
    """The pixels whose centres lie in the convex hull of those of a mask."""
    from scipy.spatial import ConvexHull, QhullError

    points = np.argwhere(mask)
    try:
        sides = ConvexHull(points).equations
    except (QhullError, ValueError):  # fewer than three pixels, or all on a line: they are their own hull
        return mask
    grid = np.stack(np.meshgrid(*map(np.arange, mask.shape), indexing="ij"), -1).reshape(-1, 2)
    inside: BoolArray = (grid @ sides[:, :2].T + sides[:, 2] <= 1e-9).all(1).reshape(mask.shape)
    return inside

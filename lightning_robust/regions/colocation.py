"""Whether the pixels of a map lie together, as a number: Moran's I and connected components."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_robust.errors import UserError
from lightning_robust.regions.extra import require
from lightning_robust.regions.maps import check_maps

_AT_ONCE = 2**22  # values of permuted maps held at a time


@dataclass(frozen=True)
class MoranTest:
    """Moran's I against what chance gives.

    Attributes:
        i: Moran's I; NaN of a flat map.
        expected: its mean where values know nothing of their neighbours: -1 / (P - 1) for P pixels, 0 of two maps.
        p_value: share of the permutations (of two maps: moves) with an I at least as large, the map itself among them;
            NaN of a flat map.
    """

    i: float
    expected: float
    p_value: float


@dataclass(frozen=True)
class Components:
    """Connected parts of regions, pixels touching at a corner too.

    Attributes:
        count: ``(N,)`` int64, how many.
        largest: ``(N,)`` float64, share of the region's pixels in its largest part; NaN of an empty region.
    """

    count: Tensor
    largest: Tensor


def morans_i(maps: Tensor, other: Tensor | None = None) -> Tensor:
    """Moran's I: how alike the values of neighbouring pixels are (Moran, Biometrika 37, 1950).

    I = (P / W) Σ_ij w_ij z_i z_j / Σ_i z_i² with z the deviations from the map's mean, w_ij = 1 for the up to eight
    pixels around a pixel and 0 elsewhere, W = Σ w_ij, P pixels. 1: neighbours are alike; 0: they know nothing of each
    other; negative: they alternate. Of two maps it is (P / W) Σ_ij w_ij z_i z'_j / sqrt(Σ z² Σ z'²): whether one map is
    large beside where the other is (the bivariate form of Wartenberg, Geographical Analysis 17, 1985).

    Args:
        maps: ``(..., H, W)`` real values (a region as 0 and 1).
        other: ``(..., H, W)``, for the form of two maps.

    Returns:
        ``(...)`` float64; NaN for flat maps.

    Raises:
        UserError: for maps of one pixel, of different sizes, or not finite.

    Example:
        >>> board = torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 4)
        >>> round(float(morans_i(board)), 3)
        0.524
    """
    first = _deviations(maps)
    second = first if other is None else _deviations(other)
    if first.shape[-2:] != second.shape[-2:]:
        raise UserError(
            f"maps of {tuple(first.shape[-2:])} and {tuple(second.shape[-2:])} pixels: bring them to one size"
        )
    return _cross(first, second)


def morans_i_test(values: Tensor, other: Tensor | None = None, *, permutations: int = 999, seed: int = 0) -> MoranTest:
    """Moran's I with a one-sided p-value, against maps of the same values that know nothing of places.

    Of one map those are random permutations of its pixels. Of two maps they are the second one moved, over the edges
    around, by random distances: both then stay as smooth as they are. (Pixels at random would not do here: two smooth
    maps that have nothing to do with each other are nearly always farther from 0 than a smooth and a rough one.)

    Args:
        values: ``(H, W)``.
        other: ``(H, W)``, for the form of two maps.
        permutations: how many, or how many moves; the smallest p-value is 1 / (permutations + 1).
        seed: of the draws.

    Raises:
        UserError: for another shape, and fewer than one permutation.
    """
    if values.dim() != 2 or (other is not None and other.shape != values.shape):
        raise UserError(f"Moran's I is tested of one map (H, W), not of shape {tuple(values.shape)}")
    if permutations < 1:
        raise UserError(f"permutations={permutations}: at least one is needed, 999 are usual")
    found = morans_i(values, other)
    pixels = values.numel()
    expected = -1 / (pixels - 1) if other is None else 0.0
    if not bool(torch.isfinite(found)):
        return MoranTest(float("nan"), expected, float("nan"))
    first = _deviations(values).cpu()
    second = first if other is None else _deviations(other).cpu()
    generator = torch.Generator().manual_seed(seed)
    exceeding, done = 0, 0
    while done < permutations:
        count = min(permutations - done, max(1, _AT_ONCE // pixels))
        drawn = _permuted(second, count, generator) if other is None else _moved(second, count, generator)
        others = _cross(drawn if other is None else first.expand_as(drawn), drawn)
        exceeding += int((others >= float(found) - 1e-12).sum())
        done += count
    return MoranTest(float(found), expected, (1 + exceeding) / (1 + permutations))


def _permuted(values: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``(count, H, W)`` the same pixels in random places."""
    order = torch.rand(count, values.numel(), generator=generator, dtype=torch.float64).argsort(-1)
    return values.flatten()[order].view(count, *values.shape)


def _moved(values: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``(count, H, W)`` the map moved by random distances other than none; what leaves at an edge enters opposite."""
    height, width = values.shape
    distance = torch.randint(1, values.numel(), (count,), generator=generator)
    rows = (torch.arange(height) + (distance // width)[:, None]) % height
    columns = (torch.arange(width) + (distance % width)[:, None]) % width
    return values[rows[:, :, None], columns[:, None, :]]


def components(regions: Tensor) -> Components:
    """Count the connected parts of regions, eight neighbours a pixel.

    Args:
        regions: ``(N, H, W)`` bool.

    Raises:
        UserError: for another shape or type, and without scipy.
    """
    require("scipy", "counting connected components")
    import numpy as np
    from scipy import ndimage

    if regions.dim() != 3 or regions.dtype != torch.bool:
        raise UserError(f"regions of shape {tuple(regions.shape)} and type {regions.dtype}: they are (N, H, W) bool")
    near = np.zeros((3, 3, 3), dtype=bool)
    near[1] = True  # within an image, and not from one to the next
    labels, total = ndimage.label(regions.cpu().numpy(), structure=near)
    count = len(regions)
    sizes = np.bincount(labels.ravel(), minlength=total + 1)[1:]
    # a part lies in one image: that of any of its pixels
    image = np.zeros(total + 1, dtype=np.int64)
    image[labels] = np.arange(count)[:, None, None]
    counts = np.bincount(image[1:], minlength=count)
    largest = np.zeros(count)
    np.maximum.at(largest, image[1:], sizes)
    inside = regions.cpu().flatten(1).sum(1).double()
    return Components(torch.from_numpy(counts).long(), torch.from_numpy(largest) / inside)


def _deviations(maps: Tensor) -> Tensor:
    maps = check_maps(maps.double())
    if maps.shape[-2:].numel() < 2:
        raise UserError("Moran's I needs at least two pixels")
    return maps - maps.mean((-2, -1), keepdim=True)


def _around(maps: Tensor) -> Tensor:
    """Of each pixel the sum over the pixels around it: of the 3×3 square, less itself."""
    padded = F.pad(maps, (1, 1, 1, 1))
    rows = padded[..., :-2, :] + padded[..., 1:-1, :] + padded[..., 2:, :]
    return rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] - maps


def _cross(first: Tensor, second: Tensor) -> Tensor:
    height, width = first.shape[-2:]
    weights = float(_around(torch.ones(height, width, dtype=torch.float64)).sum())
    product = (first * _around(second)).sum((-2, -1))
    size = (first.square().sum((-2, -1)) * second.square().sum((-2, -1))).sqrt()
    # rounding leaves a flat map deviations of about 1e-17
    flat = size <= 1e-20 * height * width
    return torch.where(flat, float("nan"), height * width / weights * product / size.clamp_min(1e-300))

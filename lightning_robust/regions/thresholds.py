"""From a map to a region: the thresholds δ₁ and δ₂ of arXiv 2011.10794, absolute, by rank or by Otsu's method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_robust.errors import UserError
from lightning_robust.regions.maps import check_maps

Kind = Literal["absolute", "relative", "quantile", "otsu"]


@dataclass(frozen=True)
class Threshold:
    """Which pixels of a map are in its region: those at or above the threshold. A pixel of value 0 never is.

    Args:
        kind: "absolute": ``value`` in the map's own unit; "relative": ``value`` times each map's largest; "quantile":
            the ``value`` quantile of each map (0.8: the largest fifth; equal values go together); "otsu": the value
            that divides each map into the two groups of largest variance between them (Otsu, IEEE TSMC 9, 1979), over
            all of its values and not over a histogram.
        value: above 0, and below 1 for "relative" and "quantile"; none for "otsu".

    Raises:
        UserError: for a value that makes no threshold.

    Example:
        >>> Threshold("relative", 0.5).region(torch.tensor([[1.0, 4.0], [2.0, 0.0]])).int()
        tensor([[0, 1],
                [1, 0]], dtype=torch.int32)
    """

    kind: Kind = "otsu"
    value: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("absolute", "relative", "quantile", "otsu"):
            raise UserError(f"threshold kind={self.kind!r}: choose absolute, relative, quantile or otsu")
        if self.kind == "otsu":
            if self.value is not None:
                raise UserError(f"threshold otsu finds its value itself: leave value={self.value} out")
            return
        if self.value is None:
            raise UserError(f"threshold {self.kind} needs a value, for example 0.5")
        if not 0 < self.value < float("inf"):
            raise UserError(f"threshold {self.kind} value={self.value}: give a number above 0 (0 takes every pixel)")
        if self.kind != "absolute" and self.value >= 1:
            raise UserError(f"threshold {self.kind} value={self.value}: it lies between 0 and 1, for example 0.8")

    def __str__(self) -> str:
        """As tables name it."""
        if self.kind == "otsu":
            return "otsu"
        return f"{self.kind} {self.value:g}"

    def cut(self, maps: Tensor) -> Tensor:
        """The threshold of each map: ``(..., H, W)`` to ``(...)``; infinite where no value divides a map."""
        flat = check_maps(maps).flatten(-2)
        if self.kind == "absolute":
            return torch.full_like(flat[..., 0], float(self.value or 0))
        if self.kind == "relative":
            return flat.amax(-1) * float(self.value or 0)
        if self.kind == "quantile":
            # the value itself and none between two: torch.quantile takes no more than 16 million values, this does
            ordered = flat.sort(-1).values
            place = int(float(self.value or 0) * (ordered.shape[-1] - 1) + 0.5)
            return ordered[..., place]
        return _otsu(flat)

    def region(self, maps: Tensor) -> Tensor:
        """The region of each map.

        Args:
            maps: ``(..., H, W)``, 0 or more.

        Returns:
            ``(..., H, W)`` bool; it may be empty or full, which :func:`check_region` refuses.

        Raises:
            UserError: for values below 0 or not finite.
        """
        maps = check_maps(maps)
        if maps.numel() and float(maps.min()) < 0:
            raise UserError(f"a map reaches down to {float(maps.min()):.3g}: regions are cut from maps of 0 or more")
        return (maps >= self.cut(maps)[..., None, None]) & (maps > 0)


def check_region(region: Tensor, what: str, values: Tensor | None = None) -> Tensor:
    """A region that is one.

    Args:
        region: ``(H, W)`` bool.
        what: its name and threshold, for the message.
        values: ``(H, W)`` the map that it was cut from, whose range the message tells.

    Returns:
        The region.

    Raises:
        UserError: for an empty one, and for one that is the whole image.
    """
    inside = int(region.sum())
    if 0 < inside < region.numel():
        return region
    span = ""
    if values is not None and bool(torch.isfinite(values).all()):
        low, high = (float(value) for value in torch.aminmax(values))
        span = f" (the map's values lie between {low:.4g} and {high:.4g})"
    if inside == 0:
        raise UserError(f"{what} is empty{span}: lower the threshold")
    raise UserError(f"{what} is the whole image{span}: raise the threshold")


def _otsu(flat: Tensor) -> Tensor:
    """Of each row of ``(..., P)`` values the smallest of the upper group; infinite for a row of one value."""
    ordered = flat.double().sort(-1).values
    count = ordered.shape[-1]
    if count < 2:
        return torch.full_like(flat[..., 0], float("inf"))
    sums = ordered.cumsum(-1)
    below = torch.arange(1, count, device=flat.device, dtype=torch.float64)
    mean_below = sums[..., :-1] / below
    mean_above = (sums[..., -1:] - sums[..., :-1]) / (count - below)
    between = below * (count - below) * (mean_above - mean_below).square()
    parts = ordered[..., 1:] > ordered[..., :-1]  # equal values cannot be told apart
    best = torch.where(parts, between, -1.0).argmax(-1, keepdim=True)
    cut = ordered[..., 1:].gather(-1, best)[..., 0]
    return torch.where(parts.any(-1), cut, float("inf")).to(flat.dtype)

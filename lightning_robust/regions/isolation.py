"""The four regions of arXiv 2011.10794: what is important (U) and what is attacked (V), and what is not."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from lightning_robust.errors import UserError


class Region(IntEnum):
    """Number of each region; U is the region of importance, V the region of attack."""

    UV = 0
    """Important and attacked."""
    U_ONLY = 1
    """UV̄: important, not attacked."""
    V_ONLY = 2
    """ŪV: attacked, not important. What the neutralizer blanks."""
    NEITHER = 3
    """ŪV̄."""


REGION_NAMES: dict[Region, str] = {
    Region.UV: "UV: important and attacked",
    Region.U_ONLY: "UV̄: important, not attacked",
    Region.V_ONLY: "ŪV: attacked, not important",
    Region.NEITHER: "ŪV̄: neither",
}
"""Names for legends."""


def isolate(roi: Tensor, roa: Tensor) -> Tensor:
    """Which of the four regions each pixel lies in: they are disjoint and cover the image.

    Args:
        roi: ``(..., H, W)`` bool, region of importance U.
        roa: ``(..., H, W)`` bool, region of attack V.

    Returns:
        ``(..., H, W)`` int64, numbers of :class:`Region`.

    Raises:
        UserError: for masks that are not bool or not of one size.

    Example:
        >>> isolate(torch.tensor([[True, True, False, False]]), torch.tensor([[True, False, True, False]]))
        tensor([[0, 1, 2, 3]])
    """
    for name, mask in (("roi", roi), ("roa", roa)):
        if mask.dtype != torch.bool or mask.dim() < 2:
            raise UserError(f"{name} of shape {tuple(mask.shape)} and type {mask.dtype}: it is (..., H, W) bool")
    if roi.shape[-2:] != roa.shape[-2:]:
        raise UserError(
            f"roi of {roi.shape[-2]}×{roi.shape[-1]} and roa of {roa.shape[-2]}×{roa.shape[-1]} pixels: bring them to "
            "one size"
        )
    return 2 * (~roi).long() + (~roa).long()


def region_shares(regions: Tensor) -> Tensor:
    """The share of the pixels in each region.

    Args:
        regions: ``(..., H, W)`` numbers of :class:`Region`.

    Returns:
        ``(..., 4)`` float64, which sum to 1.

    Example:
        >>> region_shares(torch.tensor([[0, 2], [3, 3]]))
        tensor([0.2500, 0.0000, 0.2500, 0.5000], dtype=torch.float64)
    """
    flat = regions.flatten(-2)
    return torch.stack([(flat == region).double().mean(-1) for region in Region], dim=-1)

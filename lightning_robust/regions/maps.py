"""Maps of one value a pixel: how far an attack moved it, and a scale that all maps share."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_robust.errors import UserError


def pixel_change(clean: Tensor, adversarial: Tensor) -> Tensor:
    """How far each pixel was moved: the L2 norm of its change over the channels, sqrt(Σ_c (x_adv - x)²).

    What the region of attack is cut from (Chattopadhyay et al., arXiv 2011.10794).

    Args:
        clean: ``(N, C, H, W)`` in [0, 1].
        adversarial: the same images after the attack.

    Returns:
        ``(N, H, W)`` in the images' type, 0 or more, in pixel units.

    Raises:
        UserError: for batches of different or other shapes.

    Example:
        >>> clean = torch.zeros(1, 2, 1, 2)
        >>> pixel_change(clean, clean + torch.tensor([0.3, 0.4]).view(1, 2, 1, 1)).round(decimals=4)
        tensor([[[0.5000, 0.5000]]])
    """
    if clean.dim() != 4 or clean.shape != adversarial.shape:
        raise UserError(
            f"clean images of shape {tuple(clean.shape)} and adversarial ones of shape {tuple(adversarial.shape)}: "
            "both are (N, C, H, W)"
        )
    return (adversarial - clean).detach().square().sum(1).sqrt()


def unit_scale(maps: Tensor) -> Tensor:
    """Each map scaled to [0, 1], its smallest value to 0 and its largest to 1; a flat map to 0.

    Args:
        maps: ``(..., H, W)`` real values.

    Raises:
        UserError: for values that are not finite.

    Example:
        >>> unit_scale(torch.tensor([[2.0, 4.0], [3.0, 2.0]]))
        tensor([[0.0000, 1.0000],
                [0.5000, 0.0000]])
    """
    maps = check_maps(maps)
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny), 0.0)


def check_maps(maps: Tensor) -> Tensor:
    """Maps as float, without gradient.

    Raises:
        UserError: unless they are ``(..., H, W)`` finite real values.
    """
    if maps.dim() < 2 or 0 in maps.shape[-2:]:
        raise UserError(f"maps of shape {tuple(maps.shape)}: they are (..., H, W) with at least one pixel")
    maps = maps.detach()
    maps = maps if maps.is_floating_point() else maps.double()
    if not torch.isfinite(maps).all():
        raise UserError("a map holds NaN or infinity: the model's weights are broken, or its precision is too low")
    return maps

"""Checks of what metrics are given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_robust.errors import UserError


def check_image_size(image_size: Sequence[int], what: str) -> tuple[int, int]:
    """The size as (height, width).

    Raises:
        UserError: unless it is two positive integers.
    """
    values = tuple(image_size)
    if len(values) != 2 or not all(isinstance(value, int) and value > 0 for value in values):
        raise UserError(f"{what}: image_size={image_size!r}: it is (height, width), two positive integers")
    return values[0], values[1]


def check_classes(values: Tensor, count: int, num_classes: int, name: str) -> Tensor:
    """Class numbers as int64.

    Raises:
        UserError: unless they are ``count`` integers between 0 and ``num_classes`` - 1.
    """
    if values.shape != (count,) or values.is_floating_point() or values.dtype == torch.bool:
        raise UserError(
            f"{name} of shape {tuple(values.shape)} and type {values.dtype}: one integer class an image is needed, "
            f"here ({count},)"
        )
    values = values.detach().to(torch.int64)
    if count and not bool(((values >= 0) & (values < num_classes)).all()):
        low, high = (int(value) for value in torch.aminmax(values))
        raise UserError(f"{name} reach from {low} to {high} where {num_classes} classes are 0 to {num_classes - 1}")
    return values

"""The one reading of what a data loader yields."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from lightning_robust.errors import UserError


class Batch(NamedTuple):
    """A batch of images.

    Attributes:
        images: ``(N, C, H, W)`` float in [0, 1].
        labels: ``(N,)`` int64.
        mask: ``(N, H, W)`` or ``(N, 1, H, W)``, 1 on designated pixels, where the data has masks.
    """

    images: Tensor
    labels: Tensor
    mask: Tensor | None = None


def as_batch(values: Any) -> Batch:
    """Read ``(images, labels)`` or ``(images, labels, mask)``.

    Raises:
        UserError: for anything else.
    """
    if isinstance(values, tuple | list) and len(values) in (2, 3) and all(isinstance(v, Tensor) for v in values):
        return Batch(*values)
    raise UserError(
        f"a batch of type {type(values).__name__} cannot be read: the data loader must yield (images, labels) or "
        "(images, labels, mask)"
    )

"""Moving the pixels of a batch, each image by its own plan."""

from __future__ import annotations

from torch import Tensor


def take(images: Tensor, rows: Tensor, columns: Tensor, fill: float = 0.0) -> Tensor:
    """Images put together from rows and columns of others, differentiable.

    Args:
        images: ``(N, C, H, W)``.
        rows: ``(N, A)`` int64, which row of its image each row of the result is; below 0 or from H on: ``fill``.
        columns: ``(N, B)`` likewise.
        fill: value of pixels from outside.

    Returns:
        ``(N, C, A, B)``.

    Example:
        >>> import torch
        >>> take(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), torch.tensor([[1, 2]]), torch.tensor([[1, 0, 0]])).tolist()
        [[[[4.0, 3.0, 3.0], [0.0, 0.0, 0.0]]]]
    """
    count, channels, height, width = images.shape
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    places = (rows[:, :, None] * width + columns[:, None, :]).masked_fill(~inside, 0)
    found = images.flatten(2).gather(2, places.flatten(1)[:, None].expand(count, channels, -1))
    return found.view(count, channels, *places.shape[1:]).masked_fill(~inside[:, None], fill)

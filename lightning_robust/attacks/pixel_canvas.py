"""Vectors of an evolution (coordinates and colours of some pixels) as pictures; see :mod:`.one_pixel`."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_robust.attacks.differential_evolution import fingerprints
from lightning_robust.attacks.problem import Problem


class PixelCanvas:
    """Candidates as pixels and colours, and written into the images of a problem.

    Args:
        problem: the batch.
        pixels: d, how many pixels of a candidate may change.
        eight_bit: colours are multiples of 1/255.

    Attributes:
        usable: ``(N,)`` bool: whether any pixel of the image may change.
    """

    def __init__(self, problem: Problem, pixels: int, eight_bit: bool) -> None:
        self._clean, self._mask = problem.images, problem.mask
        self._pixels, self._eight_bit = pixels, eight_bit
        self._masked = self._mask is not None
        self.usable = torch.ones(len(self._clean), dtype=torch.bool, device=self._clean.device)
        if self._mask is None:
            return
        # the pixels that may change, row by row: how many lie up to each row's end, and their columns
        free = self._mask.ne(0).any(1)
        self._in_row = free.sum(2)
        self._up_to = self._in_row.cumsum(1)
        self._columns = free.byte().argsort(dim=2, descending=True, stable=True)
        self.usable &= self._up_to[:, -1] > 0
        if self._mask.shape[1] == 1:
            self._mask = None  # what is read lies inside; only a mask of channels matters where it is written

    def read(self, vectors: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates ``(R, P, D)`` of the images ``rows`` as places ``(R, P, d)`` and colours ``(R, P, d, C)``.

        A place is the number of a pixel, row by row, among all of the image.
        """
        _, channels, height, width = self._clean.shape
        across, down = vectors[..., : 2 * self._pixels].clamp(0, 1).chunk(2, 2)
        if self._masked:
            of = rows if len(self._up_to) > 1 else torch.zeros_like(rows)
            up_to = self._up_to[of]
            total = up_to[:, -1, None, None]
            rank = (down * total).long().minimum(total - 1)  # also how far down: pixels are counted row by row
            row = torch.searchsorted(up_to, rank.flatten(1), right=True).view_as(rank)
            each = torch.arange(len(rows), device=rows.device)[:, None, None]
            room = self._in_row[of][each, row]
            column = self._columns[of[:, None, None], row, (across * room).long().minimum(room - 1)]
        else:
            row = (down * height).long().clamp_max(height - 1)
            column = (across * width).long().clamp_max(width - 1)
        colours = vectors[..., 2 * self._pixels :].clamp(0, 1)
        if self._eight_bit:
            colours = (colours * 255).round() / 255
        return row * width + column, colours.unflatten(2, (self._pixels, channels))

    def codes(self, places: Tensor, colours: Tensor, rows: Tensor) -> Tensor:
        """Fingerprints ``(R, P)`` of what :meth:`read` gave; a pixel that keeps its colour is like any other such."""
        clean = self._clean.flatten(2)[rows]
        at = places.flatten(1)[:, None].expand(-1, clean.shape[1], -1)
        there = clean.gather(2, at).view(len(rows), -1, *places.shape[1:]).movedim(1, 3)
        kept = (colours == there).all(3)
        flat = colours.masked_fill(kept[..., None], 0).flatten(2)
        if self._eight_bit:
            numbers = (flat * 255).round().long()
        else:
            numbers = (flat + 0.0).view(torch.int64 if flat.dtype == torch.float64 else torch.int32).long()
        return fingerprints(torch.cat([places.masked_fill(kept, -1), numbers], 2))

    def written(self, places: Tensor, colours: Tensor, rows: Tensor) -> Tensor:
        """The images ``rows`` ``(n,)`` with places ``(n, d)`` in colours ``(n, d, C)``: ``(n, C, H, W)``.

        Made anew each time, since a model may keep or change what it is given.
        """
        count, channels = len(rows), self._clean.shape[1]
        places, colours = places.view(count, self._pixels), colours.reshape(count, self._pixels, channels)
        images = self._clean[rows].contiguous()
        flat = images.flatten(2)
        # one after the other: where two tuples name the same pixel the later one counts, on every device
        for turn in range(self._pixels):
            at = places[:, turn, None, None].expand(count, channels, 1)
            colour = colours[:, turn, :, None]
            if self._mask is not None:
                mask = (self._mask[rows] if len(self._mask) > 1 else self._mask.expand(count, -1, -1, -1)).flatten(2)
                colour = torch.where(mask.gather(2, at) != 0, colour, flat.gather(2, at))
            flat.scatter_(2, at, colour)
        return images

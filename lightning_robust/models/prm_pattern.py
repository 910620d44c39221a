"""Which pixels the Pixel Robustness Manipulator reads, and what can be made of them without learning anything."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_robust.errors import UserError
from lightning_robust.metrics.pixels import load_mask, stride_pattern

_WRITTEN_OUT = re.compile(r"bits:(\d+)x(\d+):([0-9a-f]*)")


@dataclass(frozen=True, kw_only=True)
class SparsePattern:
    """Which pixels the entry reads: those of a convolution without padding, or a set of one's own.

    The default is the published one: kernel 1 and stride 2, the pixels of even row and even column, 25 % of an image.
    The same code base also has (kernel, stride) = (1, (2, 1)), (1, (1, 2)), ((1, 2), (2, 4)), ((2, 1), (4, 2)), (2, 4);
    its SegNet reads the odd grid, which is ``offset=1`` here.

    Args:
        kernel: window of the convolution, one number or (rows, columns).
        stride: step between windows, likewise.
        offset: first row and column that is read, likewise. What lies before is cropped, so that no padding is read.
        mask: instead of the three: a file (.npy, .npz, .png: 0 is not read); the entry then reads x · mask at full
            size. A checkpoint has it written out (``bits:<height>x<width>:<hexadecimal digits>``) and needs no file.

    Raises:
        UserError: for numbers that are none of a pattern, and for a mask beside them.

    Example:
        >>> float(SparsePattern().pixels(8, 8).float().mean())
        0.25
    """

    kernel: int | tuple[int, int] = 1
    stride: int | tuple[int, int] = 2
    offset: int | tuple[int, int] = 0
    mask: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("kernel", 1), ("stride", 1), ("offset", 0)):
            value = getattr(self, name)
            both = (value, value) if isinstance(value, int) else tuple(value)
            if len(both) != 2 or not all(isinstance(number, int) and number >= least for number in both):
                raise UserError(
                    f"the sparse pattern's {name}={value!r} is one whole number of at least {least}, or one for rows "
                    "and one for columns"
                )
            if not isinstance(value, int):  # a config and a checkpoint hold lists
                object.__setattr__(self, name, both)
        if self.mask is not None and (self.kernel, self.stride, self.offset) != (1, 2, 0):
            raise UserError("a sparse pattern is either a mask or kernel, stride and offset: leave one of them out")

    def axes(self, name: str) -> tuple[int, int]:
        """``kernel``, ``stride`` or ``offset`` as (rows, columns)."""
        value = getattr(self, name)
        return (value, value) if isinstance(value, int) else value

    def pixels(self, height: int, width: int) -> Tensor:
        """The pixels of an image that are read: ``(H, W)`` bool.

        Raises:
            UserError: for an image that no window fits into, and a mask that is missing, broken, empty or of another
                size.
        """
        if self.mask is None:
            return stride_pattern(height, width, self.axes("kernel"), self.axes("stride"), self.axes("offset"))
        written = _WRITTEN_OUT.fullmatch(self.mask)
        if written is None:
            return load_mask(Path(self.mask).expanduser(), (height, width))
        rows, columns = int(written[1]), int(written[2])
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(written[3]), dtype=np.uint8), count=rows * columns)
        mask = torch.from_numpy(bits.astype(bool)).view(rows, columns)
        require_mask_size(mask, height, width)
        return mask

    def written_out(self, height: int, width: int) -> SparsePattern:
        """The same with the mask in place of its file, for a checkpoint that has to do without the file."""
        if self.mask is None:
            return self
        bits = np.packbits(self.pixels(height, width).numpy()).tobytes().hex()
        return dataclasses.replace(self, mask=f"bits:{height}x{width}:{bits}")


def require_reach(
    size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], offset: tuple[int, int], depth: int
) -> None:
    """Refuse an image so small that a body would pool its grid away: it must have 2**(depth - 1) cells a side.

    Args:
        size: height and width of the image.
        kernel: of the entry, as (rows, columns).
        stride: of the entry.
        offset: of the entry.
        depth: how often the body pools; 0 for none.

    Raises:
        UserError: with the depth that would do.
    """
    cells = [(size[axis] - offset[axis] - kernel[axis]) // stride[axis] + 1 for axis in (0, 1)]
    what = f"images of {size[0]}×{size[1]} pixels are smaller than the manipulator's reach"
    if min(cells) < 1:
        raise UserError(
            f"{what}: its entry (kernel {kernel[0]}×{kernel[1]}, offset {offset[0]}, {offset[1]}) connects no pixel of "
            "them; take larger images or a smaller pattern"
        )
    if min(cells) < 2 ** (depth - 1):
        raise UserError(
            f"{what}: its entry leaves {cells[0]}×{cells[1]} cells, too few for a body of depth={depth}; give a depth "
            f"of {min(cells).bit_length()} or less"
        )


def read_window(
    images: Tensor,
    mask: Tensor | None,
    channels: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    offset: tuple[int, int],
    depth: int,
) -> Tensor:
    """The part of images that the entry's convolution may read.

    Args:
        images: ``(N, C, H, W)``.
        mask: ``(H, W)`` bool, all others become 0; or ``None``.
        channels: that an image must have.
        kernel: see :func:`require_reach`.
        stride: likewise.
        offset: likewise; so many rows and columns are cropped.
        depth: likewise.

    Raises:
        UserError: for images of another shape, or too small.
    """
    if images.dim() != 4 or images.shape[1] != channels:
        raise UserError(
            f"images of shape {tuple(images.shape)}: this manipulator was made for (N, {channels}, H, W); set channels "
            "to those of the images"
        )
    height, width = images.shape[-2:]
    require_reach((height, width), kernel, stride, offset, depth)
    if mask is not None:
        require_mask_size(mask, height, width)
        images = images * mask
    return images[:, :, offset[0] :, offset[1] :]


def require_mask_size(mask: Tensor, height: int, width: int) -> None:
    """Refuse images that are not of the mask's size.

    Raises:
        UserError: naming both.
    """
    if mask.shape != (height, width):
        raise UserError(
            f"this manipulator's mask is of {mask.shape[0]}×{mask.shape[1]} pixels and the images have "
            f"{height}×{width}: bring them to one size"
        )


def fill_up(
    features: Tensor,
    images: Tensor,
    before: tuple[int, int],
    start: tuple[int, int],
    stride: tuple[int, int],
    kernel: tuple[int, int],
    multiple: int,
) -> Tensor:
    """Zeros around a map, as at the borders of every padded convolution: nothing but the connected pixels is read.

    Args:
        features: ``(N, K, h, w)``, what the entry makes of the images.
        images: ``(N, C, H, W)``, which the exit's output is to cover.
        before: rows and columns in front.
        start: see :func:`place`.
        stride: of the exit, (rows, columns).
        kernel: of the exit.
        multiple: the size becomes one of it.
    """
    around = []
    for axis in (1, 0):  # the last axis comes first
        cells = features.shape[2 + axis] + before[axis]
        steps = -(-(images.shape[2 + axis] + start[axis] - kernel[axis]) // stride[axis])
        around += [before[axis], -(-max(cells, steps + 1) // multiple) * multiple - cells]
    return torch.nn.functional.pad(features, around) if any(around) else features


def place(values: Tensor, images: Tensor, start: tuple[int, int]) -> Tensor:
    """Crop to the size of images, with zeros where nothing is; ``start``: which row and column become the first."""
    around = []
    for axis in (1, 0):
        around += [-start[axis], images.shape[2 + axis] + start[axis] - values.shape[2 + axis]]
    return torch.nn.functional.pad(values, around) if any(around) else values


def interpolate(images: Tensor, kernel: tuple[int, int], stride: tuple[int, int], offset: tuple[int, int]) -> Tensor:
    """Images made of a pattern's pixels alone: these as they are, straight lines between them, constant beyond them."""
    rows, columns = (
        _between(images.shape[-2 + axis], kernel[axis], stride[axis], offset[axis]).to(images) for axis in (0, 1)
    )
    return rows @ images @ columns.T


def _between(size: int, kernel: int, stride: int, offset: int) -> Tensor:
    """``(size, size)``: the weights that make each position of an axis from those that are read."""
    starts = range(offset, size - kernel + 1, stride)
    read = sorted({start + step for start in starts for step in range(kernel)})
    known = torch.tensor(read)
    position = torch.arange(size).clamp(read[0], read[-1])
    right = torch.searchsorted(known, position)
    left = (right - 1).clamp_min(0)
    gap = known[right] - known[left]
    share = torch.where(gap > 0, (position - known[left]) / gap.clamp_min(1), 1.0)
    weights = torch.zeros(size, size)
    weights[torch.arange(size), known[left]] = 1 - share
    weights[torch.arange(size), known[right]] += share
    return weights


def nearest(images: Tensor, index: Tensor) -> Tensor:
    """Images of which each pixel is the one that ``index`` ``(H, W)`` names by its number in the flattened image."""
    return images.flatten(2)[:, :, index.flatten()].view(images.shape)


def nearest_index(mask: Tensor) -> Tensor:
    """For every pixel the number of the nearest one that is read; ``(H, W)`` int64.

    Args:
        mask: ``(H, W)`` bool, with at least one pixel.
    """
    height, width = mask.shape
    grid = torch.cartesian_prod(torch.arange(height), torch.arange(width)).float()
    chosen = mask.flatten().nonzero()[:, 0]
    # in parts: the table of all distances of a large image would fill the memory
    found = [torch.cdist(part, grid[chosen]).argmin(1) for part in grid.split(max(1, 2**24 // len(chosen)))]
    return chosen[torch.cat(found)].view(height, width)


def checked_mask(pattern: SparsePattern, mask: Tensor | None, image_size: tuple[int, int] | None) -> Tensor | None:
    """The mask of a manipulator, if it has one in place of windows: given, or the pattern's.

    Args:
        pattern: of the manipulator.
        mask: ``(H, W)`` bool, in place of the pattern's.
        image_size: (height, width) of the images, where they are known.

    Raises:
        UserError: for both, for a mask that is none, and for a pattern's mask without an image size.
    """
    if mask is None:
        if pattern.mask is None:
            return None
        if image_size is None:
            raise UserError("a sparse pattern with a mask needs to know the images: give image_size=(height, width)")
        return pattern.pixels(*image_size)
    if pattern != SparsePattern():
        raise UserError("a manipulator's pixels are those of its mask or of its pattern: leave one of them out")
    if mask.dim() != 2 or mask.dtype != torch.bool:
        raise UserError(f"a manipulator's mask is (H, W) bool, not {tuple(mask.shape)} {mask.dtype}")
    if not mask.any():
        raise UserError("a manipulator's mask connects no pixel: at least one must be true")
    return mask.detach().clone()

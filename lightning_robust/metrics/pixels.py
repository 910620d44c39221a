"""Sets of pixels as bool masks: the top share of a map, the grid that a convolution reads, a mask from a file."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_robust.errors import UserError
from lightning_robust.metrics.checks import check_image_size


def check_share(share: float) -> float:
    """A share of an image's pixels.

    Raises:
        UserError: unless 0 < share ≤ 1.
    """
    if not 0 < share <= 1:  # written so that NaN is caught
        raise UserError(f"share={share}: it is a share of an image's pixels, above 0 and at most 1 (25 % is 0.25)")
    return float(share)


def top_pixels(map: Tensor, share: float) -> Tensor:
    """The pixels of largest value, exactly round(share · H · W) of them and at least one.

    Equal values are taken in the order of their index (row by row), so that the set is the same on every device.

    Args:
        map: ``(..., H, W)`` real values, one map or several.
        share: share of each map's pixels, above 0 and at most 1.

    Returns:
        ``(..., H, W)`` bool.

    Raises:
        UserError: for a share out of range, a map without two dimensions, and NaN.

    Example:
        >>> top_pixels(torch.tensor([[0.0, 3.0], [3.0, 3.0]]), share=0.5)
        tensor([[False,  True],
                [ True, False]])
    """
    share = check_share(share)
    if map.dim() < 2 or 0 in map.shape[-2:]:
        raise UserError(f"a map of shape {tuple(map.shape)}: maps are (..., H, W) with at least one pixel")
    if torch.isnan(map).any():
        raise UserError("the map holds NaN: its pixels have no order (a class without images has no map)")
    flat = map.detach().flatten(-2) + 0  # a sort by bit pattern may put -0.0 behind 0.0: this makes it 0.0
    count = max(1, round(share * flat.shape[-1]))
    order = flat.sort(dim=-1, descending=True, stable=True).indices
    chosen = torch.zeros(flat.shape, dtype=torch.bool, device=map.device)
    return chosen.scatter(-1, order[..., :count], True).view(map.shape)


def intersection_over_union(a: Tensor, b: Tensor) -> Tensor:
    """|A ∩ B| / |A ∪ B| of two sets of pixels.

    Args:
        a: ``(..., H, W)`` bool.
        b: ``(..., H, W)`` bool, broadcast against ``a``.

    Returns:
        ``(...)`` float64 in [0, 1]. Two empty sets have 0: nothing was found in common, and means stay free of NaN.

    Raises:
        UserError: for masks that are not bool or do not fit each other.

    Example:
        >>> float(intersection_over_union(torch.tensor([[True, True]]), torch.tensor([[True, False]])))
        0.5
    """
    for mask in (a, b):
        if mask.dtype != torch.bool or mask.dim() < 2:
            raise UserError(f"a mask of shape {tuple(mask.shape)} and type {mask.dtype}: masks are (..., H, W) bool")
    if a.shape[-2:] != b.shape[-2:]:
        raise UserError(
            f"masks of {a.shape[-2]}×{a.shape[-1]} and {b.shape[-2]}×{b.shape[-1]} pixels cannot be compared: bring "
            "them to one size"
        )
    both = (a & b).sum((-2, -1), dtype=torch.int64)
    either = (a | b).sum((-2, -1), dtype=torch.int64)
    return both.double() / either.clamp_min(1)


def stride_pattern(
    height: int,
    width: int,
    kernel: int | tuple[int, int] = 1,
    stride: int | tuple[int, int] = 2,
    offset: int | tuple[int, int] = 0,
) -> Tensor:
    """The pixels that a convolution reads: those inside one of its windows that fits into the image.

    The default is the even grid (25 % of the pixels at even sizes) that the pixel robustness manipulator of Hwang et
    al. (ICLR 2019 Debugging ML workshop) reads; ``offset=1`` is the odd grid, which kernel 1 and stride 2 with a
    padding of 1 read.

    Args:
        height: rows of the image.
        width: columns of the image.
        kernel: window, one number or (rows, columns).
        stride: step between windows, one number or (rows, columns).
        offset: first row and column of the first window, one number or (rows, columns); 0 without padding.

    Returns:
        ``(H, W)`` bool.

    Raises:
        UserError: for sizes below 1, a negative offset, or a window that does not fit.

    Example:
        >>> stride_pattern(2, 5).int()
        tensor([[1, 0, 1, 0, 1],
                [0, 0, 0, 0, 0]], dtype=torch.int32)
    """
    height, width = check_image_size((height, width), "stride_pattern")
    kernels, strides, offsets = _pair(kernel, "kernel", 1), _pair(stride, "stride", 1), _pair(offset, "offset", 0)
    rows, columns = (
        _read(size, kernels[axis], strides[axis], offsets[axis]) for axis, size in enumerate((height, width))
    )
    return rows[:, None] & columns


def _read(size: int, kernel: int, stride: int, offset: int) -> Tensor:
    """Which positions of one axis are read."""
    if offset + kernel > size:
        raise UserError(
            f"stride_pattern: a kernel of {kernel} at offset {offset} does not fit {size} pixels: take a smaller one"
        )
    position = torch.arange(size) - offset
    window = position.clamp(max=(size - offset - kernel) // stride * stride + kernel - 1)
    return (position >= 0) & (window == position) & (position % stride < kernel)


def _pair(value: int | tuple[int, int], name: str, least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(number, int) and number >= least for number in pair):
        raise UserError(f"stride_pattern: {name}={value!r}: it is one integer of at least {least}, or (rows, columns)")
    return pair[0], pair[1]


def load_mask(path: str | Path, size: tuple[int, int]) -> Tensor:
    """Read a set of designated pixels from a file; 0 is not designated, anything else is.

    Args:
        path: ``.npy`` or ``.npz`` (one array, or the one named ``mask``) of shape (H, W), or ``.png``. Of a colour
            image a pixel counts as 0 where it is black; transparency is not looked at.
        size: (height, width) that the mask must have.

    Returns:
        ``(H, W)`` bool.

    Raises:
        UserError: for a file that is missing, broken or of another kind, a mask of another size, one that holds NaN,
            and one that designates no pixel.
    """
    path, size = Path(path), check_image_size(size, "load_mask")
    readers = {".npy": _read_npy, ".npz": _read_npz, ".png": _read_png}
    if path.suffix.lower() not in readers:
        raise UserError(f"the mask {path} is of no kind that can be read: give a .npy, .npz or .png file")
    if not path.is_file():
        raise UserError(f"the mask {path} does not exist or is not a file")
    try:
        values = readers[path.suffix.lower()](path)
    except UserError:
        raise
    # what numpy, zipfile and Pillow raise for a damaged file
    except (OSError, ValueError, EOFError, SyntaxError, zipfile.BadZipFile, Image.DecompressionBombError) as error:
        raise UserError(f"the mask {path} cannot be read, the file seems broken ({error})") from error
    if values.shape != size:
        raise UserError(
            f"the mask {path} has shape {tuple(values.shape)} and the images have {size[0]}×{size[1]} pixels: bring it "
            f"to {size}"
        )
    if values.dtype.kind not in "biuf":
        raise UserError(f"the mask {path} holds {values.dtype}: a mask is of numbers or booleans")
    if np.isnan(values).any():
        raise UserError(f"the mask {path} holds NaN: write 0 for pixels that are not designated and 1 for the others")
    mask = torch.from_numpy(values != 0)
    if not mask.any():
        raise UserError(f"the mask {path} is empty: at least one pixel must be designated (not 0)")
    return mask


def _read_npy(path: Path) -> np.ndarray:
    array = np.load(path, allow_pickle=False)
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError("it is an archive: name it .npz")
    return array


def _read_npz(path: Path) -> np.ndarray:
    archive = np.load(path, allow_pickle=False)
    if isinstance(archive, np.ndarray):
        raise ValueError("it is a single array: name it .npy")
    with archive:
        names = archive.files
        if "mask" not in names and len(names) != 1:
            raise UserError(f"the mask {path} holds the arrays {', '.join(names) or 'none'}: name one of them mask")
        return archive["mask" if "mask" in names else names[0]]


def _read_png(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        if image.mode in ("1", "L", "I", "I;16", "F"):
            return np.asarray(image)
        # of a palette image the colour counts and not its number; of transparency nothing
        return np.asarray(np.asarray(image.convert("RGB")).any(-1))

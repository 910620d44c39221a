"""Masks of objects: reading, checking and resizing them, and the sources that hand them out with their images.

A mask is bool (1, H, W), or (N, 1, H, W) of a batch, True on the pixels of the object. As stored it has the size of its
image and at least one pixel; a full one is allowed and says that all of the image is object. Cutting a window out of an
image, in augmentation or for its centre, may leave a mask empty.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from lightning_robust.datamodules.dataset import UNREADABLE, FileSource, TensorSource
from lightning_robust.datamodules.selection import Rows
from lightning_robust.errors import UserError

BoolArray = npt.NDArray[np.bool_]

#: Files that keep each pixel's value.
LOSSLESS = (".png", ".bmp", ".tif", ".tiff", ".pgm", ".ppm", ".gif")


def read_mask(path: str | Path) -> BoolArray:
    """Read a mask's file: 0 is background, and 1 or 255 the object.

    Returns:
        (H, W).

    Raises:
        UserError: If the file is missing or damaged, holds other values, or has no pixel of an object.
    """
    path = Path(path)
    try:
        with Image.open(path) as image:
            values = np.asarray(image if image.mode in ("1", "L", "I", "I;16", "F") else image.convert("RGB"))
    except FileNotFoundError as error:
        raise UserError(f"the mask {path} does not exist: every image needs one of its name.") from error
    except UNREADABLE as error:
        raise UserError(f"the mask {path} cannot be read as an image ({error}): replace it.") from error
    if values.ndim == 3:
        if (values != values[..., :1]).any():
            raise UserError(f"the mask {path} is in colour: give a grey image of 0 (background) and 255 (object).")
        values = values[..., 0]
    return checked_mask(values, f"the mask {path}")


def checked_mask(values: npt.NDArray[Any], name: str) -> BoolArray:
    """Read numbers as a mask: 0 is background, and 1 or 255 (or True) the object.

    Args:
        values: (H, W).
        name: What they are called in an error.

    Returns:
        (H, W).

    Raises:
        UserError: If there are other values, or no pixel of an object.
    """
    if values.dtype == np.bool_:
        mask = values.copy()  # Pillow's arrays are read-only
    else:
        found = np.unique(values)
        objects = found[found != 0]
        if len(objects) > 1 or (len(objects) and objects[0] not in (1, 255)):
            some = ", ".join(f"{value:g}" for value in found[:6])
            raise UserError(
                f"{name} has the values {some}{', …' if len(found) > 6 else ''}: a mask is 0 on background and 1 (or "
                "255) on the object, nothing between; lossy formats such as JPEG do not keep that."
            )
        mask = values != 0
    if not mask.any():
        raise UserError(f"{name} is empty: it needs at least one pixel of an object; leave such images out.")
    return mask


def threshold_masks(images: Tensor, threshold: float) -> Tensor:
    """Masks bool (N, 1, H, W) of the pixels of grey images (N, 1, H, W) above a threshold in [0, 1].

    An image without such a pixel has its brightest ones in its mask, so that no mask is empty.
    """
    scale = 1 if images.is_floating_point() else 255
    brightest = images.amax((2, 3), keepdim=True)
    return (images > threshold * scale) | ((images == brightest) & (brightest <= threshold * scale))


def write_mask(path: Path, mask: BoolArray) -> None:
    """Write a mask (H, W) as a PNG of 0 and 255 that :func:`read_mask` reads; two colours, one bit a pixel."""
    Image.fromarray(mask).save(path, format="PNG")


def warn_of_full(full: int, count: int, name: str) -> None:
    """Say so where nine masks of ten or more cover all of their image: nothing is left to cut away.

    Args:
        full: How many do.
        count: How many were looked at.
        name: What they are called.
    """
    if count and full >= 0.9 * count:
        rank_zero_warn(
            f"{full} of {count} masks of {name} are full: all of the image is foreground there, so that a mask changes "
            "nothing; are these the right masks, at 0 on the background?"
        )


def resize_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize masks bool (..., H, W): a pixel belongs to the object if at least half of it is covered.

    Where that leaves nothing of a thin object, its most covered pixels are kept. Nearest pixels, as torchvision has it
    for masks, would be off by half a pixel against an antialiased image.
    """
    if tuple(masks.shape[-2:]) == tuple(size):
        return masks
    covered = TF.resize(masks.float(), list(size), antialias=True)
    most = covered.amax((-2, -1), keepdim=True)
    # weights sum to one up to rounding
    return (covered >= (most - 1e-4).clamp(max=0.5 - 1e-4)) & (most > 0)


def resize_mask_and_centre(mask: Tensor, size: tuple[int, int], crop_pct: float = 1.0) -> Tensor:
    """Do to a mask bool (1, H, W) what :func:`~.dataset.resize_and_centre` does to its image."""
    height, width = mask.shape[-2:]
    scale = max(size[0] / height, size[1] / width) / crop_pct
    resized = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    return TF.center_crop(resize_masks(mask, resized).byte(), list(size)).bool()


class MaskedTensorSource(TensorSource):
    """Images with masks in memory.

    Args:
        images: (N, C, H, W), uint8, or float32 in [0, 1].
        labels: Class numbers, int64 (N,).
        masks: bool (N, 1, H, W).
        groups: Numbers int64 (N,) of what must not be divided over two splits, such as shots of one sign; or None.

    Raises:
        UserError: If masks do not fit the images.
    """

    def __init__(self, images: Tensor, labels: Rows, masks: Tensor, groups: Rows | None = None) -> None:
        super().__init__(images, labels)
        wanted = (len(images), 1, *images.shape[2:])
        if masks.dtype != torch.bool or tuple(masks.shape) != wanted:
            raise UserError(
                f"masks of shape {tuple(masks.shape)} and type {masks.dtype} do not fit images of shape "
                f"{tuple(images.shape)}: they are bool {wanted}."
            )
        self.masks, self.groups = masks, groups

    def raw_mask(self, row: int) -> Tensor:
        """Return one mask (1, H, W)."""
        return self.masks[row]

    def batch_masks(self, rows: Rows) -> Tensor:
        """Return masks (N, 1, H, W)."""
        return self.masks[torch.from_numpy(rows)]

    def resized(self, size: tuple[int, int]) -> MaskedTensorSource:
        """Resize all images and masks to (height, width)."""
        images = super().resized(size).images
        masks = torch.cat([resize_masks(chunk, size) for chunk in self.masks.split(1024)])
        return MaskedTensorSource(images, self.labels, masks, self.groups)


class MaskedFileSource(FileSource):
    """Images and masks in files, decoded when they are asked for.

    Args:
        images: The images.
        folder: Folder that the masks' names are relative to.
        mask_names: File names as bytes, one for each image.
        groups: Numbers int64 (N,) of what must not be divided over two splits; or None.
    """

    def __init__(
        self, images: FileSource, folder: Path, mask_names: npt.NDArray[np.bytes_], groups: Rows | None = None
    ) -> None:
        super().__init__(images.folder, images.names, images.labels, images.channels, images.size, images.crop_pct)
        self.mask_folder, self.mask_names, self.groups = folder, mask_names, groups

    def mask_path(self, row: int) -> Path:
        """Return the mask's file of a row."""
        return self.mask_folder / os.fsdecode(self.mask_names[row])

    def raw_mask(self, row: int) -> Tensor:
        """Decode one mask at its own size; raises a UserError that names a file that does not fit."""
        mask = read_mask(self.mask_path(row))
        with Image.open(self.path(row)) as image:  # its header only
            size = image.height, image.width
        if mask.shape != size:
            raise UserError(
                f"the mask {self.mask_path(row)} is {mask.shape[0]} × {mask.shape[1]} pixels and its image "
                f"{self.path(row)} is {size[0]} × {size[1]}: bring it to the image's size."
            )
        return torch.from_numpy(mask)[None]

    def batch_masks(self, rows: Rows) -> Tensor:
        """Decode masks; resize each and cut its centre out, as its image's."""
        masks = [self.raw_mask(row) for row in rows.tolist()]
        if self.size is not None:
            masks = [resize_mask_and_centre(mask, self.size, self.crop_pct) for mask in masks]
        return torch.stack(masks)


def hold_out_groups(labels: Rows, groups: Rows, size: float, seed: int, *, name: str = "val_size") -> tuple[Rows, Rows]:
    """Divide images into kept and held-out ones so that no group is divided, each class about in proportion.

    Groups are dealt in an order that the seed decides; one is held out if that brings the classes' numbers nearer to
    their share. A warning names classes of which none is held out, where their share is of an image or more.

    Args:
        labels: Class numbers, int64 (N,).
        groups: Group numbers, int64 (N,), not negative.
        size: A share in (0, 1), or a number of images from 1 on, met as nearly as the groups allow.
        seed: Seed of the choice.
        name: What the setting is called in an error.

    Returns:
        The rows kept and the rows held out, each in ascending order.

    Raises:
        UserError: If nothing would be held out or kept.
    """
    total = len(labels)
    wanted = size if size < 1 else size / total
    _, numbers = np.unique(groups, return_inverse=True)
    order = np.argsort(numbers, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(numbers))[:-1])
    missing = np.bincount(labels) * wanted  # of each class
    left = np.bincount(labels)
    held = np.zeros(total, dtype=bool)
    for group in np.random.default_rng([seed, 3]).permutation(len(members)):
        rows = members[group]
        classes, counts = np.unique(labels[rows], return_counts=True)
        nearer = np.abs(missing[classes] - counts).sum() < np.abs(missing[classes]).sum()
        if nearer and (left[classes] > counts).all():  # every class keeps some
            held[rows] = True
            missing[classes] -= counts
            left[classes] -= counts
    if not held.any() or held.all():
        raise UserError(
            f"{name}={size} cannot be held out of {total} images in {len(members)} groups (images that belong "
            "together and are not divided): choose another value or add images."
        )
    present = np.bincount(labels)
    bare = np.flatnonzero((present > 0) & (np.bincount(labels[held], minlength=len(present)) == 0))
    if len(bare) and wanted * total >= np.count_nonzero(present):
        rank_zero_warn(
            f"{name}={size}: no image is held out of {len(bare)} of {np.count_nonzero(present)} classes (number "
            f"{', '.join(map(str, bare[:5]))}{', …' if len(bare) > 5 else ''}), whose groups of images that belong "
            "together are too large for that share: choose a larger one to measure them, too."
        )
    return np.flatnonzero(~held), np.flatnonzero(held)

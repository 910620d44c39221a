"""Data sets that hand out whole batches: images in memory or in files behind one interface."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as TF

from lightning_robust.datamodules.augmentation import Augmentation, image_keys
from lightning_robust.datamodules.selection import Rows
from lightning_robust.errors import UserError

#: What Pillow raises on files that are truncated, damaged, no images, or too large to be meant.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class ImageSource(Protocol):
    """Labelled images by row number, before any choice or augmentation."""

    labels: Rows

    def raw(self, row: int) -> Tensor:
        """Return one image (C, H, W) as it is stored, uint8, or float32 in [0, 1]."""
        ...

    def batch(self, rows: Rows) -> Tensor:
        """Return images (N, C, H, W) at the final size, uint8, or float32 in [0, 1]."""
        ...


@runtime_checkable
class MaskedSource(Protocol):
    """What a source has besides where its images have masks, True on the pixels of the object."""

    def raw_mask(self, row: int) -> Tensor:
        """Return the mask of :meth:`ImageSource.raw`'s image, bool (1, H, W)."""
        ...

    def batch_masks(self, rows: Rows) -> Tensor:
        """Return the masks of :meth:`ImageSource.batch`'s images, bool (N, 1, H, W)."""
        ...


class TensorSource:
    """Images in memory.

    Args:
        images: (N, C, H, W), uint8, or float32 in [0, 1].
        labels: Class numbers, int64 (N,).
    """

    def __init__(self, images: Tensor, labels: Rows) -> None:
        self.images, self.labels = images, labels

    def raw(self, row: int) -> Tensor:
        """Return one image (C, H, W)."""
        return self.images[row]

    def batch(self, rows: Rows) -> Tensor:
        """Return images (N, C, H, W)."""
        return self.images[torch.from_numpy(rows)]

    def resized(self, size: tuple[int, int]) -> TensorSource:
        """Resize all images to (height, width), in the dtype that they have."""
        if tuple(self.images.shape[2:]) == size:
            return self
        # In chunks: the resampling works in float and needs several times the memory of 8-bit images.
        parts = [TF.resize(chunk, list(size), antialias=True) for chunk in self.images.split(1024)]
        images = torch.cat(parts)
        # Bilinear weights sum to one only up to rounding.
        return TensorSource(images.clamp_(0, 1) if images.is_floating_point() else images, self.labels)


class FileSource:
    """Images in files, decoded when they are asked for.

    Args:
        folder: Folder that the names are relative to.
        names: File names as bytes: one flat array, which forked workers share, where a list of strings would be
            copied into each of them.
        labels: Class numbers, int64 (N,).
        channels: 3 (RGB) or 1 (grey); files of other kinds are converted.
        size: Height and width that images get, or None to leave them as they are.
        crop_pct: Share of the resized image's sides that the central window keeps.
    """

    def __init__(
        self,
        folder: Path,
        names: npt.NDArray[np.bytes_],
        labels: Rows,
        channels: int,
        size: tuple[int, int] | None,
        crop_pct: float,
    ) -> None:
        self.folder, self.names, self.labels = folder, names, labels
        self.channels, self.size, self.crop_pct = channels, size, crop_pct

    def path(self, row: int) -> Path:
        """Return the file of a row."""
        return self.folder / os.fsdecode(self.names[row])

    def raw(self, row: int) -> Tensor:
        """Decode one image at its own size; raises a UserError that names a corrupt file."""
        path = self.path(row)
        try:
            return decode(path, self.channels)
        except UNREADABLE as error:
            raise UserError(corrupt_message(path, error)) from error

    def batch(self, rows: Rows) -> Tensor:
        """Decode images, resize each and cut its centre out."""
        images = [self.raw(row) for row in rows.tolist()]
        if self.size is not None:
            images = [resize_and_centre(image, self.size, self.crop_pct) for image in images]
        for row, image in zip(rows.tolist(), images, strict=True):
            if image.shape != images[0].shape:
                raise UserError(
                    f"{self.path(row)} is {image.shape[1]} × {image.shape[2]} pixels and other images are "
                    f"{images[0].shape[1]} × {images[0].shape[2]}: give one size with --data.image_size."
                )
        return torch.stack(images)


def corrupt_message(path: Path, error: Exception) -> str:
    """Name a file that cannot be read, and the mend."""
    return (
        f"{path} cannot be read as an image ({error}): replace or remove it, or leave such files out with "
        "--data.on_corrupt skip."
    )


def decode(path: Path, channels: int) -> Tensor:
    """Read an image file.

    Args:
        path: The file.
        channels: 3 (RGB) or 1 (grey).

    Returns:
        uint8 (C, H, W).

    Raises:
        ValueError: If its pixels have more than 8 bits.
        OSError: And whatever else :data:`UNREADABLE` lists, if the file is damaged.
    """
    with Image.open(path) as image:
        # Pillow would clip such pixels to white without a word.
        if image.mode.startswith(("I", "F")):
            raise ValueError("its pixels have more than 8 bits; convert it to 8 bits")
        pixels = np.array(image.convert("RGB" if channels == 3 else "L"))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1)


def resize_and_centre(image: Tensor, size: tuple[int, int], crop_pct: float = 1.0) -> Tensor:
    """Resize so that the shorter side fits, then cut the centre out.

    Args:
        image: (C, H, W).
        size: Height and width that come out.
        crop_pct: ``size`` as a share of the resized image's fitting side.

    Returns:
        (C, *size), same dtype.
    """
    height, width = image.shape[-2:]
    scale = max(size[0] / height, size[1] / width) / crop_pct
    resized = [max(size[0], round(height * scale)), max(size[1], round(width * scale))]
    if resized != [height, width]:
        image = TF.resize(image, resized, antialias=True)
    return TF.center_crop(image, list(size))


class Samples(Sequence[tuple[Tensor, int] | tuple[Tensor, int, Tensor]]):
    """A batch that is a sequence of (image, label[, mask]) to anyone, and whole tensors to :func:`collate`."""

    def __init__(self, images: Tensor, labels: Tensor, masks: Tensor | None = None) -> None:
        self.images, self.labels, self.masks = images, labels, masks

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        image, label = self.images[index], int(self.labels[index])
        return (image, label) if self.masks is None else (image, label, self.masks[index])


def collate(batch: Samples) -> tuple[Tensor, ...]:
    """Return a batch without copying it again.

    Returns:
        Images float32 (N, C, H, W), labels int64 (N,) and, where the data has them, masks bool (N, 1, H, W): what
        :func:`lightning_robust.batch.as_batch` reads.
    """
    return (batch.images, batch.labels) if batch.masks is None else (batch.images, batch.labels, batch.masks)


class ImageDataset(Dataset[tuple[Tensor, int] | tuple[Tensor, int, Tensor]]):
    """Chosen rows of a source as a map-style data set.

    ``dataset[i]`` is ``(image float32 in [0, 1] (C, H, W), label)``, and of a :class:`MaskedSource` also the mask, bool
    (1, H, W). PyTorch's ``DataLoader`` asks for whole batches through ``__getitems__``, so that images in memory are
    sliced and scaled all at once. A key is an index or, as :class:`~lightning_robust.datamodules.EpochSampler` yields
    it, a pair (epoch, index).

    Args:
        source: Where images come from.
        rows: The rows of the source that are in this set, int64 (N,).
        labels: Their labels, int64 (N,).
        augmentation: What to do to training images, or None.

    Attributes:
        labels: int64 tensor (N,).
    """

    def __init__(self, source: ImageSource, rows: Rows, labels: Rows, augmentation: Augmentation | None = None) -> None:
        self.source, self.rows, self.augmentation = source, rows, augmentation
        self.labels = torch.from_numpy(labels)
        self._masked = source if isinstance(source, MaskedSource) else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> Any:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> Samples:
        """Return the images and labels of several keys as one batch."""
        array = np.asarray(keys, dtype=np.int64)
        epochs, indices = (array[:, 0], array[:, 1]) if array.ndim == 2 else (np.int64(0), array)
        if len(indices) and not (-len(self) <= indices.min() and indices.max() < len(self)):
            raise IndexError(f"index out of range for a data set of {len(self)} images")
        indices = indices % max(len(self), 1)
        images, masks = self._images(self.rows[indices], epochs, indices)
        if not images.is_floating_point():
            images = images.to(torch.float32).div_(255)
        return Samples(images, self.labels[torch.from_numpy(indices)], masks)

    def _images(self, rows: Rows, epochs: Any, indices: Rows) -> tuple[Tensor, Tensor | None]:
        augmentation, masked = self.augmentation, self._masked
        if not augmentation:
            return self.source.batch(rows), None if masked is None else masked.batch_masks(rows)
        keys = image_keys(augmentation.seed, epochs, indices)
        if augmentation.resized_crop is None:
            images, masks = self.source.batch(rows), None if masked is None else masked.batch_masks(rows)
        else:
            cuts = [
                augmentation.cut(self.source.raw(row), key, None if masked is None else masked.raw_mask(row))
                for row, key in zip(rows.tolist(), keys, strict=True)
            ]
            images = torch.stack([image for image, _ in cuts])
            masks = None if masked is None else torch.stack([mask for _, mask in cuts if mask is not None])
        return augmentation(images, keys, masks)

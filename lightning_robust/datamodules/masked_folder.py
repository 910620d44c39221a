"""Image files with mask files beside them, in a folder per class."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lightning_robust.datamodules.base import Split
from lightning_robust.datamodules.dataset import FileSource
from lightning_robust.datamodules.image_folder import ImageFolder
from lightning_robust.datamodules.masks import LOSSLESS, MaskedFileSource, hold_out_groups, warn_of_full
from lightning_robust.datamodules.selection import Rows
from lightning_robust.errors import UserError

_LOOKED_AT: Final = 64  # masks of a split that are read before training


class MaskedImageFolder(ImageFolder):
    """Images in ``root/images`` and their masks in ``root/masks``: the same folders, and files of the same names.

    Batches are ``(images, labels, masks bool (N, 1, H, W))``. Below ``images`` the layouts of :class:`ImageFolder`
    hold: ``images/CLASS/a.jpg`` has the mask ``masks/CLASS/a.png``, and ``images/train/CLASS/a.jpg`` the mask
    ``masks/train/CLASS/a.png``. A mask's file is lossless (.png, .bmp, .tif, …), of its image's size, 0 on background
    and 255 (or 1) on the object, and not empty; a full one means that all of the image is object, and a warning says so
    where nearly all are. That every image has a mask is checked when a split is asked for; what is in a mask, of 64 of
    a split before training, and of all when they are read (``python -m lightning_robust.datamodules`` does).

    Args:
        root: Folder that has ``images`` and ``masks``.
        group: Regular expression that finds, in an image's file name, what it belongs to: images of one group, such as
            crops of one photograph, are never divided over two splits. ``"^[^_]+"`` takes what comes before the first
            underscore. By default each image stands alone.
        **kwargs: See :class:`ImageFolder` and :class:`ImageDataModule`.

    Raises:
        UserError: As :class:`ImageFolder`; and if a folder or a mask is missing, or a mask does not fit.
    """

    def __init__(self, root: str = "data", group: str | None = None, **kwargs: Any) -> None:
        self.images_folder, self.masks_folder = Path(root) / "images", Path(root) / "masks"
        for folder in (self.images_folder, self.masks_folder):
            if not folder.is_dir():
                raise UserError(
                    f"{folder} is not a folder: point --data.root at a folder that has images/CLASS/… and masks/CLASS/…"
                )
        self._group = _pattern(group)
        self._looked_at: set[Split] = set()
        self._mask_files: dict[Path, dict[bytes, bytes]] = {}
        super().__init__(root=str(self.images_folder), **kwargs)

    def setup(self, stage: str | None = None) -> None:
        """Read what a stage needs, and look at some masks of it before a model moves to a device."""
        super().setup(stage)
        for split, (source, rows, _) in self._chosen.items():
            if split in self._looked_at or not isinstance(source, MaskedFileSource):
                continue
            some = rows[np.linspace(0, len(rows) - 1, min(len(rows), _LOOKED_AT)).astype(np.int64)]
            full = sum(bool(source.raw_mask(int(row)).all()) for row in some)
            warn_of_full(full, len(some), f"the {split} images in {source.mask_folder}")
            self._looked_at.add(split)

    def _files(self, folder: Path, names: npt.NDArray[np.bytes_], labels: Rows) -> MaskedFileSource:
        images = super()._files(folder, names, labels)
        masks = self.masks_folder / folder.relative_to(self.images_folder)
        return MaskedFileSource(images, masks, self._masks_of(images, masks), self._groups(names))

    def _part(self, folder: Path, split: Split) -> FileSource | None:
        everything = self._list(folder)
        divided = self.test_size > 0 and self.test_size != 1.0 and split != "val"
        if self._group is None or not divided:
            return super()._part(folder, split)
        groups = self._groups(everything.names)
        assert groups is not None
        kept, held = hold_out_groups(everything.labels, groups, self.test_size, self.seed, name="test_size")
        rows = kept if split == "train" else held
        return self._files(folder, everything.names[rows], everything.labels[rows])

    def _masks_of(self, images: FileSource, folder: Path) -> npt.NDArray[np.bytes_]:
        """Find the mask of each image; an error names the first image without one."""
        if folder not in self._mask_files:
            self._mask_files[folder] = _by_stem(folder)
        known = self._mask_files[folder]
        found = [known.get(os.path.splitext(name)[0]) for name in images.names.tolist()]
        lacking = [row for row, name in enumerate(found) if name is None]
        if lacking:
            path = images.path(lacking[0])
            wanted = folder / path.relative_to(images.folder).with_suffix(".png")
            raise UserError(
                f"{len(lacking)} of {len(found)} images have no mask, the first {path}: it needs {wanted} (or "
                f"{', '.join(LOSSLESS[1:4])})."
            )
        return np.array(found, dtype=np.bytes_)

    def _groups(self, names: npt.NDArray[np.bytes_]) -> Rows | None:
        """Number the groups of images."""
        if self._group is None:
            return None
        keys = []
        for name in names.tolist():
            file = Path(os.fsdecode(name)).name
            match = self._group.search(file)
            if match is None:
                raise UserError(f"group={self._group.pattern!r} finds nothing in the file name {file}: mend it.")
            keys.append(match[match.re.groups and 1])
        _, numbers = np.unique(keys, return_inverse=True)
        return numbers.astype(np.int64)


def _pattern(group: str | None) -> re.Pattern[str] | None:
    try:
        return None if group is None else re.compile(group)
    except re.error as error:
        raise UserError(f"group={group!r} is no regular expression ({error}).") from error


def _by_stem(folder: Path) -> dict[bytes, bytes]:
    """The masks' files in and below a folder, by name without suffix, relative to the folder."""
    found: dict[bytes, bytes] = {}
    for parent, _, files in os.walk(folder, followlinks=True):
        for name in files:
            if os.path.splitext(name)[1].lower() not in LOSSLESS or name.startswith("."):
                continue
            relative = Path(parent, name).relative_to(folder)
            key = os.fsencode(relative.with_suffix(""))
            if key in found:
                raise UserError(
                    f"{folder} has two masks of one image, {os.fsdecode(found[key])} and {relative}: remove one."
                )
            found[key] = os.fsencode(relative)
    return found

"""Kaggle's Dogs vs. Cats in each of the layouts in which it comes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from lightning_robust.datamodules.dataset import UNREADABLE, corrupt_message
from lightning_robust.datamodules.image_folder import _PLAIN, ImageFolder, Names, _images_in
from lightning_robust.datamodules.selection import Rows
from lightning_robust.errors import UserError

_PREFIXES = ("cat.", "dog.")  # of the flat files, in the order of the classes


class CatsDogs(ImageFolder):
    """Cats and dogs in photographs of any size: 12,500 of each (Elson et al., "Asirra", CCS 2007).

    Three layouts are told apart by themselves:

    * Kaggle's "Dogs vs. Cats" as unpacked: ``root/train/cat.0.jpg`` … ``root/train/dog.12499.jpg``. Its ``test1`` has
      no labels and is left alone; test and validation images are held out of these.
    * Microsoft's download of the same images: ``root/PetImages/Cat/0.jpg`` and ``root/PetImages/Dog/0.jpg``. A few of
      its files are damaged: give ``on_corrupt="skip"``.
    * A folder a class, with or without splits: ``root/train/cat/…``, ``root/test/dog/…`` (see :class:`ImageFolder`).

    Cats are class 0, dogs class 1. The images differ in size, so ``image_size`` is needed; 64 by default.

    Args:
        root: The folder.
        image_size: Height and width that images get.
        **kwargs: See :class:`ImageFolder`.

    Raises:
        UserError: As :class:`ImageFolder`; and for class folders of other names.
    """

    _classes: ClassVar[list[str]] = ["cat", "dog"]

    _flat = False

    def __init__(self, root: str = "data", image_size: int | tuple[int, int] | None = 64, **kwargs: Any) -> None:
        inside = Path(root) / "PetImages"
        super().__init__(root=str(inside if inside.is_dir() else root), image_size=image_size, **kwargs)

    def _split_folders(self, root: Path) -> dict[str, Path]:
        flat = _flat_folder(root)
        if flat is None:
            return super()._split_folders(root)
        self._flat = True
        return {_PLAIN: flat}

    def _common_classes(self) -> list[str]:
        if self._flat:
            return list(self._classes)
        names = super()._common_classes()
        if [name.lower() for name in names] != self._classes:
            raise UserError(
                f"{next(iter(self.folders.values()))} has the class folders {', '.join(names)}: CatsDogs is of cat and "
                "dog; for other classes take ImageFolder."
            )
        return names

    @property
    def source_shape(self) -> tuple[int, int, int]:
        """The shape that ``image_size`` says, or that of the first image."""
        if not self._flat or self.image_size is not None:
            return super().source_shape
        file = next(_images_in(self.folders[_PLAIN]))
        try:
            with Image.open(file) as image:
                return self.channels, image.height, image.width
        except UNREADABLE as error:
            raise UserError(corrupt_message(file, error)) from error

    def _scan(self, folder: Path) -> tuple[Names, Rows]:
        if not self._flat:
            return super()._scan(folder)
        if folder not in self._scans:
            names: list[bytes] = []
            labels: list[int] = []
            for label, prefix in enumerate(_PREFIXES):
                found = sorted(
                    os.fsencode(file.relative_to(folder)) for file in _images_in(folder) if file.name.startswith(prefix)
                )
                names += found
                labels += [label] * len(found)
            self._scans[folder] = np.array(names, dtype=np.bytes_), np.array(labels, dtype=np.int64)
        return self._scans[folder]


def _flat_folder(root: Path) -> Path | None:
    """The folder of Kaggle's flat files, if there is one."""
    for folder in (root / "train", root):
        if folder.is_dir():
            with os.scandir(folder) as entries:
                seen = {entry.name[:4] for entry in entries if entry.name.startswith(_PREFIXES) and entry.is_file()}
            if len(seen) == len(_PREFIXES):
                return folder
    return None

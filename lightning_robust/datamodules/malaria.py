"""The NIH's malaria cells, split by patient."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lightning_robust.datamodules.base import Split
from lightning_robust.datamodules.dataset import FileSource
from lightning_robust.datamodules.image_folder import ImageFolder
from lightning_robust.datamodules.masks import hold_out_groups
from lightning_robust.datamodules.selection import Rows
from lightning_robust.errors import UserError

_PATIENT = re.compile(r"^(C\d+)\D")  # of C51AP12ThinF_IMG_… it is C51


class Malaria(ImageFolder):
    """Red blood cells cut out of thin smears: 13,779 parasitized and 13,779 not (Rajaraman et al., PeerJ 6, 2018).

    Two layouts are told apart by themselves:

    * The National Library of Medicine's ``cell_images.zip`` as unpacked: ``root/cell_images/Parasitized/*.png`` and
      ``root/cell_images/Uninfected/*.png`` (``root`` may be the folder ``cell_images`` itself; the second copy that
      some archives have inside it is left alone). Test and validation images are held out.
    * With splits: ``root/train/Parasitized/…``, ``root/test/Uninfected/…`` (see :class:`ImageFolder`).

    What is held out is held out by patient (the ``C33`` that a file's name begins with): cells of one patient are
    alike, and a model must not be judged on patients that it knows. Parasitized is class 0, Uninfected class 1. The
    images differ in size; they are brought to ``image_size``, 64 by default.

    Args:
        root: The folder.
        image_size: Height and width that images get.
        by_patient: Whether patients stay together; off for files that are named otherwise.
        **kwargs: See :class:`ImageFolder`.

    Raises:
        UserError: As :class:`ImageFolder`; for class folders of other names, and file names that tell no patient.
    """

    _classes: ClassVar[list[str]] = ["Parasitized", "Uninfected"]

    def __init__(
        self,
        root: str = "data",
        image_size: int | tuple[int, int] | None = 64,
        by_patient: bool = True,
        **kwargs: Any,
    ) -> None:
        self.by_patient = by_patient
        inside = Path(root) / "cell_images"
        super().__init__(root=str(inside if inside.is_dir() else root), image_size=image_size, **kwargs)

    def _common_classes(self) -> list[str]:
        names = super()._common_classes()
        if names[-1] == "cell_images":  # a copy of everything, which some archives hold
            names = names[:-1]
        if names != self._classes:
            raise UserError(
                f"{next(iter(self.folders.values()))} has the class folders {', '.join(names)}: Malaria is of "
                f"{' and '.join(self._classes)}; for other classes take ImageFolder."
            )
        return names

    def _files(self, folder: Path, names: npt.NDArray[np.bytes_], labels: Rows) -> FileSource:
        source = super()._files(folder, names, labels)
        if self.by_patient:
            source.groups = self._patients(names)  # type: ignore[attr-defined]  # what the base class holds out by
        return source

    def _part(self, folder: Path, split: Split) -> FileSource | None:
        everything = self._list(folder)
        divided = self.test_size > 0 and self.test_size != 1.0 and split != "val"
        if not self.by_patient or not divided:
            return super()._part(folder, split)
        groups = self._patients(everything.names)
        kept, held = hold_out_groups(everything.labels, groups, self.test_size, self.seed, name="test_size")
        rows = kept if split == "train" else held
        return self._files(folder, everything.names[rows], everything.labels[rows])

    def _patients(self, names: npt.NDArray[np.bytes_]) -> Rows:
        found = []
        for name in names.tolist():
            file = Path(os.fsdecode(name)).name
            match = _PATIENT.match(file)
            if match is None:
                raise UserError(
                    f"the file name {file} does not begin with a patient, as C33P1… does: give --data.by_patient false "
                    "for files that are named otherwise."
                )
            found.append(match[1])
        _, numbers = np.unique(found, return_inverse=True)
        return numbers.astype(np.int64)

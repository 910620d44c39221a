"""Image files in a folder per class, small or as large as ImageNet."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from PIL import Image
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from rich.console import Console
from rich.progress import track
from torchvision.datasets.folder import IMG_EXTENSIONS

from lightning_robust.datamodules.base import ImageDataModule, Split, checked_size, cores
from lightning_robust.datamodules.dataset import UNREADABLE, FileSource, corrupt_message, decode
from lightning_robust.datamodules.selection import Rows, hold_out
from lightning_robust.errors import UserError

_FOLDERS: Final[dict[str, tuple[str, ...]]] = {
    "train": ("train",),
    "val": ("val", "valid", "validation"),
    "test": ("test",),
}
_FILES_PER_TASK: Final = 64  # a thread's portion: a future per file would need gigabytes for ImageNet
_PLAIN: Final = "all"  # key of the one folder where there are no splits
Names = npt.NDArray[np.bytes_]


class ImageFolder(ImageDataModule):
    """Images in one folder per class, the folder's name being the class's.

    Two layouts are told apart by themselves:

    * ``root/train/CLASS``, ``root/val/CLASS`` (or ``valid``) and ``root/test/CLASS``, any of them, with the same
      classes. Without ``val``, validation images are held out from ``train``. Without ``test``, as in ImageNet, the
      images of ``val`` are the test images too, and a warning says so.
    * ``root/CLASS``: the images are divided into test, validation and training images, each class in proportion.

    The constructor lists the class folders and, without ``image_size``, looks into the first image; files are listed
    when a split is asked for, and read when a batch is. Classes are numbered in the order of their sorted names, as
    torchvision does. Every image is resized so that its shorter side fits ``image_size``, and its centre is cut out;
    with the augmentation ``imagenet``, training images get a random window in place of it.

    Args:
        root: The folder.
        test_size: Share or number of images for the test split of a folder without splits; 1.0 for all of them.
        crop_pct: ``image_size`` as a share of the resized shorter side: 0.875 is ImageNet's resize to 256 and crop to
            224; 1 cuts off as little as possible.
        channels: 3 for colour, 1 for grey; images of the other kind are converted.
        on_corrupt: What to do about files that cannot be read: ``raise`` an error that names the file when it comes up,
            or check all files at the start and ``skip`` the corrupt ones.
        **kwargs: See :class:`ImageDataModule`.

    Raises:
        UserError: If the folder or its class folders are missing, a class folder has no image, splits have different
            classes, an image is corrupt, or images differ in size and ``image_size`` is not given.
    """

    def __init__(
        self,
        root: str = "data",
        test_size: int | float = 0.2,
        crop_pct: float = 1.0,
        channels: Literal[1, 3] = 3,
        on_corrupt: Literal["raise", "skip"] = "raise",
        **kwargs: Any,
    ) -> None:
        self.test_size = test_size if test_size == 1.0 else checked_size(test_size, "test_size")
        if not 0 < crop_pct <= 1:
            raise UserError(f"crop_pct={crop_pct} is not a share above 0 and at most 1.")
        if channels not in (1, 3):
            raise UserError(f"channels={channels}: give 3 for colour or 1 for grey.")
        if on_corrupt not in ("raise", "skip"):
            raise UserError(f"on_corrupt={on_corrupt!r}: give raise or skip.")
        self.crop_pct, self.channels, self.on_corrupt = float(crop_pct), channels, on_corrupt
        self.folders = self._split_folders(Path(root))
        self._names = self._common_classes()
        self._scans: dict[Path, tuple[Names, Rows]] = {}
        self._corrupt: dict[Path, dict[int, str]] = {}
        self._lists: dict[Path, FileSource] = {}
        super().__init__(root=root, **kwargs)

    @property
    def all_class_names(self) -> list[str]:
        """The sorted names of the class folders."""
        return list(self._names)

    @property
    def source_shape(self) -> tuple[int, int, int]:
        """The shape that ``image_size`` says, or that of the first image that can be opened."""
        if self.image_size is not None:
            return self.channels, *self.image_size
        folder = next(iter(self.folders.values()))
        for file in _images_in(folder / self._names[0]):
            try:
                with Image.open(file) as image:
                    return self.channels, image.height, image.width
            except UNREADABLE as error:
                if self.on_corrupt == "raise":
                    raise UserError(corrupt_message(file, error)) from error
        raise UserError(f"{folder / self._names[0]} has no image that can be read.")

    def mend(self, split: Split) -> str:
        """Say which folder is missing."""
        return (
            f"{self.root} needs a folder {split}/ with a folder per class in it, or a folder per class and no splits."
        )

    def setup(self, stage: str | None = None) -> None:
        """Check files, if corrupt ones shall be skipped, each rank its share; then read what the stage needs."""
        if self.on_corrupt == "skip":
            stages: dict[str | None, tuple[Split, ...]] = {
                "validate": ("val",),
                "test": ("test",),
                "predict": ("test",),
            }
            fit: tuple[Split, ...] = ("train", "val")
            for split in stages.get(stage, fit):
                folder = self._folder(split)
                if folder is not None:
                    self._check(folder, together=True)
        super().setup(stage)

    def read(self, split: Split) -> FileSource | None:
        """List the files of a split."""
        if _PLAIN in self.folders:
            return self._part(self.folders[_PLAIN], split)
        if split == "val" and "val" not in self.folders:
            return None
        folder = self._folder(split)
        if folder is not None and split == "test" and "test" not in self.folders:
            rank_zero_warn(f"{self.root} has no test folder: the images of {folder} are the test images too.")
        return None if folder is None else self._list(folder)

    def _folder(self, split: Split) -> Path | None:
        """Return the folder that a split's images come from."""
        instead = {"train": "train", "val": "train", "test": "val"}[split]
        for name in (_PLAIN, split, instead):
            if name in self.folders:
                return self.folders[name]
        return None

    # ---- the two layouts -----------------------------------------------------------------------------------------

    def _split_folders(self, root: Path) -> dict[str, Path]:
        """Find a root's split folders; a root that has none is one folder of classes."""
        if not root.is_dir():
            raise UserError(f"{root} is not a folder: point --data.root at a folder that has a folder per class.")
        found = {
            split: root / name
            for split, names in _FOLDERS.items()
            for name in reversed(names)
            if (root / name).is_dir()
        }
        # A class may be called "train": a split folder is one that has folders.
        if not any(_class_folders(folder) for folder in found.values()):
            others = set(_class_folders(root)) - {folder.name for folder in found.values()}
            if others or not found:
                found = {_PLAIN: root}
        for folder in found.values():
            if not _class_folders(folder):
                raise UserError(f"{folder} has no class folders: it needs one folder per class with the images in it.")
        return found

    def _part(self, folder: Path, split: Split) -> FileSource | None:
        """Return a split of a folder that has none of its own."""
        everything = self._list(folder)
        if self.test_size == 1 and isinstance(self.test_size, float):
            return everything if split == "test" else None
        if split == "val" or (split == "test" and self.test_size == 0):
            return None
        if self.test_size == 0:
            return everything
        kept, held = hold_out(everything.labels, self.test_size, self.seed, name="test_size")
        rows = kept if split == "train" else held
        return self._files(folder, everything.names[rows], everything.labels[rows])

    def _common_classes(self) -> list[str]:
        """List the class folders, which must be the same in all splits and have images."""
        names: list[str] | None = None
        for folder in self.folders.values():
            found = _class_folders(folder)
            if names is not None and found != names:
                missing, new = sorted(set(names) - set(found)), sorted(set(found) - set(names))
                first = next(iter(self.folders.values()))
                raise UserError(
                    f"{folder} has other class folders than {first}: {len(missing)} missing {missing[:3]}, "
                    f"{len(new)} additional {new[:3]}."
                )
            for name in found:
                if next(_images_in(folder / name), None) is None:
                    raise UserError(f"the class folder {folder / name} has no image: add some or remove the folder.")
            names = found
        assert names is not None
        return names

    # ---- files ---------------------------------------------------------------------------------------------------

    def _scan(self, folder: Path) -> tuple[Names, Rows]:
        """List all images by class, sorted, as names relative to the folder."""
        if folder not in self._scans:
            names: list[bytes] = []
            counts = []
            for name in self._names:
                files = sorted(os.fsencode(file.relative_to(folder)) for file in _images_in(folder / name))
                names += files
                counts.append(len(files))
            labels = np.repeat(np.arange(len(counts)), counts)
            self._scans[folder] = np.array(names, dtype=np.bytes_), labels.astype(np.int64)
        return self._scans[folder]

    def _files(self, folder: Path, names: Names, labels: Rows) -> FileSource:
        return FileSource(folder, names, labels, self.channels, self.image_size, self.crop_pct)

    def _list(self, folder: Path) -> FileSource:
        """List a folder's images once, without those to skip."""
        if folder in self._lists:
            return self._lists[folder]
        names, labels = self._scan(folder)
        if self.on_corrupt == "skip":
            self._check(folder)
            kept = np.setdiff1d(np.arange(len(names)), np.array(sorted(self._corrupt[folder]), dtype=np.int64))
            names, labels = names[kept], labels[kept]
            empty = np.flatnonzero(np.bincount(labels, minlength=len(self._names)) == 0)
            if len(empty):
                raise UserError(f"all images in {folder / self._names[empty[0]]} are corrupt: replace them.")
        source = self._files(folder, names, labels)
        if self.image_size is None:
            self._check_sizes(source)
        self._lists[folder] = source
        return source

    def _check_sizes(self, source: FileSource) -> None:
        """Compare the sizes in the files' headers, up to the first that differs."""
        wanted = self.image_shape[1:]
        for row in range(len(source.labels)):
            path = source.path(row)
            try:
                with Image.open(path) as image:
                    found = image.height, image.width
            except UNREADABLE as error:
                raise UserError(corrupt_message(path, error)) from error
            if found != wanted:
                raise UserError(
                    f"{path} is {found[0]} × {found[1]} pixels and other images are {wanted[0]} × {wanted[1]}: "
                    "give one size with --data.image_size."
                )

    def _check(self, folder: Path, together: bool = False) -> None:
        """Try to read all images of a folder once and remember the corrupt ones.

        ``together`` divides the work over the ranks of a distributed run, all of which must then call this.
        """
        if folder in self._corrupt:
            return
        together = together and dist.is_available() and dist.is_initialized()
        world_size, rank = (dist.get_world_size(), dist.get_rank()) if together else (1, 0)
        source = self._files(folder, *self._scan(folder))

        def problems(rows: range) -> dict[int, str]:
            found = {}
            for row in rows:
                try:
                    decode(source.path(row), self.channels)
                except UNREADABLE as error:
                    found[row] = str(error)
            return found

        mine = range(rank, len(source.labels), world_size)
        parts = [mine[start : start + _FILES_PER_TASK] for start in range(0, len(mine), _FILES_PER_TASK)]
        console = Console(stderr=True)
        with ThreadPoolExecutor(min(32, 2 * cores())) as pool:
            results = track(
                pool.map(problems, parts),
                description=f"checking the images in {folder}",
                total=len(parts),
                console=console,
                transient=True,
                disable=rank > 0 or not console.is_terminal,
            )
            shares = [{row: reason for part in results for row, reason in part.items()}]
        if together:
            gathered: list[dict[int, str]] = [{}] * world_size
            dist.all_gather_object(gathered, shares[0])
            shares = gathered
        corrupt = {row: reason for share in shares for row, reason in share.items()}
        self._corrupt[folder] = corrupt
        if corrupt:
            first = ", ".join(f"{source.path(row)} ({corrupt[row]})" for row in sorted(corrupt)[:3])
            rank_zero_warn(
                f"{len(corrupt)} of {len(source.labels)} images in {folder} are corrupt and left out: {first}"
                f"{', …' if len(corrupt) > 3 else '.'}"
            )


def _class_folders(folder: Path) -> list[str]:
    """Return the sorted names of a folder's folders, without hidden ones and what archives leave behind."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith((".", "__MACOSX")))


def _images_in(folder: Path) -> Iterator[Path]:
    """Yield the image files in and below a folder, sorted within each folder."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted(files):
            if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith("."):
                yield Path(parent, name)

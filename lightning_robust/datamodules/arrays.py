"""Images in NumPy files: one ``.npz``, or a pair of ``.npy``."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib import format as npy

from lightning_robust.datamodules.base import SPLITS, ImageDataModule, Split, check_labels
from lightning_robust.datamodules.dataset import TensorSource
from lightning_robust.datamodules.selection import Rows
from lightning_robust.errors import UserError

Layout = Literal["auto", "NHWC", "NCHW"]
_UNREADABLE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


class Arrays(ImageDataModule):
    """Images and labels in NumPy files, kept in memory.

    Images are uint8, or float in [0, 1]; their shape is (N, H, W), (N, H, W, C) or (N, C, H, W), the latter two told
    apart by which side has 1 or 3 channels. Labels are integers (N,) or (N, 1). All files have images of one size. A
    split without a file is missing only when it is asked for; validation images without a file of their own are held
    out from the training images. An array ``classes`` in an ``.npz`` file names the classes.

    Args:
        train: Training file: a ``.npz``, or a pair ``[images.npy, labels.npy]``.
        val: Validation file or pair.
        test: Test file or pair.
        root: Folder that relative paths start from.
        images_key: Name of the images in ``.npz`` files.
        labels_key: Name of the labels in ``.npz`` files.
        layout: ``NHWC`` or ``NCHW`` where the shape leaves it open.
        num_classes: Number of classes in the files; if not given, from the class names or the largest label.
        **kwargs: See :class:`ImageDataModule`.

    Raises:
        UserError: If a file is missing or damaged, a key is missing, or arrays do not fit together.
    """

    def __init__(
        self,
        train: list[str] | str | None = None,
        val: list[str] | str | None = None,
        test: list[str] | str | None = None,
        root: str = ".",
        images_key: str = "images",
        labels_key: str = "labels",
        layout: Layout = "auto",
        num_classes: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.images_key, self.labels_key, self.layout = images_key, labels_key, layout
        given = {"train": train, "val": val, "test": test}
        self.files = {split: _ArrayFile.of(given[split], split, root) for split in SPLITS if given[split]}
        if not self.files:
            raise UserError("Arrays has no file: give at least one of --data.train, --data.val and --data.test.")
        self._labels = {split: _labels(file, labels_key) for split, file in self.files.items()}
        self._names = self._class_names(num_classes)
        self._shape = self._common_shape()
        for split, labels in self._labels.items():
            check_labels(labels, len(self._names), str(self.files[split]))
        super().__init__(root=root, **kwargs)

    @property
    def all_class_names(self) -> list[str]:
        """The names in the files, or the class numbers as text."""
        return list(self._names)

    @property
    def source_shape(self) -> tuple[int, int, int]:
        """The shape that the files' headers say."""
        return self._shape

    def mend(self, split: Split) -> str:
        """Name the option that is missing."""
        instead = " (or --data.train and a --data.val_size above 0)" if split == "val" else ""
        return f"give its file with --data.{split}{instead}."

    def read(self, split: Split) -> TensorSource | None:
        """Read the images of a split."""
        file = self.files.get(split)
        if file is None:
            return None
        images = file.array(self.images_key)
        if _axes(images.shape, self.layout, file) == "NHWC":
            images = images.reshape(*images.shape[:3], -1).transpose(0, 3, 1, 2)
        kept = np.uint8 if images.dtype == np.uint8 else np.float32
        return TensorSource(torch.from_numpy(np.ascontiguousarray(images, dtype=kept)), self._labels[split])

    def _class_names(self, total: int | None) -> list[str]:
        named = {split: names for split, file in self.files.items() if (names := file.class_names()) is not None}
        if len({tuple(names) for names in named.values()}) > 1:
            raise UserError(f"the files {', '.join(map(str, self.files.values()))} name different classes.")
        if named:
            names = next(iter(named.values()))
            if total not in (None, len(names)):
                raise UserError(f"num_classes={total} does not fit the {len(names)} class names in the file.")
            return names
        largest = max(int(labels.max(initial=-1)) for labels in self._labels.values())
        return [str(number) for number in range(largest + 1 if total is None else total)]

    def _common_shape(self) -> tuple[int, int, int]:
        shapes: dict[Split, tuple[int, int, int]] = {}
        for split, file in self.files.items():
            shape, dtype = file.header(self.images_key)
            if dtype != np.uint8 and dtype.kind != "f":
                raise UserError(
                    f"{file} has images of type {dtype}: give uint8 of one size (0 to 255), or float in [0, 1]."
                )
            if shape and shape[0] != len(self._labels[split]):
                raise UserError(f"{file} has {shape[0]} images and {len(self._labels[split])} labels.")
            axes = _axes(shape, self.layout, file)
            height, width = shape[1:3] if axes == "NHWC" else shape[2:4]
            channels = 1 if len(shape) == 3 else shape[3] if axes == "NHWC" else shape[1]
            shapes[split] = channels, height, width
        if len(set(shapes.values())) > 1:
            found = ", ".join(f"{self.files[split]}: {shape}" for split, shape in shapes.items())
            raise UserError(f"the files have images of different shapes (C, H, W): {found}; resize them to one size.")
        return next(iter(shapes.values()))


class _ArrayFile:
    """One split's arrays by name, in a ``.npz`` or a pair of ``.npy``; knows their headers without reading them."""

    def __init__(self, paths: list[Path], split: str) -> None:
        self.paths, self.split = paths, split
        for path in paths:
            if not path.is_file():
                raise UserError(f"{path} is not a file: give the path of a .npz or .npy file with --data.{split}.")

    def __str__(self) -> str:
        return " and ".join(map(str, self.paths))

    @classmethod
    def of(cls, given: list[str] | str | None, split: str, root: str) -> _ArrayFile:
        """Tell one ``.npz`` from a pair of ``.npy``."""
        names = [given] if isinstance(given, str) else list(given or [])
        kinds = [Path(name).suffix for name in names]
        if kinds not in ([".npz"], [".npy", ".npy"]):
            raise UserError(
                f"--data.{split} is {given}: give one .npz file, or a pair [images.npy, labels.npy] of .npy files."
            )
        return cls([Path(root) / name for name in names], split)

    def header(self, key: str, labels: bool = False) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Read an array's shape and type only."""
        if len(self.paths) == 2:
            path = self.paths[labels]
            try:
                with path.open("rb") as stream:
                    return _header(stream)
            except _UNREADABLE as error:
                raise self._damaged(path, error) from error
        try:
            with zipfile.ZipFile(self.paths[0]) as archive:
                names = [name.removesuffix(".npy") for name in archive.namelist()]
                if key not in names:
                    option = "labels_key" if labels else "images_key"
                    raise UserError(
                        f"{self} has no array {key!r}, only {', '.join(names)}: name the right one with "
                        f"--data.{option}."
                    )
                with archive.open(f"{key}.npy") as stream:
                    return _header(stream)
        except UserError:
            raise
        except _UNREADABLE as error:
            raise self._damaged(self.paths[0], error) from error

    def array(self, key: str, labels: bool = False) -> npt.NDArray[Any]:
        """Read an array."""
        self.header(key, labels)
        path = self.paths[labels] if len(self.paths) == 2 else self.paths[0]
        try:
            loaded = np.load(path, allow_pickle=False)
            if len(self.paths) == 2:
                return np.asarray(loaded)
            with loaded:
                return np.asarray(loaded[key])
        except _UNREADABLE as error:
            raise self._damaged(path, error) from error

    def class_names(self) -> list[str] | None:
        """Return the names in an array ``classes``, if there is one."""
        if len(self.paths) == 2:
            return None
        with zipfile.ZipFile(self.paths[0]) as archive:
            if "classes.npy" not in archive.namelist():
                return None
        return [str(name) for name in self.array("classes")]

    def _damaged(self, path: Path, error: Exception) -> UserError:
        return UserError(
            f"{path} cannot be read as a NumPy file ({error}): it is damaged or cut short; write it again."
        )


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = npy.read_magic(stream)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype


def _labels(file: _ArrayFile, key: str) -> Rows:
    """Read labels as int64 (N,)."""
    shape, dtype = file.header(key, labels=True)
    if dtype.kind not in "iu":
        raise UserError(f"{file} has labels of type {dtype}: give integers from 0 on.")
    if len(shape) != 1 and (len(shape) != 2 or shape[1] != 1):
        raise UserError(f"{file} has labels of shape {shape}: give one class number per image, shape (N,).")
    return file.array(key, labels=True).reshape(-1).astype(np.int64)


def _axes(shape: tuple[int, ...], layout: Layout, file: _ArrayFile) -> Literal["NHWC", "NCHW"]:
    """Tell where the channels are."""
    if len(shape) == 3:
        return "NHWC"
    if len(shape) != 4:
        raise UserError(f"{file} has images of shape {shape}: give (N, H, W), (N, H, W, C) or (N, C, H, W).")
    if layout != "auto":
        return layout
    first, last = shape[1] in (1, 3), shape[3] in (1, 3)
    if first == last:
        raise UserError(
            f"{file} has images of shape {shape}, which does not tell where the channels are: say --data.layout "
            "NHWC or NCHW."
        )
    return "NCHW" if first else "NHWC"

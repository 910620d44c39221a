"""MNIST and Fashion-MNIST in torchvision's file layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import numpy as np
from torchvision import datasets

from lightning_robust.datamodules.base import ImageDataModule, Split
from lightning_robust.datamodules.dataset import TensorSource
from lightning_robust.datamodules.download import download_or_explain, how_to_get
from lightning_robust.datamodules.masks import MaskedTensorSource, threshold_masks
from lightning_robust.errors import UserError

Binarize = Literal["none", "train", "test", "both"]

_PREFIXES: Final = {"train": "train", "test": "t10k"}
_FILES: Final = {
    split: (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte") for split, prefix in _PREFIXES.items()
}


class MNIST(ImageDataModule):
    """MNIST: 60,000 + 10,000 handwritten digits, 28 × 28 grey, 10 classes (LeCun et al. 1998).

    Reads the four unpacked files in ``root/MNIST/raw`` that torchvision's ``MNIST`` writes there. Validation images are
    held out from the training images.

    Args:
        root: Folder that has the folder ``MNIST``.
        download: Whether to fetch missing files from the internet.
        binarize: Which images come black and white, 1 where a pixel is above the threshold and 0 elsewhere: ``none``,
            those for ``train`` (and validation, which is held out of them), for ``test``, or ``both``. An attack then
            starts from black and white; what thresholds *after* the attack is
            :class:`lightning_robust.defenses.Binarization`.
        masks: Whether batches have masks of the pixels above the threshold (of an image without one, its brightest).
        threshold: In [0, 1).
        **kwargs: See :class:`ImageDataModule`.

    Raises:
        UserError: If files are missing and ``download`` is off, a file is damaged, or a setting is wrong.
    """

    _torchvision: ClassVar[type[datasets.MNIST]] = datasets.MNIST
    _names: ClassVar[list[str]] = [str(digit) for digit in range(10)]

    def __init__(
        self,
        root: str = "data",
        download: bool = False,
        binarize: Binarize = "none",
        masks: bool = False,
        threshold: float = 0.5,
        **kwargs: Any,
    ) -> None:
        if binarize not in ("none", "train", "test", "both"):
            raise UserError(f"binarize={binarize!r}: choose none, train, test or both.")
        if not 0 <= threshold < 1:
            raise UserError(f"threshold={threshold}: give a pixel value from 0 to below 1.")
        self.binarize, self.masks, self.threshold = binarize, masks, threshold
        self.folder = Path(root) / self._torchvision.__name__ / "raw"
        self.download = download
        if not download:
            self._check_exists()
        super().__init__(root=root, **kwargs)

    @property
    def all_class_names(self) -> list[str]:
        """The names of the ten classes."""
        return list(self._names)

    @property
    def source_shape(self) -> tuple[int, int, int]:
        """One channel of 28 × 28 pixels."""
        return 1, 28, 28

    def _files(self) -> list[Path]:
        return [self.folder / name for names in _FILES.values() for name in names]

    def _check_exists(self) -> None:
        missing = [file for file in self._files() if not file.is_file()]
        if missing:
            name = self._torchvision.__name__
            raise UserError(how_to_get(name, missing, name, "unpacked, not .gz"))

    def prepare_data(self) -> None:
        """Fetch missing files, if ``download`` is on."""
        if self.download and not all(file.is_file() for file in self._files()):
            download_or_explain(self._torchvision, self.root, self._files())

    def read(self, split: Split) -> TensorSource | None:
        """Read the training or test images."""
        if split == "val":
            return None
        self.prepare_data()
        self._check_exists()
        for name in _FILES[split]:
            _check_idx(self.folder / name)
        data = self._torchvision(self.root, train=split == "train")
        images, labels = data.data[:, None], data.targets.numpy().astype(np.int64)
        masks = threshold_masks(images, self.threshold) if self.masks else None
        if self.binarize in (split, "both"):
            images = (images > self.threshold * 255).to(images.dtype) * 255
        return TensorSource(images, labels) if masks is None else MaskedTensorSource(images, labels, masks)


class FashionMNIST(MNIST):
    """Fashion-MNIST: 60,000 + 10,000 pieces of clothing, 28 × 28 grey, 10 classes (arXiv 1708.07747).

    Reads the four unpacked files in ``root/FashionMNIST/raw`` that torchvision's ``FashionMNIST`` writes there.
    Validation images are held out from the training images.

    Args:
        root: Folder that has the folder ``FashionMNIST``.
        download: Whether to fetch missing files from the internet.
        binarize: Which images come black and white, 1 where a pixel is above the threshold and 0 elsewhere: ``none``,
            those for ``train`` (and validation, which is held out of them), for ``test``, or ``both``. An attack then
            starts from black and white; what thresholds *after* the attack is
            :class:`lightning_robust.defenses.Binarization`.
        masks: Whether batches have masks of the pixels above the threshold (of an image without one, its brightest).
        threshold: In [0, 1).
        **kwargs: See :class:`ImageDataModule`.

    Raises:
        UserError: If files are missing and ``download`` is off, a file is damaged, or a setting is wrong.
    """

    _torchvision = datasets.FashionMNIST
    _names = list(datasets.FashionMNIST.classes)


def _check_idx(path: Path) -> None:
    """Compare an idx file's length with what its header says."""
    with path.open("rb") as file:
        header = file.read(16)
    # Two zeros, the format's code 8 for unsigned bytes, and the number of dimensions: three of images, one of labels.
    wanted = None
    if header[:4] in (b"\0\0\x08\x01", b"\0\0\x08\x03") and len(header) >= 4 + 4 * header[3]:
        sizes = np.frombuffer(header, dtype=">u4", offset=4, count=header[3])
        wanted = 4 + 4 * header[3] + int(sizes.prod(dtype=np.int64))
    found = path.stat().st_size
    if found != wanted:
        reason = "it has no idx header" if wanted is None else f"it has {found} bytes, its header says {wanted}"
        raise UserError(f"{path} is damaged ({reason}): delete it and run with --data.download true, or replace it.")

"""CIFAR-10 and CIFAR-100 in torchvision's file layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import torch
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from lightning_robust.datamodules.base import ImageDataModule, Split
from lightning_robust.datamodules.dataset import TensorSource
from lightning_robust.datamodules.download import download_or_explain, how_to_get
from lightning_robust.errors import UserError

_CIFAR10_NAMES: Final = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# fmt: off
_CIFAR100_NAMES: Final = [
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish",
    "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
    "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange",
    "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine",
    "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk",
    "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
    "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale",
    "willow_tree", "wolf", "woman", "worm",
]
# fmt: on


class CIFAR10(ImageDataModule):
    """CIFAR-10: 50,000 + 10,000 photographs, 32 × 32 RGB, 10 classes (Krizhevsky 2009).

    Reads the batch files in ``root/cifar-10-batches-py`` that torchvision's ``CIFAR10`` writes there. Validation images
    are held out from the training images.

    Args:
        root: Folder that has the folder ``cifar-10-batches-py``.
        download: Whether to fetch missing files from the internet.
        **kwargs: See :class:`ImageDataModule`.

    Raises:
        UserError: If files are missing and ``download`` is off, or a file's checksum is wrong.
    """

    _torchvision: ClassVar[type[datasets.CIFAR10]] = datasets.CIFAR10
    _names: ClassVar[list[str]] = _CIFAR10_NAMES

    def __init__(self, root: str = "data", download: bool = False, **kwargs: Any) -> None:
        self.folder = Path(root) / self._torchvision.base_folder
        self.download = download
        if not download:
            self._check_exists()
        super().__init__(root=root, **kwargs)

    @property
    def all_class_names(self) -> list[str]:
        """The names of the classes in their official order."""
        return list(self._names)

    @property
    def source_shape(self) -> tuple[int, int, int]:
        """Three channels of 32 × 32 pixels."""
        return 3, 32, 32

    def _files(self) -> dict[Path, str]:
        """The files and their MD5 sums."""
        vision = self._torchvision
        files = [*vision.train_list, *vision.test_list, (vision.meta["filename"], vision.meta["md5"])]
        return {self.folder / name: md5 for name, md5 in files}

    def _check_exists(self) -> None:
        missing = [file for file in self._files() if not file.is_file()]
        if missing:
            raise UserError(how_to_get(self._torchvision.__name__, missing, self.folder.name))

    def prepare_data(self) -> None:
        """Fetch missing files, if ``download`` is on."""
        if self.download and not all(file.is_file() for file in self._files()):
            download_or_explain(self._torchvision, self.root, list(self._files()))

    def read(self, split: Split) -> TensorSource | None:
        """Read the training or test images."""
        if split == "val":
            return None
        self.prepare_data()
        self._check_exists()
        try:
            data = self._torchvision(self.root, train=split == "train")
        # How torchvision says that a checksum is wrong: it unpickles nothing before.
        except RuntimeError as error:
            damaged = [file.name for file, md5 in self._files().items() if not check_integrity(str(file), md5)]
            raise UserError(
                f"{self.folder} has damaged files (wrong MD5 sum): {', '.join(damaged)}; delete them and run with "
                "--data.download true, or replace them."
            ) from error
        images = torch.from_numpy(np.ascontiguousarray(data.data.transpose(0, 3, 1, 2)))
        return TensorSource(images, np.asarray(data.targets, dtype=np.int64))


class CIFAR100(CIFAR10):
    """CIFAR-100: 50,000 + 10,000 photographs, 32 × 32 RGB, the 100 fine classes (Krizhevsky 2009).

    Reads the files in ``root/cifar-100-python`` that torchvision's ``CIFAR100`` writes there. Validation images are
    held out from the training images.

    Args:
        root: Folder that has the folder ``cifar-100-python``.
        download: Whether to fetch missing files from the internet.
        **kwargs: See :class:`ImageDataModule`.

    Raises:
        UserError: If files are missing and ``download`` is off, or a file's checksum is wrong.
    """

    _torchvision = datasets.CIFAR100
    _names = _CIFAR100_NAMES

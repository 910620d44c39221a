"""The handwritten digits that come with scikit-learn: no download, trains in seconds."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch

from lightning_robust.datamodules.base import ImageDataModule, Split
from lightning_robust.datamodules.dataset import TensorSource
from lightning_robust.datamodules.selection import hold_out

_TEST_SHARE: Final = 0.2
_TEST_SEED: Final = 0


class Digits(ImageDataModule):
    """1,797 handwritten digits of 8 × 8 grey pixels in 10 classes (UCI "Optical Recognition of Handwritten Digits").

    Pixels are sixteenths, 0/16 to 16/16. The 359 test images are always the same, whatever ``seed`` says;
    ``val_size`` of the other 1,438 are held out for validation.

    Args:
        root: Not used: scikit-learn has the data inside.
        **kwargs: See :class:`ImageDataModule`.
    """

    def __init__(self, root: str = "data", **kwargs: Any) -> None:
        super().__init__(root=root, **kwargs)

    @property
    def all_class_names(self) -> list[str]:
        """The digits 0 to 9."""
        return [str(digit) for digit in range(10)]

    @property
    def source_shape(self) -> tuple[int, int, int]:
        """One channel of 8 × 8 pixels."""
        return 1, 8, 8

    def read(self, split: Split) -> TensorSource | None:
        """Read the training or test images."""
        if split == "val":
            return None
        from sklearn.datasets import load_digits  # takes a second to import

        data = load_digits()
        labels = data.target.astype(np.int64)
        train, test = hold_out(labels, _TEST_SHARE, _TEST_SEED, name="test share")
        rows = train if split == "train" else test
        images = torch.from_numpy(data.images[rows, None] / 16).to(torch.float32)
        return TensorSource(images, labels[rows])

"""Cats and dogs in the layouts in which they come."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_robust.datamodules import CatsDogs
from lightning_robust.errors import UserError


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Kaggle's train folder: dogs are bright; and its test folder, which has no labels."""
    for folder in ("train", "test1"):
        (tmp_path / folder).mkdir()
    for number in range(10):
        for name, value in (("cat", 10), ("dog", 200)):
            pixels = np.full((30 + number, 40, 3), value + number, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / f"{name}.{number}.jpg")
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(tmp_path / "test1" / "1.jpg")
    return tmp_path


@pytest.mark.parametrize("inside", ["", "train"])
def test_kaggles_flat_files(flat: Path, inside: str) -> None:
    data = CatsDogs(root=str(flat / inside), image_size=16, val_size=4, test_size=4, num_workers=0)
    assert data.class_names == ["cat", "dog"]
    assert data.image_shape == (3, 16, 16)
    seen = []
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        dataset = data.dataset(split)
        assert len(dataset) == count
        assert torch.bincount(dataset.labels).tolist() == [count // 2] * 2
        for image, label in (dataset[index] for index in range(count)):
            assert (image.mean() > 0.5) == bool(label)
            seen.append(round(float(image.mean()) * 255))
    assert len(seen) == 20
    assert data.source_shape == (3, 16, 16)
    assert CatsDogs(root=str(flat), image_size=None).source_shape[0] == 3


def test_a_flat_corrupt_file_is_named_or_left_out(flat: Path) -> None:
    (flat / "train" / "cat.3.jpg").write_bytes(b"no image")
    data = CatsDogs(root=str(flat), val_size=0, num_workers=0, on_corrupt="skip")
    with pytest.warns(UserWarning, match=r"1 of 20 images .* are corrupt and left out"):
        data.setup("fit")
    data.setup("test")
    assert len(data.dataset("train")) + len(data.dataset("test")) == 19


def test_microsofts_and_plain_folders(write_folder: Callable[..., Path]) -> None:
    root = write_folder({"PetImages/Cat": 6, "PetImages/Dog": 6})
    data = CatsDogs(root=str(root), image_size=12, val_size=2, num_workers=0)
    assert data.class_names == ["Cat", "Dog"]
    assert data.image_shape == (3, 12, 12)
    write_folder({"other/train/cat": 6, "other/train/dog": 6, "other/test/cat": 2, "other/test/dog": 3})
    data = CatsDogs(root=str(root / "other"), val_size=2, num_workers=0)
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [10, 2, 5]
    assert data.image_shape == (3, 64, 64)


def test_bad_input(flat: Path, write_folder: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="has the class folders a, b: CatsDogs is of cat and dog"):
        CatsDogs(root=str(write_folder({"a": 2, "b": 2})))
    with pytest.raises(UserError, match="is not a folder"):
        CatsDogs(root=str(flat / "none"))
    with pytest.raises(UserError, match="crop_pct=2 is not a share"):
        CatsDogs(root=str(flat), crop_pct=2)
    with pytest.raises(UserError, match="test_size"):
        CatsDogs(root=str(flat), test_size=-1)


@pytest.mark.real_data
def test_real_images(real_data: Path) -> None:
    data = CatsDogs(root=str(real_data / "catsdogs"), image_size=32, val_size=0.15, num_workers=0)
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [510, 90, 240]
    image, label = data.dataset("test")[0]
    assert image.shape == (3, 32, 32)
    assert label == 0

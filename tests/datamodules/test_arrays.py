from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_robust.datamodules import Arrays
from lightning_robust.errors import UserError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (30, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(30) % 3


def npz(path: Path, **arrays: Any) -> str:
    np.savez(path, **{"images": IMAGES, "labels": LABELS, **arrays})
    return str(path)


def stack(data: Arrays, split: str = "test") -> torch.Tensor:
    dataset = data.dataset(split)  # type: ignore[arg-type]
    return dataset.__getitems__(range(len(dataset))).images


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (IMAGES, IMAGES.transpose(0, 3, 1, 2) / 255),
        (IMAGES.transpose(0, 3, 1, 2), IMAGES.transpose(0, 3, 1, 2) / 255),
        (IMAGES[..., 0], IMAGES[:, None, :, :, 0] / 255),
        (IMAGES[..., :1], IMAGES[:, None, :, :, 0] / 255),
        (IMAGES / 255, IMAGES.transpose(0, 3, 1, 2) / 255),
        ((IMAGES / 255).astype(np.float32), IMAGES.transpose(0, 3, 1, 2) / 255),
        (IMAGES.astype(np.float16) / 256, IMAGES.transpose(0, 3, 1, 2) / 256),
    ],
)
def test_layouts_and_types(tmp_path: Path, images: np.ndarray, expected: np.ndarray) -> None:
    data = Arrays(test=npz(tmp_path / "x.npz", images=images))
    loaded = stack(data)
    assert loaded.dtype == torch.float32
    np.testing.assert_allclose(loaded, expected, atol=1e-3 if images.dtype == np.float16 else 1e-7)
    assert tuple(loaded.shape[1:]) == data.image_shape
    assert data.dataset("test").labels.tolist() == LABELS.tolist()
    assert (data.num_classes, data.class_names) == (3, ["0", "1", "2"])


def test_layout_is_asked_for_where_the_shape_leaves_it_open(tmp_path: Path) -> None:
    both = npz(tmp_path / "x.npz", images=np.zeros((30, 3, 8, 3), dtype=np.uint8))
    with pytest.raises(UserError, match=r"--data\.layout NHWC or NCHW"):
        Arrays(test=both)
    assert Arrays(test=both, layout="NCHW").image_shape == (3, 8, 3)
    assert Arrays(test=both, layout="NHWC").image_shape == (3, 3, 8)
    two_channels = npz(tmp_path / "y.npz", images=np.zeros((30, 2, 8, 8), dtype=np.uint8))
    assert stack(Arrays(test=two_channels, layout="NCHW")).shape == (30, 2, 8, 8)


def test_a_pair_of_files(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", IMAGES)
    np.save(tmp_path / "y.npy", LABELS[:, None])
    data = Arrays(test=["x.npy", "y.npy"], root=str(tmp_path))
    np.testing.assert_allclose(stack(data), IMAGES.transpose(0, 3, 1, 2) / 255, atol=1e-7)


def test_keys_and_class_names(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", x=IMAGES, y=LABELS, classes=["cat", "dog", "cow"])
    data = Arrays(train=str(tmp_path / "x.npz"), images_key="x", labels_key="y", val_size=3)
    assert data.class_names == ["cat", "dog", "cow"]
    assert [len(data.dataset(split)) for split in ("train", "val")] == [27, 3]
    with pytest.raises(UserError, match=r"no array 'images', only x, y, classes: .*--data\.images_key"):
        Arrays(train=str(tmp_path / "x.npz"), labels_key="y")
    with pytest.raises(UserError, match=r"no array 'labels'.*--data\.labels_key"):
        Arrays(train=str(tmp_path / "x.npz"), images_key="x")


def test_three_files(tmp_path: Path) -> None:
    parts = {"train": slice(0, 15), "val": slice(15, 21), "test": slice(21, 30)}
    files = {k: npz(tmp_path / f"{k}.npz", images=IMAGES[s], labels=LABELS[s]) for k, s in parts.items()}
    data = Arrays(**files)  # type: ignore[arg-type]
    assert [len(data.dataset(split)) for split in parts] == [15, 6, 9]  # type: ignore[arg-type]


def test_a_missing_train_file_only_matters_when_fitting(tmp_path: Path) -> None:
    data = Arrays(test=npz(tmp_path / "x.npz"))
    data.setup("test")
    with pytest.raises(UserError, match=r"no train images: give its file with --data\.train"):
        data.setup("fit")
    with pytest.raises(UserError, match=r"no val images: .*--data\.val \(or --data\.train"):
        data.setup("validate")
    with pytest.raises(UserError, match=r"no test images"):
        Arrays(train=npz(tmp_path / "y.npz")).setup("test")


def test_num_classes_can_be_said(tmp_path: Path) -> None:
    assert Arrays(test=npz(tmp_path / "x.npz"), num_classes=5).num_classes == 5
    with pytest.raises(UserError, match="outside 0 to 1"):
        Arrays(test=npz(tmp_path / "x.npz"), num_classes=2)
    with pytest.raises(UserError, match="num_classes=5 does not fit the 3 class names"):
        Arrays(test=npz(tmp_path / "y.npz", classes=["a", "b", "c"]), num_classes=5)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": LABELS[:-1]}, "30 images and 29 labels"),
        ({"labels": LABELS - 1}, "outside 0 to 1"),
        ({"labels": LABELS.astype(float)}, "labels of type float64"),
        ({"labels": np.eye(3, dtype=int)[LABELS]}, r"labels of shape \(30, 3\)"),
        ({"labels": LABELS[:0], "images": IMAGES[:0]}, "is empty"),
        ({"images": IMAGES.astype(np.int64)}, "images of type int64"),
        ({"images": IMAGES[0, 0]}, r"images of shape \(5, 3\)"),
    ],
)
def test_arrays_that_do_not_fit_fail_in_the_constructor(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    if message.endswith(r"\(5, 3\)"):
        arrays = {**arrays, "labels": LABELS[:5]}
    with pytest.raises(UserError, match=message):
        Arrays(test=npz(tmp_path / "x.npz", **arrays))


def test_images_of_unequal_size_are_an_error(tmp_path: Path) -> None:
    ragged = np.empty(30, dtype=object)
    ragged[:] = [np.zeros((4 + i % 2, 4), dtype=np.uint8) for i in range(30)]
    with pytest.raises(UserError, match="images of type object: give uint8 of one size"):
        Arrays(test=npz(tmp_path / "x.npz", images=ragged))
    other = npz(tmp_path / "y.npz", images=IMAGES[:, :4])
    with pytest.raises(UserError, match=r"different shapes .*\(3, 6, 5\).*\(3, 4, 5\)"):
        Arrays(train=npz(tmp_path / "z.npz"), test=other)


@pytest.mark.parametrize("wrong", [np.nan, 255.0, -1.0])
def test_float_images_outside_the_unit_range_are_an_error(tmp_path: Path, wrong: float) -> None:
    images = IMAGES / 255
    images[3, 2, 1, 0] = wrong
    with pytest.raises(UserError, match="NaN" if wrong != wrong else r"outside \[0, 1\]"):
        Arrays(test=npz(tmp_path / "x.npz", images=images)).setup("test")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no file"),
        ({"test": "nowhere.npz"}, "nowhere.npz is not a file"),
        ({"test": "images.npy"}, "give one .npz file, or a pair"),
        ({"train": ["a.npz", "b.npz"]}, "give one .npz file, or a pair"),
    ],
)
def test_wrong_paths_fail_in_the_constructor(files: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Arrays(**files)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_files_cut_short_are_named(tmp_path: Path, kept: float) -> None:
    path = Path(npz(tmp_path / "x.npz"))
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(UserError, match=r"x\.npz cannot be read as a NumPy file"):
        Arrays(test=str(path))


def test_a_pair_cut_short_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", IMAGES)
    np.save(tmp_path / "y.npy", LABELS)
    whole = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"x\.npy cannot be read"):
        Arrays(test=["x.npy", "y.npy"], root=str(tmp_path)).setup("test")
    (tmp_path / "x.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match=r"x\.npy cannot be read"):
        Arrays(test=["x.npy", "y.npy"], root=str(tmp_path))


def test_pickles_are_not_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", IMAGES)
    np.save(tmp_path / "y.npy", np.array([print] * 30, dtype=object))
    with pytest.raises(UserError, match="labels of type object"):
        Arrays(test=["x.npy", "y.npy"], root=str(tmp_path))


def test_classes_of_files_must_agree(tmp_path: Path) -> None:
    train, test = (npz(tmp_path / f"{c}.npz", classes=[c, "y", "z"]) for c in "ab")
    with pytest.raises(UserError, match="name different classes"):
        Arrays(train=train, test=test)


@pytest.mark.real_data
def test_real_cifar(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["cifar_npz.py", str(tmp_path)])
    runpy.run_path(str(real_data / "cifar_npz.py"), run_name="__main__")
    data = Arrays(
        train="cifar10_train.npz", test="cifar10_test.npz", root=str(tmp_path), augmentation="crop_flip", val_size=1000
    )
    assert (data.num_classes, data.image_shape) == (10, (3, 32, 32))
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [9000, 1000, 10_000]
    assert torch.bincount(data.dataset("test").labels).tolist() == [1000] * 10
    assert sum(len(labels) for _, labels in data.train_dataloader()) == 9000 // 128 * 128
    hundred = Arrays(test="cifar100_pooled.npz", root=str(tmp_path), limit=100)
    assert hundred.num_classes == 100
    assert torch.bincount(hundred.dataset("test").labels).tolist() == [1] * 100

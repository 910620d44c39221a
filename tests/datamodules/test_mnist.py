from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_robust.datamodules import MNIST, FashionMNIST
from lightning_robust.errors import UserError


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture(params=[MNIST, FashionMNIST])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[type[MNIST], Path]:
    """A class and a root with 40 training and 20 test images in torchvision's layout."""
    folder = tmp_path / request.param.__name__ / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix, n in (("train", 40), ("t10k", 20)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte", rng.integers(0, 256, (n, 28, 28)))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", np.arange(n) % 10)
    return request.param, tmp_path


def test_reads_torchvisions_files(small: tuple[type[MNIST], Path]) -> None:
    cls, root = small
    data = cls(root=str(root), val_size=10)
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [30, 10, 20]
    image, label = data.dataset("test")[13]
    raw = np.frombuffer((data.folder / "t10k-images-idx3-ubyte").read_bytes()[16:], dtype=np.uint8)
    assert torch.equal(image, torch.tensor(raw.reshape(20, 1, 28, 28)[13]) / 255)
    assert label == 3
    assert (data.num_classes, len(data.class_names), data.image_shape) == (10, 10, (1, 28, 28))


def test_names() -> None:
    assert FashionMNIST._names[9] == "Ankle boot"
    assert MNIST._names[9] == "9"


def test_missing_files_fail_at_once_and_say_how_to_get_them(small: tuple[type[MNIST], Path]) -> None:
    cls, root = small
    (root / cls.__name__ / "raw" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match=r"--data\.download true, or put t10k-labels-idx1-ubyte .* into .*raw"):
        cls(root=str(root))


@pytest.mark.parametrize("kept", [2, 10, 1000])
def test_a_file_cut_short_is_named(small: tuple[type[MNIST], Path], kept: int) -> None:
    cls, root = small
    file = root / cls.__name__ / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match="train-images-idx3-ubyte is damaged"):
        cls(root=str(root)).setup("fit")


def test_a_file_of_another_kind_is_named(small: tuple[type[MNIST], Path]) -> None:
    cls, root = small
    file = root / cls.__name__ / "raw" / "t10k-labels-idx1-ubyte"
    file.write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte is damaged"):
        cls(root=str(root)).setup("test")


def test_images_and_labels_of_different_number(small: tuple[type[MNIST], Path]) -> None:
    cls, root = small
    write_idx(root / cls.__name__ / "raw" / "t10k-labels-idx1-ubyte", np.arange(19) % 10)
    with pytest.raises(UserError, match="20 images and 19 labels"):
        cls(root=str(root)).setup("test")


def test_a_failed_download_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MNIST._torchvision, "mirrors", ["http://127.0.0.1:9/"])
    data = MNIST(root=str(tmp_path), download=True)
    with pytest.raises(UserError, match=r"MNIST could not be downloaded .* put train-images-idx3-ubyte"):
        data.prepare_data()


def test_nothing_is_downloaded_that_is_there(small: tuple[type[MNIST], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    cls, root = small
    monkeypatch.setattr(cls._torchvision, "mirrors", [])
    data = cls(root=str(root), download=True)
    data.prepare_data()
    assert len(data.dataset("test")) == 20


@pytest.mark.parametrize("binarize", ["none", "train", "test", "both"])
def test_black_and_white_images(small: tuple[type[MNIST], Path], binarize: str) -> None:
    cls, root = small
    plain, data = cls(root=str(root), val_size=10), cls(root=str(root), val_size=10, binarize=binarize, threshold=0.3)
    for split in ("train", "val", "test"):
        before, after = (each.dataset(split).__getitems__(range(10)).images for each in (plain, data))  # type: ignore[arg-type]
        thresholded = binarize == "both" or binarize == ("test" if split == "test" else "train")
        assert torch.equal(after, (before > 0.3).float() if thresholded else before)


def test_masks_of_the_bright_pixels(small: tuple[type[MNIST], Path]) -> None:
    cls, root = small
    data = cls(root=str(root), masks=True, threshold=0.6, binarize="test", image_size=28)
    images, _, masks = next(iter(data.test_dataloader()))
    assert torch.equal(masks.float(), images)
    plain = cls(root=str(root)).dataset("test")[3][0]
    assert torch.equal(masks[3], plain > 0.6)


@pytest.mark.parametrize(("settings", "message"), [({"binarize": "val"}, "binarize='val'"), ({"threshold": 1}, "d=1")])
def test_wrong_settings(small: tuple[type[MNIST], Path], settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        small[0](root=str(small[1]), **settings)


@pytest.mark.real_data
@pytest.mark.parametrize("cls", [MNIST, FashionMNIST])
def test_real(cls: type[MNIST], real_data: Path) -> None:
    data = cls(root=str(real_data), val_size=5000, batch_size=100)
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [55_000, 5_000, 10_000]
    loader = data.train_dataloader()
    assert sum(len(labels) for _, labels in loader) == 55_000
    pixels = torch.cat([images for images, _ in data.test_dataloader()])
    # Means of the test pixels, from the data sets' own files.
    raw = (data.folder / "t10k-images-idx3-ubyte").read_bytes()[16:]
    assert pixels.double().mean().item() == pytest.approx(np.frombuffer(raw, np.uint8).mean() / 255, abs=1e-6)
    if cls is FashionMNIST:
        assert torch.bincount(data.dataset("val").labels).tolist() == [500] * 10

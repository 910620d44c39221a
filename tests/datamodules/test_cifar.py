from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_robust.datamodules import CIFAR10, CIFAR100
from lightning_robust.errors import UserError


def write_pickle(path: Path, content: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture(params=[CIFAR10, CIFAR100])
def small(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[type[CIFAR10], Path]:
    """A class and a root with a few images in torchvision's layout, whose checksums torchvision is told."""
    cls = request.param
    vision = cls._torchvision
    rng = np.random.default_rng(0)
    names = cls._names
    key = "labels" if cls is CIFAR10 else "fine_labels"
    n = 2 * len(names)

    def batch() -> dict[str, Any]:
        return {"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8), key: [i % len(names) for i in range(n)]}

    folder = tmp_path / vision.base_folder
    for attribute in ("train_list", "test_list"):
        files = [[name, write_pickle(folder / name, batch())] for name, _ in getattr(vision, attribute)]
        monkeypatch.setattr(vision, attribute, files)
    md5 = write_pickle(folder / vision.meta["filename"], {vision.meta["key"]: names})
    monkeypatch.setattr(vision, "meta", {**vision.meta, "md5": md5})
    return cls, tmp_path


def test_reads_torchvisions_files(small: tuple[type[CIFAR10], Path]) -> None:
    cls, root = small
    data = cls(root=str(root), val_size=0.5)
    train_files = len(cls._torchvision.train_list)
    per_file = 2 * data.num_classes
    assert len(data.dataset("train")) + len(data.dataset("val")) == per_file * train_files
    assert len(data.dataset("test")) == per_file
    (name, _), *_ = cls._torchvision.test_list
    raw = pickle.loads((data.folder / name).read_bytes())["data"].reshape(-1, 3, 32, 32)
    image, label = data.dataset("test")[11]
    assert torch.equal(image, torch.from_numpy(raw[11]) / 255)
    assert label == 11 % data.num_classes
    assert (data.image_shape, data.class_names) == ((3, 32, 32), cls._names)


def test_class_lists() -> None:
    assert (len(CIFAR10._names), len(CIFAR100._names)) == (10, 100)
    for names in (CIFAR10._names, CIFAR100._names):
        assert names == sorted(names)


def test_missing_files_fail_at_once_and_say_how_to_get_them(small: tuple[type[CIFAR10], Path]) -> None:
    cls, root = small
    name = cls._torchvision.test_list[0][0]
    (root / cls._torchvision.base_folder / name).unlink()
    with pytest.raises(UserError, match=rf"--data\.download true, or put {name} into .*{cls._torchvision.base_folder}"):
        cls(root=str(root))


def test_a_damaged_file_is_named(small: tuple[type[CIFAR10], Path]) -> None:
    cls, root = small
    name = cls._torchvision.test_list[0][0]
    file = root / cls._torchvision.base_folder / name
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"damaged files \(wrong MD5 sum\): {name};"):
        cls(root=str(root)).setup("test")


def test_a_failed_download_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CIFAR10._torchvision, "url", "http://127.0.0.1:9/x.tar.gz")
    with pytest.raises(UserError, match=r"CIFAR10 could not be downloaded .* put data_batch_1"):
        CIFAR10(root=str(tmp_path), download=True).dataset("test")

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets

from lightning_robust.datamodules import ImageFolder
from lightning_robust.errors import UserError

WriteFolder = Callable[..., Path]
PLAIN = {"a": 10, "b": 10, "c": 20}


def files(data: ImageFolder, split: str) -> list[str]:
    dataset = data.dataset(split)  # type: ignore[arg-type]
    root = Path(data.root)
    return [str(dataset.source.path(row).relative_to(root)) for row in dataset.rows]  # type: ignore[attr-defined]


def test_a_folder_without_splits_is_divided(write_folder: WriteFolder) -> None:
    data = ImageFolder(root=str(write_folder(PLAIN)), test_size=0.2, val_size=0.25)
    parts = {split: files(data, split) for split in ("train", "val", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 24, "val": 8, "test": 8}
    assert len(set().union(*parts.values())) == 40
    for split, expected in (("train", [6, 6, 12]), ("val", [2, 2, 4]), ("test", [2, 2, 4])):
        assert torch.bincount(data.dataset(split).labels).tolist() == expected  # type: ignore[arg-type]
    assert (data.class_names, data.image_shape) == (["a", "b", "c"], (3, 12, 10))
    again = ImageFolder(root=data.root, test_size=0.2, val_size=0.25)
    assert files(again, "val") == parts["val"]
    assert files(ImageFolder(root=data.root, seed=1, val_size=0.25), "test") != parts["test"]


def test_all_or_no_images_for_the_test(write_folder: WriteFolder) -> None:
    root = str(write_folder(PLAIN))
    everything = ImageFolder(root=root, test_size=1.0)
    assert len(everything.dataset("test")) == 40
    with pytest.raises(UserError, match="no train images"):
        everything.setup("fit")
    nothing = ImageFolder(root=root, test_size=0, val_size=4)
    assert [len(nothing.dataset(split)) for split in ("train", "val")] == [36, 4]
    with pytest.raises(UserError, match="no test images"):
        nothing.setup("test")


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_splits_in_folders(write_folder: WriteFolder, val: str) -> None:
    counts = {"train/a": 4, "train/b": 3, f"{val}/a": 2, f"{val}/b": 1, "test/a": 1, "test/b": 1}
    data = ImageFolder(root=str(write_folder(counts)))
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [7, 3, 2]
    assert data.dataset("train").labels.tolist() == [0] * 4 + [1] * 3


def test_validation_is_held_out_where_it_has_no_folder(write_folder: WriteFolder) -> None:
    data = ImageFolder(root=str(write_folder({"train/a": 10, "train/b": 10, "test/a": 1, "test/b": 1})), val_size=4)
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [16, 4, 2]


def test_imagenets_layout_tests_on_val_and_says_so(write_folder: WriteFolder) -> None:
    data = ImageFolder(root=str(write_folder({"train/n01": 4, "train/n02": 3, "val/n01": 2, "val/n02": 1})))
    with pytest.warns(UserWarning, match="has no test folder: the images of .*val are the test images too"):
        assert files(data, "test") == files(data, "val")


def test_one_split_is_enough_to_test(write_folder: WriteFolder) -> None:
    data = ImageFolder(root=str(write_folder({"val/a": 2, "val/b": 1})))
    data.setup("validate")
    with pytest.raises(UserError, match=r"no train images: .* needs a folder train/"):
        data.setup("fit")


def test_the_classes_of_a_plain_folder_may_be_called_train(write_folder: WriteFolder) -> None:
    data = ImageFolder(root=str(write_folder({"bus": 5, "train": 5})))
    assert data.class_names == ["bus", "train"]


def test_nested_and_hidden_files_as_torchvision(write_folder: WriteFolder) -> None:
    root = write_folder({"a/x": 2, "a": 3, "b": 2, ".cache": 1})
    (root / "b" / "notes.txt").write_text("no image")
    (root / ".DS_Store").write_text("")
    data = ImageFolder(root=str(root), test_size=1.0)
    (root / ".cache" / "000.png").unlink()
    (root / ".cache").rmdir()
    theirs = datasets.ImageFolder(str(root))
    dataset = data.dataset("test")
    assert len(dataset) == len(theirs) == 7
    ours = {dataset.source.path(row): label for row, label in zip(dataset.rows, dataset.labels.tolist(), strict=True)}  # type: ignore[attr-defined]
    assert ours == {Path(path): label for path, label in theirs.samples}


def test_images_are_decoded_exactly(write_folder: WriteFolder) -> None:
    root = write_folder({"a": 2, "b": 2})
    dataset = ImageFolder(root=str(root), test_size=1.0).dataset("test")
    images, _ = next(iter(DataLoader(dataset, batch_size=4)))
    assert torch.equal(images[3], torch.from_numpy(np.array(Image.open(root / "b/001.png"))).permute(2, 0, 1) / 255)


def test_image_size_and_channels(write_folder: WriteFolder) -> None:
    root = write_folder({"a": 3}, size=(20, 30))
    write_folder({"b": 3}, size=(30, 20), mode="L")
    data = ImageFolder(root=str(root), image_size=16, channels=1, test_size=1.0, crop_pct=0.8)
    assert data.image_shape == (1, 16, 16)
    (images, _), *_ = data.test_dataloader()
    assert images.shape == (6, 1, 16, 16)


def test_imagenet_augmentation_cuts_from_the_original(write_folder: WriteFolder) -> None:
    data = ImageFolder(
        root=str(write_folder({"a": 6, "b": 6}, size=(40, 50))),
        image_size=16,
        augmentation="imagenet",
        test_size=0,
        val_size=0,
        batch_size=12,
    )
    loaders = []
    for workers in (0, 2):
        data.num_workers = workers
        ((images, _),) = data.train_dataloader()
        loaders.append(images)
    assert loaders[0].shape == (12, 3, 16, 16)
    assert torch.equal(*loaders)


def test_files_are_read_by_workers_unless_told_otherwise(write_folder: WriteFolder) -> None:
    data = ImageFolder(root=str(write_folder(PLAIN)))
    assert 1 <= data.test_dataloader().num_workers <= 8


def test_no_image_is_read_at_construction(write_folder: WriteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folder({f"train/n{i:03}": 2 for i in range(50)})
    opened: list[Any] = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(a) or original(*a, **k))
    assert ImageFolder(root=str(root)).image_shape == (3, 12, 10)
    assert len(opened) == 1
    ImageFolder(root=str(root), image_size=8).setup("fit")
    assert len(opened) == 1


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_mixed_sizes_need_an_image_size(write_folder: WriteFolder) -> None:
    root = write_folder({"a": 3}, size=(20, 30))
    write_folder({"b": 3}, size=(30, 20))
    with pytest.raises(UserError, match=r"b/000.png is 30 × 20 pixels .* 20 × 30: .*--data\.image_size"):
        ImageFolder(root=str(root), test_size=1.0).setup("test")


def test_an_empty_class_folder_is_named(write_folder: WriteFolder) -> None:
    with pytest.raises(UserError, match=r"class folder .*train/b has no image"):
        ImageFolder(root=str(write_folder({"train/a": 2, "train/b": 0})))


@pytest.mark.parametrize("counts", [{"": 3}, {"train": 3}, {"train/a": 1, "val": 3}])
def test_a_folder_without_class_folders(write_folder: WriteFolder, counts: dict[str, int]) -> None:
    with pytest.raises(UserError, match="has no class folders"):
        ImageFolder(root=str(write_folder(counts)))


def test_a_root_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is not a folder: point --data\.root"):
        ImageFolder(root=str(tmp_path / "nowhere"))


def test_splits_with_different_classes(write_folder: WriteFolder) -> None:
    with pytest.raises(UserError, match=r"val has other class folders than .*train: 1 missing \['b'\], 1 additional"):
        ImageFolder(root=str(write_folder({"train/a": 2, "train/b": 2, "val/a": 1, "val/c": 1})))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_pct": 0}, "crop_pct=0"),
        ({"crop_pct": 1.1}, r"crop_pct=1\.1"),
        ({"channels": 4}, "channels=4"),
        ({"on_corrupt": "ignore"}, "on_corrupt='ignore'"),
        ({"test_size": -1}, "test_size=-1"),
        ({"test_size": 1.5}, r"test_size=1\.5"),
    ],
)
def test_wrong_settings_fail_in_the_constructor(
    write_folder: WriteFolder, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ImageFolder(root=str(write_folder(PLAIN)), **settings)


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_corrupt_image_is_named_or_left_out(write_folder: WriteFolder, damage: str, kind: str) -> None:
    root = write_folder({"a": 4, "b": 4}, kind=kind)
    broken = root / "b" / f"002.{kind}"
    whole = broken.read_bytes()
    broken.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"no image at all"}[damage])
    raising = ImageFolder(root=str(root), test_size=1.0, num_workers=0, image_size=8)
    with pytest.raises(UserError, match=rf"b/002\.{kind} cannot be read as an image"):
        list(raising.test_dataloader())
    skipping = ImageFolder(root=str(root), test_size=1.0, num_workers=0, on_corrupt="skip")
    with pytest.warns(UserWarning, match=rf"1 of 8 images in .* are corrupt and left out: .*b/002\.{kind}"):
        skipping.setup("test")
    assert skipping.dataset("test").labels.tolist() == [0] * 4 + [1] * 3
    assert sum(len(labels) for _, labels in skipping.test_dataloader()) == 7


def test_the_first_image_may_be_corrupt(write_folder: WriteFolder) -> None:
    root = write_folder(PLAIN)
    (root / "a" / "000.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"a/000\.png cannot be read"):
        ImageFolder(root=str(root))
    assert ImageFolder(root=str(root), on_corrupt="skip").image_shape == (3, 12, 10)


def test_a_class_of_corrupt_images_is_named(write_folder: WriteFolder) -> None:
    root = write_folder({"a": 2, "b": 1})
    (root / "b" / "000.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"all images in .*b are corrupt"), pytest.warns(UserWarning, match="1 of 3"):
        ImageFolder(root=str(root), on_corrupt="skip", test_size=1.0).setup("test")


def test_a_corrupt_image_is_named_by_a_worker_too(write_folder: WriteFolder) -> None:
    root = write_folder({"a": 2, "b": 1})
    (root / "b" / "000.png").write_bytes(b"")
    data = ImageFolder(root=str(root), test_size=1.0, num_workers=1, image_size=8)
    with pytest.raises(UserError, match=r"b/000\.png cannot be read as an image"):
        list(data.test_dataloader())


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "test_images"), [("malaria", 160), ("catsdogs", 240)])
def test_real(real_data: Path, name: str, test_images: int) -> None:
    data = ImageFolder(root=str(real_data / name), image_size=64, on_corrupt="skip", val_size=0.2, num_workers=2)
    data.setup("test")
    images, labels = (torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True))
    assert images.shape == (test_images, 3, 64, 64)
    assert torch.bincount(labels).tolist() == [test_images // 2] * 2
    assert 0 <= images.min() < images.max() <= 1
    with pytest.raises(UserError, match="image_size"):
        ImageFolder(root=str(real_data / name)).setup("test")

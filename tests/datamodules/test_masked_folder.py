"""Images with masks beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_robust.batch import as_batch
from lightning_robust.datamodules import MaskedImageFolder
from lightning_robust.errors import UserError

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Images of 12 × 10 that are white where their masks are; the first column of a mask has its image's number."""

    def write(counts: dict[str, int], kind: str = "png", name: str = "{}") -> Path:
        for folder, count in counts.items():
            for number in range(count):
                mask = np.zeros((12, 10), dtype=np.uint8)
                mask[3:9, 2 : 4 + number % 4] = 255
                for place, array, suffix in (
                    ("images", np.repeat(mask[..., None], 3, 2), kind),
                    ("masks", mask, "png"),
                ):
                    file = tmp_path / place / folder / f"{name.format(number)}.{suffix}"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(array).save(file)
        return tmp_path

    return write


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_each_image_has_its_mask(write: Write, kind: str) -> None:
    data = MaskedImageFolder(root=str(write({"a": 10, "b": 6}, kind)), test_size=1.0, num_workers=0)
    data.setup("test")
    (values,) = data.test_dataloader()
    batch = as_batch(values)
    assert batch.mask is not None
    assert (batch.mask.shape, batch.mask.dtype) == ((16, 1, 12, 10), torch.bool)
    assert torch.equal(batch.images[:, :1] > 0.5, batch.mask)
    assert data.class_names == ["a", "b"]


def test_splits_sizes_and_augmentation(write: Write) -> None:
    counts = {"train/a": 8, "train/b": 8, "test/a": 2, "test/b": 2}
    data = MaskedImageFolder(
        root=str(write(counts)), image_size=24, augmentation="crop_flip", val_size=4, batch_size=4, num_workers=0
    )
    data.setup("fit")
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [12, 4, 4]
    for loader in (data.train_dataloader(), data.test_dataloader()):
        for images, _, masks in loader:
            assert images.shape[2:] == masks.shape[2:] == (24, 24)
            assert (images[:, :1][masks] > 0.3).all()
            assert (images[:, :1][~masks] < 0.7).all()
    cut = MaskedImageFolder(
        root=data.root.removesuffix("/images"), image_size=16, augmentation="imagenet", num_workers=2
    )
    _, _, masks = next(iter(cut.train_dataloader()))
    assert masks.shape[1:] == (1, 16, 16)


def test_groups_are_not_divided(write: Write) -> None:
    root = write({"a": 9, "b": 9}, name="7_{}")
    for number in range(8):
        write({"a": 4, "b": 4}, name=f"{number + 10}_{{}}")
    data = MaskedImageFolder(root=str(root), group="^[^_]+", test_size=0.2, val_size=0.2, num_workers=0)
    seen = []
    for split in ("train", "val", "test"):
        chosen = data.dataset(split)  # type: ignore[arg-type]
        seen.append({chosen.source.path(row).name.split("_")[0] for row in chosen.rows})  # type: ignore[attr-defined]
    assert sum(map(len, seen)) == 9
    assert set().union(*seen) == {"7", *map(str, range(10, 18))}
    assert all(seen)


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_a_missing_mask_is_named_before_anything_is_read(write: Write) -> None:
    root = write({"a": 4, "b": 4})
    (root / "masks" / "b" / "2.png").unlink()
    with pytest.raises(UserError, match=r"1 of 8 images have no mask, the first .*b/2\.png: it needs .*masks/b/2\.png"):
        MaskedImageFolder(root=str(root), test_size=1.0).setup("test")


def test_two_masks_for_one_image(write: Write) -> None:
    root = write({"a": 4, "b": 4})
    Image.open(root / "masks" / "a" / "1.png").save(root / "masks" / "a" / "1.bmp")
    with pytest.raises(UserError, match="two masks of one image"):
        MaskedImageFolder(root=str(root), test_size=1.0).setup("test")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((5, 10), 255, dtype=np.uint8), r"b/1\.png is 5 × 10 pixels and its image .* is 12 × 10"),
        (np.full((12, 10), 7, dtype=np.uint8), "has the values 7"),
        (np.zeros((12, 10), dtype=np.uint8), r"b/1\.png is empty"),
    ],
)
def test_masks_that_do_not_fit(write: Write, values: np.ndarray, message: str) -> None:
    root = write({"a": 3, "b": 3})
    Image.fromarray(values).save(root / "masks" / "b" / "1.png")
    data = MaskedImageFolder(root=str(root), test_size=1.0, num_workers=0)
    with pytest.raises(UserError, match=message):
        list(data.test_dataloader())


def test_masks_are_looked_at_before_training(write: Write) -> None:
    root = write({"a": 6, "b": 6})
    for file in (root / "masks").glob("*/*.png"):
        Image.fromarray(np.full((12, 10), 255, dtype=np.uint8)).save(file)
    data = MaskedImageFolder(root=str(root), test_size=0.5, val_size=0, num_workers=0)
    with pytest.warns(UserWarning, match=r"6 of 6 masks of the train images in .*masks are full"):
        data.setup("fit")
    assert next(iter(data.train_dataloader()))[2].all()
    Image.fromarray(np.full((12, 10), 7, dtype=np.uint8)).save(file)
    with pytest.raises(UserError, match="has the values 7"):
        MaskedImageFolder(root=str(root), test_size=1.0, num_workers=0).setup("test")


def test_folders_and_patterns(write: Write, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"images is not a folder: point --data\.root"):
        MaskedImageFolder(root=str(tmp_path / "none"))
    root = write({"a": 3, "b": 3})
    with pytest.raises(UserError, match="is no regular expression"):
        MaskedImageFolder(root=str(root), group="(")
    with pytest.raises(UserError, match="finds nothing in the file name 0"):
        MaskedImageFolder(root=str(root), group="_", test_size=1.0).setup("test")


@pytest.mark.real_data
def test_real(real_data: Path) -> None:
    data = MaskedImageFolder(
        root=str(real_data / "coco_objects"), image_size=48, group="^[^_]+", val_size=0.2, num_workers=0
    )
    sizes = [len(data.dataset(split)) for split in ("train", "val", "test")]
    assert sum(sizes) == 145
    assert min(sizes) > 10
    for images, labels, masks in data.test_dataloader():
        assert images.shape[1:] == (3, 48, 48)
        assert labels.max() < 10
        assert masks.flatten(1).any(1).all()
        assert 0.1 < masks.float().mean() < 0.9

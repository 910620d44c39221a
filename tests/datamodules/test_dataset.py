from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.v2 import functional as TF

from lightning_robust.datamodules import Augmentation, ImageDataset, TensorSource
from lightning_robust.datamodules.dataset import collate, decode, resize_and_centre


def some_data(augmentation: Augmentation | None = None) -> ImageDataset:
    images = torch.randint(0, 256, (20, 3, 6, 6), dtype=torch.uint8)
    labels = np.arange(20) % 4
    rows = np.arange(1, 20, 2)
    return ImageDataset(TensorSource(images, labels), rows, labels[rows], augmentation)


def test_an_item_is_a_scaled_image_and_its_label() -> None:
    data = some_data()
    image, label = data[3]
    assert torch.equal(image, data.source.images[7] / 255)  # type: ignore[attr-defined]
    assert image.dtype == torch.float32
    assert (label, len(data)) == (3, 10)
    assert torch.equal(data[-1][0], data[9][0])


@pytest.mark.parametrize("index", [10, -11])
def test_an_index_out_of_range_is_an_index_error(index: int) -> None:
    with pytest.raises(IndexError, match="10 images"):
        some_data()[index]


def test_iterating_ends() -> None:
    assert len(list(some_data())) == 10


@pytest.mark.parametrize("collate_fn", [None, collate])
def test_loaders_of_all_kinds_get_the_same_batch(collate_fn: object) -> None:
    data = some_data()
    ((images, labels),) = DataLoader(data, batch_size=10, collate_fn=collate_fn)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert torch.equal(images, torch.stack([data[i][0] for i in range(10)]))
    assert labels.tolist() == [data[i][1] for i in range(10)] == data.labels.tolist()


def test_subsets_work() -> None:
    data = some_data()
    ((images, labels),) = DataLoader(Subset(data, [4, 2]), batch_size=2)
    assert torch.equal(images[1], data[2][0])
    assert labels.tolist() == [data[4][1], data[2][1]]


@pytest.mark.parametrize("name", ["crop_flip", "imagenet"])
def test_augmentation_belongs_to_epoch_and_image_and_not_to_the_batch(name: str) -> None:
    data = some_data(Augmentation(name, 5, (6, 6)))
    batch = data.__getitems__([(2, i) for i in range(10)])
    shuffled = data.__getitems__([(2, 7), (2, 3)])
    assert torch.equal(batch.images[[7, 3]], shuffled.images)
    assert torch.equal(batch.images[7], data[(2, 7)][0])
    assert not torch.equal(batch.images, data.__getitems__([(3, i) for i in range(10)]).images)
    assert torch.equal(data.__getitems__([1, 2]).images, data.__getitems__([(0, 1), (0, 2)]).images)


def test_augmented_images_are_the_same_in_any_worker() -> None:
    data = some_data(Augmentation("imagenet", 5, (6, 6)))
    keys = [(epoch, index) for epoch in (0, 1) for index in range(10)]
    loaded = [
        torch.cat([x for x, _ in DataLoader(data, batch_size=size, sampler=keys, num_workers=w, collate_fn=collate)])
        for w, size in ((0, 20), (2, 3))
    ]
    assert torch.equal(*loaded)


def test_data_sets_can_be_sent_to_spawned_workers() -> None:
    data = some_data(Augmentation("imagenet", 5, (6, 6)))
    assert torch.equal(pickle.loads(pickle.dumps(data))[(3, 4)][0], data[(3, 4)][0])


def test_decode_converts_channels(tmp_path: Path) -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert torch.equal(decode(tmp_path / "grey.png", 1), torch.from_numpy(grey)[None])
    assert torch.equal(decode(tmp_path / "grey.png", 3), torch.from_numpy(grey).expand(3, 3, 4))


def test_decode_refuses_to_clip_more_than_8_bits(tmp_path: Path) -> None:
    Image.fromarray(np.full((3, 4), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="more than 8 bits"):
        decode(tmp_path / "deep.png", 1)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (32, 32), (7, 9)])
def test_resizing_keeps_the_aspect_and_cuts_the_centre(shape: tuple[int, int]) -> None:
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    ours = resize_and_centre(image, (16, 16), crop_pct=0.5)
    assert torch.equal(ours, TF.center_crop(TF.resize(image, [32], antialias=True), [16, 16]))
    assert resize_and_centre(image, (20, 12)).shape == (3, 20, 12)


def test_resizing_in_memory_keeps_dtype_and_range() -> None:
    labels = np.zeros(3, dtype=np.int64)
    floats = TensorSource((torch.rand(3, 1, 9, 9) > 0.5).float(), labels).resized((20, 14)).images
    assert floats.shape == (3, 1, 20, 14)
    assert 0 <= floats.min() <= floats.max() <= 1
    assert TensorSource(torch.zeros(3, 1, 9, 9, dtype=torch.uint8), labels).resized((4, 4)).images.dtype == torch.uint8

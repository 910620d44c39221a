from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lightning_robust.datamodules import Digits, ImageDataModule, TensorSource
from lightning_robust.errors import UserError


class Tiny(ImageDataModule):
    """One image per pixel value, its label the value modulo 3."""

    own_val = False
    labels: Any = None
    pixels: Any = None

    @property
    def all_class_names(self) -> list[str]:
        return ["zero", "one", "two"]

    @property
    def source_shape(self) -> tuple[int, int, int]:
        return 1, 4, 4

    def read(self, split: str) -> TensorSource | None:
        if split == "val" and not self.own_val:
            return None
        values = torch.arange(60, dtype=torch.uint8)
        images = values[:, None, None, None].expand(60, 1, 4, 4) if self.pixels is None else self.pixels
        labels = np.arange(60) % 3 if self.labels is None else self.labels
        return TensorSource(images, labels)


def values(data: ImageDataModule, split: str) -> list[int]:
    """Name the images of a split by their pixel."""
    dataset = data.dataset(split)  # type: ignore[arg-type]
    return [round(float(dataset[i][0][0, 0, 0]) * 255) for i in range(len(dataset))]


def test_validation_is_held_out_of_the_training_images() -> None:
    data = Tiny(val_size=0.25)
    train, val = values(data, "train"), values(data, "val")
    assert len(val) == 15
    assert sorted(train + val) == list(range(60))
    assert torch.bincount(data.dataset("val").labels).tolist() == [5, 5, 5]
    assert values(data, "test") == list(range(60))
    assert values(Tiny(val_size=15), "val") == val
    assert values(Tiny(val_size=15, seed=1), "val") != val


def test_an_own_validation_split_leaves_the_training_images_whole() -> None:
    data = Tiny()
    data.own_val = True
    assert values(data, "train") == values(data, "val") == list(range(60))


def test_classes_are_renumbered_in_the_order_given() -> None:
    data = Tiny(classes=[2, 0])
    assert (data.class_names, data.num_classes) == (["two", "zero"], 2)
    test = data.dataset("test")
    assert [(v % 3, int(label)) for v, label in zip(values(data, "test"), test.labels, strict=True)] == [
        (0, 1),
        (2, 0),
    ] * 20
    assert not any(value % 3 == 1 for value in values(data, "train") + values(data, "val"))


def test_limit_is_balanced_per_split() -> None:
    data = Tiny(limit={"train": 9, "test": 6})
    assert torch.bincount(data.dataset("train").labels).tolist() == [3, 3, 3]
    assert torch.bincount(data.dataset("test").labels).tolist() == [2, 2, 2]
    assert len(data.dataset("val")) == 6
    assert [len(Tiny(limit=5).dataset(split)) for split in ("train", "val", "test")] == [5, 5, 5]
    assert not set(values(data, "train")) & set(values(data, "val"))
    assert values(Tiny(limit=6, seed=0), "test") != values(Tiny(limit=6, seed=1), "test")


def test_images_are_resized() -> None:
    for size, shape in ((8, (1, 8, 8)), ((6, 4), (1, 6, 4))):
        data = Tiny(image_size=size)
        assert data.image_shape == shape
        assert tuple(data.dataset("test")[0][0].shape) == shape


def test_only_the_training_loader_augments() -> None:
    data = Digits(augmentation="crop_flip", batch_size=1294, limit={"train": 100})
    plain = data.dataset("train").__getitems__(range(100)).images
    augmented = data.dataset("train", augment=True).__getitems__(range(100)).images
    assert not torch.equal(plain, augmented)
    ((loaded, _),) = data.train_dataloader()
    assert sorted(map(tuple, loaded.flatten(1).tolist())) == sorted(map(tuple, augmented.flatten(1).tolist()))
    (images, _), *_ = data.test_dataloader()
    assert torch.equal(images[0], data.dataset("test")[0][0])


@pytest.mark.parametrize("name", ["val", "test", "predict"])
def test_evaluation_loaders_keep_the_order(name: str) -> None:
    data = Tiny(eval_batch_size=7)
    split = "val" if name == "val" else "test"
    loaded = torch.cat([images for images, _ in getattr(data, f"{name}_dataloader")()])
    assert [round(float(image[0, 0, 0]) * 255) for image in loaded] == values(data, split)


def test_no_validation_is_a_choice() -> None:
    data = Tiny(val_size=0)
    data.setup("fit")
    assert not data.has_val
    assert len(data.dataset("train")) == 60
    with pytest.raises(UserError, match="has no val images"):
        data.setup("validate")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"eval_batch_size": 0}, "eval_batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"val_size": -0.1}, "val_size=-0.1"),
        ({"val_size": 1.5}, r"val_size=1\.5"),
        ({"val_size": 1.0}, r"val_size=1\.0 leaves nothing"),
        ({"classes": [0, 3]}, "class numbers 0 to 2"),
        ({"classes": [-1]}, "class numbers 0 to 2"),
        ({"classes": []}, "class numbers 0 to 2"),
        ({"classes": [1, 1]}, "names a class twice"),
        ({"limit": 2}, "limit=2 for train is below the number of classes, 3"),
        ({"limit": {"test": 1}}, "limit=1 for test"),
        ({"limit": {"dev": 5}}, "no split 'dev'"),
        ({"augmentation": "cutout"}, "'cutout' is unknown"),
        ({"image_size": 0}, "image_size=0"),
        ({"image_size": (3, 4, 5)}, "image_size"),
    ],
)
def test_wrong_settings_fail_in_the_constructor(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Tiny(**settings)


def test_limit_may_be_as_low_as_the_classes_kept() -> None:
    assert len(Tiny(classes=[0, 1], limit=2).dataset("test")) == 2


@pytest.mark.parametrize("size", [0.001, 60, 1000])
def test_a_val_size_that_leaves_nothing_is_an_error(size: float) -> None:
    with pytest.raises(UserError, match=f"val_size={size}"):
        Tiny(val_size=size).setup("fit")


@pytest.mark.parametrize("wrong", [-1, 3])
def test_labels_outside_the_classes_are_an_error(wrong: int) -> None:
    data = Tiny()
    data.labels = np.array([0] * 59 + [wrong])
    with pytest.raises(UserError, match=f"1 labels outside 0 to 2, the first at image 59: {wrong}"):
        data.setup("test")


def test_as_many_labels_as_images() -> None:
    data = Tiny()
    data.labels = np.zeros(59, dtype=np.int64)
    with pytest.raises(UserError, match="60 images and 59 labels"):
        data.setup("test")


@pytest.mark.parametrize("wrong", [-0.01, 1.5, float("nan")])
def test_float_pixels_outside_the_unit_range_are_an_error(wrong: float) -> None:
    data = Tiny()
    data.pixels = torch.rand(60, 1, 4, 4)
    data.pixels[7, 0, 1, 1] = wrong
    with pytest.raises(UserError, match="NaN" if wrong != wrong else r"outside \[0, 1\]"):
        data.setup("test")


def test_unknown_splits_are_an_error() -> None:
    with pytest.raises(UserError, match="no split 'dev'"):
        Tiny().dataset("dev")  # type: ignore[arg-type]


def test_loader_settings() -> None:
    data = Tiny(num_workers=2)
    loader = data.train_dataloader()
    assert (loader.num_workers, loader.persistent_workers) == (2, True)
    assert Tiny().train_dataloader().num_workers == 0


def test_the_same_augmented_batches_for_any_number_of_workers() -> None:
    def epochs(workers: int) -> torch.Tensor:
        data = Digits(augmentation=["imagenet", "crop"], limit=30, batch_size=10, num_workers=workers)
        loader = data.train_dataloader()
        seen = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            seen += [images for images, _ in loader]
        return torch.stack(seen)

    assert torch.equal(epochs(0), epochs(2))

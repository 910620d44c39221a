from __future__ import annotations

import torch
from sklearn.datasets import load_digits

from lightning_robust.datamodules import Digits


def test_splits_are_all_the_digits_once() -> None:
    data = Digits()
    parts = [data.dataset(split) for split in ("train", "val", "test")]
    images = torch.cat([part.__getitems__(range(len(part))).images for part in parts])
    assert [len(part) for part in parts] == [1294, 144, 359]
    ours = sorted((images * 16).round().to(torch.uint8).flatten(1).tolist())
    assert ours == sorted(load_digits().data.astype("uint8").tolist())
    assert images.max() == 1


def test_splits_are_stratified() -> None:
    data = Digits()
    share = [
        torch.bincount(data.dataset(split).labels) / len(data.dataset(split)) for split in ("train", "val", "test")
    ]
    assert (share[0] - share[2]).abs().max() < 0.01
    assert (share[0] - share[1]).abs().max() < 0.01


def test_the_test_images_do_not_depend_on_the_seed() -> None:
    first, second = Digits(seed=0), Digits(seed=1)
    assert (first.dataset("test").rows == second.dataset("test").rows).all()
    assert torch.equal(first.dataset("test")[0][0], second.dataset("test")[0][0])
    assert (first.dataset("val").rows != second.dataset("val").rows).any()


def test_the_model_can_be_linked_before_setup() -> None:
    data = Digits()
    assert (data.num_classes, data.image_shape, data.class_names) == (10, (1, 8, 8), [str(i) for i in range(10)])
    assert tuple(data.dataset("test")[0][0].shape) == data.image_shape

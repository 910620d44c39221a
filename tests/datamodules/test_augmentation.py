from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from lightning_robust.datamodules import AUGMENTATIONS, Augmentation
from lightning_robust.datamodules.augmentation import image_keys, uniforms
from lightning_robust.errors import UserError


def some_images(n: int = 64) -> torch.Tensor:
    return torch.randint(1, 256, (n, 3, 12, 10), dtype=torch.uint8)


def test_keys_differ_by_seed_epoch_and_index() -> None:
    keys = [image_keys(seed, epoch, np.arange(100)) for seed in range(4) for epoch in range(4)]
    assert len(np.unique(np.concatenate(keys))) == 1600


def test_uniforms_are_uniform_and_independent() -> None:
    draws = uniforms(image_keys(0, 0, np.arange(20_000)), 3)
    assert draws.min() >= 0
    assert draws.max() < 1
    # Five standard errors of a mean, a variance and a correlation of uniform numbers.
    np.testing.assert_allclose(draws.mean(0), 0.5, atol=5 * (1 / 12 / 20_000) ** 0.5)
    np.testing.assert_allclose(draws.var(0), 1 / 12, atol=5 * (1 / 180 / 20_000) ** 0.5)
    np.testing.assert_allclose(np.corrcoef(draws.T) - np.eye(3), 0, atol=5 / 20_000**0.5)


def test_crop_is_a_window_of_the_padded_image() -> None:
    images = some_images()
    cropped, _ = Augmentation("crop", 0, (12, 10))(images, image_keys(0, 0, np.arange(64)))
    offsets = set()
    for image, crop in zip(images, cropped, strict=True):
        padded = TF.pad(image, [4])
        windows = [(y, x) for y in range(9) for x in range(9) if torch.equal(TF.crop(padded, y, x, 12, 10), crop)]
        assert len(windows) == 1
        offsets.add(windows[0])
    assert len(offsets) > 32
    assert {y for y, _ in offsets} == {x for _, x in offsets} == set(range(9))


def test_flip_mirrors_about_half() -> None:
    images = some_images(400)
    flipped, _ = Augmentation("flip", 0, (12, 10))(images, image_keys(0, 0, np.arange(400)))
    mirrored = [torch.equal(a.flip(-1), b) for a, b in zip(images, flipped, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(images, flipped, strict=True)]
    assert all(m != k for m, k in zip(mirrored, kept, strict=True))
    assert 150 < sum(mirrored) < 250


def test_a_list_does_all_of_its_names() -> None:
    images, keys = some_images(), image_keys(0, 0, np.arange(64))
    both, listed = (Augmentation(names, 0, (12, 10))(images, keys)[0] for names in ("crop_flip", ["flip", "crop"]))
    assert torch.equal(both, listed)
    assert not torch.equal(both, Augmentation("crop", 0, (12, 10))(images, keys)[0])


@pytest.mark.parametrize("names", ["none", None, []])
def test_none_does_nothing(names: list[str] | str | None) -> None:
    assert not Augmentation(names, 0, (12, 10))


def test_unknown_names_are_an_error() -> None:
    with pytest.raises(UserError, match=r"'cutmix' is unknown: choose from none, crop"):
        Augmentation(["crop", "cutmix"], 0, (12, 10))


def test_imagenet_cuts_by_the_key_and_leaves_the_global_generator_alone() -> None:
    augmentation = Augmentation("imagenet", 0, (8, 8))
    image, keys = some_images(1)[0], image_keys(0, 0, np.arange(10))
    before = torch.get_rng_state()
    cuts = [augmentation.cut(image, key)[0] for key in keys]
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(9)
    assert all(torch.equal(cut, augmentation.cut(image, key)[0]) for cut, key in zip(cuts, keys, strict=True))
    assert cuts[0].shape == (3, 8, 8)
    assert len({cut.numpy().tobytes() for cut in cuts}) == 10


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_pixels_stay_in_range_and_dtype(name: str) -> None:
    augmentation = Augmentation(name, 0, (12, 10))
    for images in (some_images(), torch.rand(64, 1, 12, 10)):
        changed, _ = augmentation(images, image_keys(0, 0, np.arange(64)))
        assert changed.dtype == images.dtype
        assert changed.shape == images.shape
        assert changed.min() >= 0
        assert changed.max() <= images.max()

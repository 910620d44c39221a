"""Random resizing and padding: each image as torch's own resizing and padding would have it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from defense_cases import Recorder, Trained, tiny
from torch import Tensor, nn

from lightning_robust.defenses import Randomization
from lightning_robust.errors import UserError
from lightning_robust.models import create_network


@pytest.mark.parametrize(
    ("defense", "patterns"),
    [
        (Randomization(setting="imagenet"), 12_528),  # the paper's count
        (Randomization(setting="imagenet", sizes=(310, 331)), 3_794),  # the contest's
        (Randomization(), 4**2 + 3**2 + 2**2),
    ],
)
def test_number_of_patterns(defense: Randomization, patterns: int) -> None:
    assert defense.patterns == patterns


def test_settings() -> None:
    cifar, imagenet = Randomization(setting="cifar"), Randomization(setting="imagenet")
    assert (cifar.low, cifar.high, cifar.pad_to) == (32, 35, 35)
    assert (imagenet.low, imagenet.high, imagenet.pad_to) == (299, 331, 331)


def found_pattern(image: Tensor, padded: Tensor, defense: Randomization) -> list[tuple[int, int, int]]:
    """All (size, top, left) for which torch's nearest resizing and zero padding give ``padded``."""
    found = []
    for size in range(defense.low, defense.high):
        resized = F.interpolate(image[None], size=size, mode="nearest")[0]
        for top in range(defense.pad_to - size + 1):
            for left in range(defense.pad_to - size + 1):
                right, bottom = defense.pad_to - size - left, defense.pad_to - size - top
                if torch.equal(F.pad(resized, (left, right, top, bottom)), padded):
                    found.append((size, top, left))
    return found


def test_every_image_is_resized_and_padded_in_its_own_way() -> None:
    defense, images = Randomization(nn.Identity()), 0.1 + 0.9 * torch.rand(300, 3, 32, 32)
    padded = defense.transform(images)
    assert padded.shape == (300, 3, 35, 35)
    patterns = Counter()
    for image, result in zip(images, padded, strict=True):
        found = found_pattern(image, result, defense)
        assert len(found) == 1
        patterns.update(found)
    assert len(patterns) == 29  # all of them
    sizes = Counter()
    for (size, _, _), times in patterns.items():
        sizes[size] += times
    assert all(abs(times - 100) < 4 * (300 * 1 / 3 * 2 / 3) ** 0.5 for times in sizes.values())


@pytest.mark.parametrize("size", [299, 300, 313, 330])
def test_nearest_neighbour_at_imagenet_sizes(size: int) -> None:
    defense, images = Randomization(sizes=(size, size + 1), pad_to=331), torch.rand(2, 1, 299, 299)
    drawn = defense.transform(images)
    rows = (drawn[:, 0] != 0).any(2)
    assert rows.sum(1).tolist() == [size, size]
    columns = (drawn[:, 0] != 0).any(1)
    inner = torch.stack([image[0][row][:, column] for image, row, column in zip(drawn, rows, columns, strict=True)])
    assert torch.equal(inner, F.interpolate(images, size=size, mode="nearest")[:, 0])


def test_smaller_images_are_enlarged_and_fill_is_what_pads() -> None:
    defense = Randomization(sizes=(20, 21), pad_to=24, fill=0.5)
    padded = defense.transform(torch.ones(3, 1, 10, 10))
    assert ((padded == 1).flatten(1).sum(1) == 400).all()
    assert ((padded == 0.5).flatten(1).sum(1) == 24 * 24 - 400).all()


def test_passes_average_probabilities() -> None:
    images = torch.rand(4, 3, 8, 8)
    defense = Randomization(tiny(), sizes=(8, 12), pad_to=12, passes=4)
    keys = defense.keys(images)
    each = [defense.model(defense.transform(images, keys, turn)).softmax(1) for turn in range(4)]
    assert not torch.equal(each[0], each[1])
    torch.testing.assert_close(defense(images), torch.stack(each).mean(0).log())
    single = Randomization(tiny(), sizes=(8, 12), pad_to=12)
    torch.testing.assert_close(single(images), defense.model(defense.transform(images, keys)))


def test_a_network_of_one_size_needs_the_image_brought_back() -> None:
    images = torch.rand(4, 1, 28, 28)
    network = create_network("lenet5", 10, (1, 28, 28)).eval()
    settings = {"sizes": (28, 35), "pad_to": 34}
    with pytest.raises(UserError, match=r"failed on the 34×34 images.*needs resize_back=True"):
        Randomization(network, **settings)(images)
    model = Recorder(network)
    defense = Randomization(model, **settings, resize_back=True)
    assert defense.transform(images).shape == images.shape
    assert defense(images).shape == (4, 10)


def test_brought_back_images_are_hardly_changed(digits: Trained) -> None:
    defense = Randomization(digits.model, sizes=(8, 10), pad_to=10, resize_back=True)
    right = digits.model(digits.images).argmax(1) == digits.labels
    defended = defense(digits.images).argmax(1) == digits.labels
    assert defended.double().mean() > 0.8 * right.double().mean()


def test_a_model_that_runs_out_of_memory_is_not_told_to_resize() -> None:
    class Full(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        Randomization(Full())(torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize("shape", [(3, 32, 30), (3, 64, 64)])
def test_images_that_do_not_fit(shape: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match=rf"images of {shape[1]}×{shape[2]}: it enlarges square images to 32"):
        Randomization(tiny())(torch.rand(2, *shape))


def test_the_gradient_reaches_every_pixel() -> None:
    images = torch.rand(3, 3, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(Randomization(nn.Identity()).transform(images).sum(), images)
    # each pixel counts as often as it was copied: once or, on a line that was doubled, twice or four times
    assert set(gradient.unique().tolist()) <= {1.0, 2.0, 4.0}
    assert gradient[0, 0].sum() in (32**2, 33**2, 34**2)

"""Normalisation inside the model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_robust.errors import UserError
from lightning_robust.models import Normalized, create_network, normalization_of

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616]


def by_hand(images: torch.Tensor) -> torch.Tensor:
    channels = [(images[:, c] - MEAN[c]) / STD[c] for c in range(3)]
    return torch.stack(channels, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_normalising_by_hand(dtype: torch.dtype) -> None:
    images = torch.rand(4, 3, 5, 7, dtype=dtype)
    model = Normalized(nn.Identity(), MEAN, STD).to(dtype)
    torch.testing.assert_close(model(images), by_hand(images), rtol=1e-6 if dtype == torch.float32 else 1e-15, atol=0)


def test_factory_normalises_before_the_network() -> None:
    images = torch.rand(2, 3, 32, 32)
    model = create_network("resnet20", 10, (3, 32, 32), mean=MEAN, std=STD).eval()
    torch.testing.assert_close(model(images), model.network(by_hand(images)))
    named = create_network("resnet20", 10, (3, 32, 32), mean="cifar10").eval()
    named.load_state_dict(model.state_dict())
    torch.testing.assert_close(named(images), model(images), rtol=0, atol=0)


@pytest.mark.parametrize("arguments", [{}, {"mean": "none"}, {"mean": [0.0] * 3, "std": [1.0] * 3}])
def test_no_normalisation_is_no_operation(arguments: dict) -> None:
    model = create_network("small_cnn", 10, (3, 8, 8), **arguments)
    assert model.mean is None
    assert list(model.buffers()) == []
    images = torch.rand(1, 3, 8, 8)
    assert Normalized(nn.Identity(), None, None)(images) is images


def test_buffers_are_in_no_checkpoint_and_follow_the_model() -> None:
    model = Normalized(nn.Conv2d(3, 1, 1), MEAN, STD)
    assert set(model.state_dict()) == {"network.weight", "network.bias"}
    assert set(dict(model.named_buffers())) == {"mean", "std"}
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.mean.dtype == half.std.dtype == torch.bfloat16
    assert torch.equal(half.float().mean, model.mean)  # not the value rounded to bfloat16


def test_a_model_made_on_the_meta_device_gets_its_values_with_its_storage() -> None:
    with torch.device("meta"):
        model = Normalized(nn.Conv2d(3, 1, 1), MEAN, STD)
    assert model.mean.is_meta
    model.to_empty(device="cpu")
    assert model.mean.flatten().tolist() == pytest.approx(MEAN)
    assert model.std.flatten().tolist() == pytest.approx(STD)


def test_one_number_serves_all_channels() -> None:
    images = torch.rand(2, 3, 4, 4)
    model = Normalized(nn.Identity(), [0.5], [0.25])
    torch.testing.assert_close(model(images), (images - 0.5) / 0.25)
    assert create_network("resnet20", 10, (3, 32, 32), mean="mnist").mean.shape == (1, 1, 1)


def test_says_what_it_does() -> None:
    assert "0.4914" in repr(Normalized(nn.Identity(), MEAN, STD))
    assert "no normalization" in repr(Normalized(nn.Identity()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean": [0.5] * 3}, "belong together"),
        ({"std": [0.5] * 3}, "belong together"),
        ({"mean": [0.5] * 2, "std": [0.5] * 2}, "3 channels"),
        ({"mean": [0.5] * 3, "std": [0.5, 0.0, 0.5]}, "positive"),
        ({"mean": "imagnet"}, "imagenet"),
        ({"mean": "cifar10", "std": [1.0] * 3}, "leave std out"),
    ],
)
def test_factory_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_network("resnet20", 10, (3, 32, 32), **arguments)


def test_rgb_statistics_on_gray_images_are_refused() -> None:
    with pytest.raises(UserError, match="1 channels"):
        create_network("resnet20", 10, (1, 32, 32), mean="imagenet")


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [([0.5], None, "belong together"), ([0.5], [0.5, 0.5], "1 and std 2"), ([], [], "one per channel")],
)
def test_module_refuses(mean: list[float], std: list[float] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Normalized(nn.Identity(), mean, std)


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_gray_presets_are_the_training_sets_statistics(real_data, name: str, folder: str) -> None:
    from torchvision import datasets

    pixels = getattr(datasets, folder)(real_data, train=True).data.double() / 255
    mean, std = normalization_of(name)
    assert mean[0] == pytest.approx(pixels.mean().item(), abs=1e-3)
    assert std[0] == pytest.approx(pixels.std().item(), abs=1e-3)


@pytest.mark.real_data
def test_cifar10_preset_is_the_training_sets_statistics(real_data) -> None:
    from PIL import Image

    strip = np.asarray(Image.open(real_data / "cifar10" / "train_images.png"))
    pixels = strip.reshape(-1, 3).astype(np.float64) / 255
    mean, std = normalization_of("cifar10")
    np.testing.assert_allclose(pixels.mean(0), mean, atol=5e-3)  # a fifth of the training set
    np.testing.assert_allclose(pixels.std(0), std, atol=5e-3)

"""Real networks: one that is provably robust, and one that a random defense seems to protect."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.attacks import AutoAttack
from lightning_robust.audit import audit
from lightning_robust.datamodules import MNIST
from lightning_robust.defenses import PixelShift
from lightning_robust.models import create_network

pytestmark = [pytest.mark.slow, pytest.mark.real_data]


@pytest.fixture
def provable(real_data: Path) -> nn.Module:
    """The network of locuslab/convex_adversarial, trained for a certificate at L∞ ε = 0.1 (arXiv 1711.00851)."""
    weights = real_data / "weights/convex_adversarial/mnist.pth"
    return create_network("small_cnn", 10, (1, 28, 28), weights=weights).eval()


def mnist(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    batch = MNIST(root=str(folder)).dataset("test").__getitems__(range(count))
    return batch.images, batch.labels


def dense(layer: nn.Conv2d, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """A convolution as a matrix and a vector."""
    size = int(np.prod(shape))
    with torch.no_grad():
        columns = F.conv2d(torch.eye(size).view(size, *shape), layer.weight, None, layer.stride, layer.padding).flatten(
            1
        )
        bias = F.conv2d(torch.zeros(1, *shape), layer.weight, layer.bias, layer.stride, layer.padding).flatten()
    return columns.T.contiguous(), bias


@torch.no_grad()
def certified(layers: list[tuple[Tensor, Tensor]], image: Tensor, label: int, eps: float) -> bool:
    """Whether no image within ε has another class, by linear bounds (arXiv 1804.09699, the dual of 1711.00851)."""
    low, high = (image - eps).clamp(0, 1).flatten(), (image + eps).clamp(0, 1).flatten()
    middle, half = (low + high) / 2, (high - low) / 2
    slopes: list[Tensor] = []
    lifts: list[Tensor] = []

    def bounds(matrix: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Of matrix · (last hidden layer) + bias, over the whole box."""
        lower, upper = bias.clone(), bias.clone()
        for number in reversed(range(len(slopes))):
            lower += matrix.clamp(max=0) @ lifts[number]
            upper += matrix.clamp(min=0) @ lifts[number]
            matrix = matrix * slopes[number]
            weight, offset = layers[number]
            lower += matrix @ offset
            upper += matrix @ offset
            matrix = matrix @ weight
        spread = matrix.abs() @ half
        return lower + matrix @ middle - spread, upper + matrix @ middle + spread

    for weight, bias in layers[:-1]:
        lower, upper = bounds(weight, bias)
        unstable = (lower < 0) & (upper > 0)
        slope = torch.where(unstable, upper / (upper - lower).clamp_min(1e-12), (lower >= 0).to(lower))
        slopes.append(slope)
        lifts.append(torch.where(unstable, -slope * lower, torch.zeros_like(lower)))
    weight, bias = layers[-1]
    lower, _ = bounds(weight[label] - weight, bias[label] - bias)
    lower[label] = 1
    return bool((lower > 0).all())


def test_a_provably_robust_network_is_trusted_between_its_certificate_and_autoattack(
    provable: nn.Module, real_data: Path
) -> None:
    images, labels = mnist(real_data, 100)
    result = audit(provable, images, labels, eps=0.1)
    assert result.verdict == "trusted", result.sentence
    first, second, third, last = (part for part in provable.modules() if isinstance(part, nn.Conv2d | nn.Linear))
    layers = [dense(first, (1, 28, 28)), dense(second, (16, 14, 14))]
    layers += [(part.weight.detach(), part.bias.detach()) for part in (third, last)]
    proven = [certified(layers, image, int(label), 0.1) for image, label in zip(images, labels, strict=True)]
    assert 0.9 < sum(proven) / len(proven) <= result.robust_accuracy
    some = 40
    fooled = AutoAttack(eps=0.1).run(provable, images[:some], labels[:some]).success
    own = audit(provable, images[:some], labels[:some], eps=0.1).robust_accuracy
    assert own == pytest.approx(1 - float(fooled.double().mean()), abs=0.01)


def test_a_shift_in_front_of_a_natural_network_is_flagged_and_broken(real_data: Path) -> None:
    from PIL import Image

    weights = real_data / "weights/pytorch_resnet_cifar10/resnet20-12fca82f.th"
    network = create_network("resnet20", 10, (3, 32, 32), weights=weights, mean="imagenet").eval()
    pixels = np.asarray(Image.open(real_data / "cifar10/test_images.png")).reshape(-1, 32, 32, 3)[:80]
    images = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float() / 255
    labels = torch.from_numpy(np.load(real_data / "cifar10/test_labels.npz")["labels"][:80]).long()
    result = audit(PixelShift(network), images, labels)
    assert result.verdict == "masked"
    assert "randomness" in result.flagged
    assert result.robust_accuracy < 0.05 < 0.8 < result.clean_accuracy

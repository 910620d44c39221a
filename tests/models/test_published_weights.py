"""Published checkpoints reach their published accuracy, so architecture, names and normalisation are right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from lightning_robust.models import Normalized, create_network

pytestmark = pytest.mark.real_data


@torch.no_grad()
def accuracy(model: Normalized, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    predictions = torch.cat([model(batch.float() / 255).argmax(1) for batch in images.split(250)])
    return (predictions == labels).double().mean().item()


@pytest.mark.parametrize(("name", "file"), [("resnet20", "resnet20-12fca82f.th"), ("resnet56", "resnet56-4bfd9763.th")])
def test_cifar10_resnets(real_data: Path, name: str, file: str) -> None:
    strip = np.asarray(Image.open(real_data / "cifar10" / "test_images.png"))
    images = torch.from_numpy(strip.reshape(-1, 32, 32, 3)[:1000].copy()).permute(0, 3, 1, 2)
    labels = torch.from_numpy(np.load(real_data / "cifar10" / "test_labels.npz")["labels"][:1000].astype(np.int64))
    weights = real_data / "weights" / "pytorch_resnet_cifar10" / file
    # These checkpoints were trained with ImageNet's mean and std.
    model = create_network(name, 10, (3, 32, 32), weights=weights, mean="imagenet")
    assert accuracy(model, images, labels) >= 0.90


@pytest.mark.parametrize(
    ("file", "data", "published"), [("mnist", "MNIST", 0.974), ("fashion_mnist", "FashionMNIST", 0.787)]
)
def test_provably_robust_small_cnns(real_data: Path, file: str, data: str, published: float) -> None:
    test = getattr(datasets, data)(real_data, train=False)
    weights = real_data / "weights" / "convex_adversarial" / f"{file}.pth"
    model = create_network("small_cnn", 10, (1, 28, 28), weights=weights)
    assert accuracy(model, test.data[:2000].unsqueeze(1), test.targets[:2000]) == pytest.approx(published, abs=0.015)

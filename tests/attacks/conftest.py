"""A small trained network, so that attacks meet decision boundaries that training made."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))  # conformance.py is a module, shared with benchmarks/
from conformance import Trained


@pytest.fixture(scope="session")
def digits() -> Trained:
    """A convolutional network with BatchNorm, trained on half of the embedded handwritten digits."""
    data = load_digits()
    images = torch.from_numpy(data.images / 16).float()[:, None]
    labels = torch.from_numpy(data.target).long()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
        for _ in range(150):
            rows = torch.randint(0, 900, (64,))
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    model.eval().requires_grad_(False)
    return Trained(model, images[900:], labels[900:])


@pytest.fixture(scope="session")
def cifar(real_data: Path) -> Trained:
    """The published ResNet-20 and 100 test images of CIFAR-10."""
    from lightning_robust.models import create_network

    weights = real_data / "weights/pytorch_resnet_cifar10/resnet20-12fca82f.th"
    model = create_network("resnet20", 10, (3, 32, 32), weights=weights, mean="imagenet")
    images = np.asarray(Image.open(real_data / "cifar10/test_images.png")).reshape(-1, 32, 32, 3)[:100]
    labels = torch.from_numpy(np.load(real_data / "cifar10/test_labels.npz")["labels"][:100]).long()
    # copied as (N, C, H, W): some peers stumble over the strides of a permuted tensor
    pixels = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).contiguous().float() / 255
    return Trained(model.eval().requires_grad_(False), pixels, labels)


@pytest.fixture(scope="session")
def mnist(real_data: Path) -> Trained:
    """A provably robust network (ε = 0.1, arXiv 1711.00851) and 200 test images of MNIST."""
    from torchvision.datasets import MNIST

    from lightning_robust.models import create_network

    weights = real_data / "weights/convex_adversarial/mnist.pth"
    model = create_network("small_cnn", 10, (1, 28, 28), weights=weights)
    data = MNIST(str(real_data), train=False)
    return Trained(model.eval().requires_grad_(False), data.data[:200, None].float() / 255, data.targets[:200])

"""A network that classifies most digits, and the digits."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_robust.datamodules import Digits


class Trained(NamedTuple):
    model: nn.Module
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@pytest.fixture(scope="session")
def _trained() -> Trained:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 40),
        nn.ReLU(),
        nn.Linear(40, 10),
    )
    data = Digits()
    train, test = data.dataset("train"), data.dataset("test")
    batch, held = train.__getitems__(range(len(train))), test.__getitems__(range(len(test)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch.images), batch.labels).backward()
        optimizer.step()
    model.eval()
    half = len(held.labels) // 2
    return Trained(
        model, held.images[:half], held.labels[:half], held.images[half : half + 60], held.labels[half : half + 60]
    )


@pytest.fixture
def trained(_trained: Trained) -> Trained:
    """The network may not be changed; it is looked at after the test."""
    before = {name: value.clone() for name, value in _trained.model.state_dict().items()}
    modes = [module.training for module in _trained.model.modules()]
    yield _trained
    assert modes == [module.training for module in _trained.model.modules()]
    for name, value in _trained.model.state_dict().items():
        assert torch.equal(value, before[name]), name

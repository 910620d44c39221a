"""Small networks for digits, natural and adversarially trained, and ways to spoil their gradients."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_robust.attacks import PGD
from lightning_robust.datamodules import Digits

sys.path.insert(0, str(Path(__file__).parent))  # audit_cases.py is a module
from audit_cases import EPS, Digit


def _network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def _trained(attack: PGD | None, epochs: int) -> nn.Module:
    torch.manual_seed(0)
    network = _network()
    dataset = Digits().dataset("train")
    batch = dataset.__getitems__(range(len(dataset)))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for epoch in range(epochs):
        for rows in torch.randperm(len(batch.images)).split(128):
            images, labels = batch.images[rows], batch.labels[rows]
            if attack is not None:
                images = attack(network, images, labels, seed=epoch)
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
    network.zero_grad()
    return network.eval()


@pytest.fixture(scope="session")
def natural() -> nn.Module:
    """A naturally trained network."""
    return _trained(None, 15)


@pytest.fixture(scope="session")
def robust() -> nn.Module:
    """An adversarially trained network."""
    return _trained(PGD(eps=EPS, steps=5, stop_at_success=False), 15)


@pytest.fixture(scope="session")
def digits() -> Digit:
    """200 test images."""
    dataset = Digits().dataset("test")
    batch = dataset.__getitems__(range(200))
    return Digit(batch.images, batch.labels)

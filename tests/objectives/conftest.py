from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn


class ToyNet(nn.Module):
    """Small, with everything that must be left alone: BatchNorm, dropout, a bias, a frozen layer."""

    def __init__(self, classes: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(6 * 36, classes)
        self.passes = 0

    def forward(self, images: Tensor) -> Tensor:
        self.passes += 1
        return self.head(self.drop(torch.tanh(self.norm(self.conv(images)))).flatten(1))


@pytest.fixture
def net() -> ToyNet:
    return ToyNet().train()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(8, 3, 8, 8, generator=generator), torch.randint(0, 3, (8,), generator=generator)

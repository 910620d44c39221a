"""A small network for digits that stands a shift, a resizing and some noise, so that defenses cost it little."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))  # defense_cases.py is a module
from defense_cases import Trained


@pytest.fixture(scope="session")
def digits() -> Trained:
    """Trained on half of the embedded handwritten digits, moved, resized and noisy; takes images of 8 pixels and up."""
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
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(512, 10),
        )
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
        for step in range(400):
            rows = torch.randint(0, 900, (64,))
            batch = images[rows]
            if step % 2:
                size = int(torch.randint(8, 11, ()))
                top, left = (int(torch.randint(0, 11 - size + 1, ())) for _ in range(2))
                batch = F.pad(F.interpolate(batch, size=size), (left, 11 - size - left, top, 11 - size - top))
            else:
                down, right = (int(torch.randint(-1, 2, ())) for _ in range(2))
                batch = F.pad(batch, (1, 1, 1, 1))[:, :, 1 - down : 9 - down, 1 - right : 9 - right]
            batch = (batch + 0.05 * torch.randn_like(batch)).clamp(0, 1)
            optimizer.zero_grad()
            F.cross_entropy(model(batch), labels[rows]).backward()
            optimizer.step()
    model.eval().requires_grad_(False)
    return Trained(model, images[900:], labels[900:])

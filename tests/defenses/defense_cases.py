"""What the tests of defenses share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_robust.defenses import Defense, PixelDeflection, PixelShift, Randomization, RegionBased


class Trained(NamedTuple):
    """A network in eval mode and images ``(N, 1, 8, 8)`` that it was not trained on."""

    model: nn.Module
    images: Tensor
    labels: Tensor


# every defense with settings for images of 8 × 8
DEFENSES: dict[str, Defense] = {
    "region": RegionBased(radius=0.1, votes=40),
    "randomization": Randomization(sizes=(8, 11), pad_to=11),
    "randomization-passes": Randomization(sizes=(8, 11), pad_to=11, passes=3, resize_back=True),
    "deflection": PixelDeflection(deflections=6, window=2, cam="geometric"),
    "deflection-rank": PixelDeflection(deflections=6, window=2, cam="rank", per_channel=True),
    "deflection-plain": PixelDeflection(deflections=6, window=2, cam=None, sigma=0),
    "shift": PixelShift(),
    "shift-9": PixelShift(shifts=9),
    "vote": PixelShift(mode="vote"),
}


def tiny(classes: int = 5, channels: int = 3) -> nn.Module:
    """An untrained network with BatchNorm for images of any size, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, classes),
        )
        nn.init.normal_(model[1].running_mean, std=0.1)
        nn.init.normal_(model[7].weight, std=2)
    return model.eval()


class Recorder(nn.Module):
    """Notes the size of the batches that pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.sizes: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        return self.model(images)

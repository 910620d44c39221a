"""Ways to make a network seem robust that is not, and a short budget."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.audit import BUDGETS

EPS = 0.15

SHORT = dataclasses.replace(
    BUDGETS["quick"],
    probes=100,
    sample=100,
    steps=10,
    apgd_steps=15,
    restarts=2,
    more_steps=40,
    eps_steps=5,
    directions=2,
    noise=30,
    queries=100,
    adaptive_steps=20,
    eot_samples=5,
)
"""The quick budget, shorter."""

TINY = dataclasses.replace(SHORT, probes=30, sample=30, steps=4, apgd_steps=4, more_steps=8, queries=10, noise=5)
"""No more than goes through every check."""


class Digit(NamedTuple):
    """Held-out digits."""

    images: Tensor
    labels: Tensor


class Rounding(nn.Module):
    """Rounds its input, which leaves no gradient."""

    def __init__(self, network: nn.Module, levels: int = 8) -> None:
        super().__init__()
        self.network, self.levels = network, levels

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images * self.levels).round() / self.levels)


class HonestRounding(Rounding):
    """Rounds, and lets the gradient straight through."""

    def forward(self, images: Tensor) -> Tensor:
        rounded = (images * self.levels).round() / self.levels
        return self.network(images + (rounded - images).detach())


class Dropout(nn.Module):
    """Drops features at test time, too."""

    def __init__(self, network: nn.Sequential) -> None:
        super().__init__()
        self.features, self.head = network[:5], network[5]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.dropout(self.features(images), 0.5, training=True))


class TinySoftmax(nn.Module):
    """Gives probabilities times 1e-6."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).softmax(1) * 1e-6


class HiddenDetach(nn.Module):
    """Lets only some of the first features carry a gradient."""

    def __init__(self, network: nn.Sequential) -> None:
        super().__init__()
        self.first, self.rest = network[:2], network[2:]

    def forward(self, images: Tensor) -> Tensor:
        features = self.first(images)
        return self.rest(torch.cat([features[:, :12].detach(), features[:, 12:]], 1))


class NoGradient(nn.Module):
    """Lets no gradient through at all."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.detach())


class Loud(nn.Module):
    """Has logits of the size that training at a high temperature gives them."""

    def __init__(self, network: nn.Module, factor: float = 100.0) -> None:
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, images: Tensor) -> Tensor:
        return self.factor * self.network(images)


class NotANumber(nn.Module):
    """Has a square root whose gradient at zero is infinite times zero."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images) + 0 * images.sub(images.detach()).pow(2).sum((1, 2, 3)).sqrt()[:, None]


class Clipped(nn.Module):
    """Clips its input, which leaves no gradient at the ends of [0, 1]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.clamp(0.1, 0.9))


class ByNumPy(nn.Module):
    """Bends its input outside of PyTorch."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        bent = np.tanh(3 * images.detach().cpu().numpy() - 1.5) / (2 * np.tanh(1.5)) + 0.5
        return self.network(torch.from_numpy(bent).to(images))


class OnlyClasses(nn.Module):
    """Gives the class alone, as a one-hot vector."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(images)
        return F.one_hot(logits.argmax(1), logits.shape[1]).float()

"""Mean and standard deviation of a stream of numbers, in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


class SizeScores(NamedTuple):
    """What :class:`SizeStatistics` computes; NaN before any number.

    Attributes:
        mean: float64.
        std: float64, of the population.
        numbers: int64, how many.
    """

    mean: Tensor
    std: Tensor
    numbers: Tensor


class SizeStatistics(Metric):
    """Mean and standard deviation of all numbers that it is given, such as the sizes of logits.

    States are sums in float64: the same on any number of ranks and with any batch size. (torchmetrics' ``MeanMetric``
    rounds each value to float32.)

    Example:
        >>> metric = SizeStatistics()
        >>> metric.update(torch.tensor([1.0, 3.0]))
        >>> float(metric.compute().mean), float(metric.compute().std)
        (2.0, 1.0)
    """

    full_state_update = False
    is_differentiable = False
    total: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "squares"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Count numbers, of any shape."""
        values = values.detach().double().to(self.total.device)
        self.total = self.total + values.sum()
        self.squares = self.squares + values.square().sum()
        self.count = self.count + values.numel()

    def compute(self) -> SizeScores:
        """Over all numbers counted, on every rank the same."""
        mean = self.total / self.count
        return SizeScores(mean, (self.squares / self.count - mean.square()).clamp_min(0).sqrt(), self.count)

"""ρ by hand, batch by batch, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_robust.errors import UserError
from lightning_robust.metrics import FeatureRobustness


def test_the_smallest_share_of_each_image() -> None:
    metric = FeatureRobustness(budget=0.4)
    image = torch.tensor([0, 0, 1, 1, 2, 2])
    share = torch.tensor([0.2, 0.1, 0.4, 0.3, 0.4, 0.4], dtype=torch.float64)
    success = torch.tensor([True, False, True, True, False, False])
    metric.update(3, image, share, success)
    found = metric.compute()
    assert float(found.robustness) == pytest.approx((0.2 + 0.3 + 0.4) / 3)  # the third was never misled: the budget
    assert float(found.changed) == pytest.approx((0.2 + 0.4 + 0.3) / 3)
    parts = FeatureRobustness(budget=0.4)
    parts.update(2, image[:4], share[:4], success[:4])
    parts.update(1, image[4:] - 2, share[4:], success[4:])
    assert parts.compute() == found


def test_nothing_counted() -> None:
    metric = FeatureRobustness(budget=0.4)
    metric.update(1, torch.tensor([0]), torch.tensor([0.4]), torch.tensor([False]))
    assert float(metric.compute().robustness) == pytest.approx(0.4)
    assert math.isnan(float(metric.compute().changed))


def test_what_is_refused() -> None:
    for budget in (0.0, 1.1, math.nan):
        with pytest.raises(UserError, match=r"budget=.* is a share of the features"):
            FeatureRobustness(budget)
    metric = FeatureRobustness(0.5)
    zero, yes = torch.tensor([0]), torch.tensor([True])
    for given, message in (
        ((1, zero, torch.tensor([0.1, 0.2]), yes), "one value a run"),
        ((1, zero, torch.tensor([0.1]), zero), "one value a run"),
        ((1, zero + 1, torch.tensor([0.1]), yes), "numbers outside 0 to 0"),
        ((1, zero, torch.tensor([1.5]), yes), r"outside \[0, 1\]"),
    ):
        with pytest.raises(UserError, match=message):
            metric.update(*given)

"""Mean and deviation, however the numbers come."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_robust.metrics import SizeStatistics


def test_it_is_that_of_all_numbers() -> None:
    values = torch.randn(40, 3, dtype=torch.float64) + 1e3
    whole, parts = SizeStatistics(), SizeStatistics()
    whole.update(values)
    for part in values.split(7):
        parts.update(part)
    for found in (whole.compute(), parts.compute()):
        assert float(found.mean) == pytest.approx(float(values.mean()), rel=1e-12)
        assert float(found.std) == pytest.approx(float(values.std(correction=0)), rel=1e-6)
        assert int(found.numbers) == 120


def test_nothing_counted() -> None:
    metric = SizeStatistics()
    metric.update(torch.zeros(0))
    assert math.isnan(float(metric.compute().mean))

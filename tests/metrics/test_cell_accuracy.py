"""Accuracies of a table's cells, and what is derived from them."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_robust.errors import UserError
from lightning_robust.metrics import CellAccuracy, defense_rate, falls


def test_counts_each_cell_by_itself() -> None:
    metric = CellAccuracy(["a", "b", "c"])
    metric.update("a", torch.tensor([True, False, True]))
    metric.update("b", torch.tensor([False]))
    metric.update("a", torch.tensor([True]))
    found = metric.compute()
    assert {name: float(found[name]) for name in "ab"} == {"a": 0.75, "b": 0.0}
    assert math.isnan(found["c"])
    assert metric.counts() == metric.own_counts() == {"a": (3, 4), "b": (0, 1), "c": (0, 0)}
    metric.reset()
    assert metric.counts() == {"a": (0, 0), "b": (0, 0), "c": (0, 0)}


def test_states_are_integer_sums_that_any_split_adds_up_to() -> None:
    right = torch.rand(37, generator=torch.Generator().manual_seed(0)) < 0.4
    whole, ranks = CellAccuracy(["x", "y"]), [CellAccuracy(["x", "y"]) for _ in range(3)]
    whole.update("y", right)
    for rank, metric in enumerate(ranks):
        for part in right[rank::3].split(4):
            metric.update("y", part)
    for state in ("right", "images"):
        parts = [getattr(metric, state) for metric in ranks]
        assert parts[0].dtype == torch.int64
        assert torch.equal(sum(parts), getattr(whole, state))
        assert whole._reductions[state] is not None
    assert whole.counts()["y"] == (int(right.sum()), 37)


def test_states_of_inference_mode_can_be_counted_on_with_outside() -> None:
    with torch.inference_mode():
        metric = CellAccuracy(["a"])
        metric.update("a", torch.tensor([True]))
    metric.update("a", torch.tensor([False]))
    assert metric.counts() == {"a": (1, 2)}


def test_bad_input() -> None:
    for cells in ([], ["a", "a"]):
        with pytest.raises(UserError, match="at least one cell"):
            CellAccuracy(cells)
    metric = CellAccuracy(["a"])
    with pytest.raises(UserError, match="no cell 'b'"):
        metric.update("b", torch.tensor([True]))
    for values in (torch.tensor([1]), torch.tensor([[True]])):
        with pytest.raises(UserError, match="one bool an image"):
            metric.update("a", values)


def test_defense_rate_by_its_formula() -> None:
    assert defense_rate(clean=0.9, attacked=0.1, defended=0.9) == 1
    assert defense_rate(clean=0.9, attacked=0.1, defended=0.1) == pytest.approx(0)
    assert defense_rate(clean=0.8, attacked=0.4, defended=0.6) == pytest.approx(0.5)
    assert defense_rate(clean=0.8, attacked=0.4, defended=0.2) == pytest.approx(-0.5)
    for defended in (0.0, 0.5, 1.0):
        assert math.isnan(defense_rate(clean=0.5, attacked=0.5, defended=defended))


def test_falls_below_half() -> None:
    assert [falls(0.8, adaptive) for adaptive in (0.0, 0.39, 0.4, 0.8, 0.9)] == [True, True, False, False, False]
    assert not falls(0.0, 0.0)

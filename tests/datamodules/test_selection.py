from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_robust.datamodules.selection import balanced_limit, hold_out, keep_classes
from lightning_robust.errors import UserError

labels_of = st.lists(st.integers(0, 4), min_size=20, max_size=80).map(np.array)


@given(labels_of, st.integers(1, 5), st.integers(0, 9))
def test_hold_out_divides_every_class_in_proportion(labels: np.ndarray, held_number: int, seed: int) -> None:
    labels = np.concatenate([labels, np.repeat(np.arange(5), 4)])
    kept, held = hold_out(labels, held_number, seed)
    assert len(held) == held_number
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held])), np.arange(len(labels)))
    exact = np.bincount(labels) * held_number / len(labels)
    assert np.all(np.abs(np.bincount(labels[held], minlength=5) - exact) < 1)


def test_hold_out_is_a_function_of_the_seed() -> None:
    labels = np.repeat(np.arange(3), 30)
    first, again, other = (hold_out(labels, 0.2, seed)[1] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(np.bincount(labels[first]), [6, 6, 6])


@pytest.mark.parametrize("size", [0.001, 90, 1000])
def test_hold_out_of_nothing_or_everything_is_an_error(size: float) -> None:
    with pytest.raises(UserError, match=f"val_size={size} holds out"):
        hold_out(np.repeat(np.arange(3), 30), size, 0)


def test_hold_out_that_empties_a_class_is_an_error() -> None:
    with pytest.raises(UserError, match="takes all 1 images of class number 1"):
        hold_out(np.array([0] * 3 + [1] + [2] * 3), 5, 0)


def test_keep_classes_renumbers_in_the_order_given() -> None:
    labels = np.array([0, 1, 2, 3, 2, 1])
    rows, new = keep_classes(labels, [3, 1])
    np.testing.assert_array_equal(rows, [1, 3, 5])
    np.testing.assert_array_equal(new, [1, 0, 1])


def test_keep_classes_copes_with_classes_that_have_no_image() -> None:
    rows, new = keep_classes(np.array([0, 1]), [4, 1])
    np.testing.assert_array_equal(rows, [1])
    np.testing.assert_array_equal(new, [1])


@given(labels_of, st.integers(5, 100), st.integers(0, 9))
def test_balanced_limit_is_as_equal_as_can_be(labels: np.ndarray, limit: int, seed: int) -> None:
    rows = balanced_limit(labels, limit, seed)
    assert len(rows) == min(limit, len(labels)) == len(set(rows.tolist()))
    counts, available = (np.bincount(x, minlength=5) for x in (labels[rows], labels))
    # A class that still has images left has at most one image fewer than any other.
    left = counts < available
    if left.any():
        assert counts[left].min() >= counts.max() - 1


def test_a_smaller_limit_chooses_a_subset() -> None:
    labels = np.random.default_rng(0).integers(0, 5, 200)
    small, large = (set(balanced_limit(labels, n, 3).tolist()) for n in (20, 90))
    assert small < large


def test_a_limit_below_the_number_of_classes_is_not_of_the_first_classes() -> None:
    labels = np.repeat(np.arange(100), 3)
    chosen = labels[balanced_limit(labels, 60, seed=0)]
    assert len(set(chosen)) == 60
    assert chosen.max() >= 90
    assert set(chosen) != set(labels[balanced_limit(labels, 60, seed=1)])

"""Wald's test: the vectors that follow from its formula, error rates by simulation, and a loop by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_robust.detectors import SequentialTest
from lightning_robust.errors import UserError

# t of arXiv 1812.05793 (MNIST at rate 0.05, CIFAR-10 at 0.005) and the mutants until "normal" where none changes
PUBLISHED = {
    "mnist nai": (0.0441, 320),
    "mnist ns": (0.0124, 1173),
    "mnist ws": (0.0425, 332),
    "mnist gf": (0.0308, 464),
    "cifar nai": (0.0840, 161),
    "cifar ns": (0.0243, 592),
    "cifar ws": (0.0334, 427),
    "cifar gf": (0.0500, 280),
}


def run(test: SequentialTest, changed: Tensor, block: int = 7) -> tuple[list[int], list[int], list[int]]:
    state = test.begin(len(changed))
    for part in changed.split(block, dim=1):
        test.update(state, part)
    return state.verdict.tolist(), state.mutants.tolist(), state.changes.tolist()


@pytest.mark.parametrize(("threshold", "quiet"), PUBLISHED.values(), ids=PUBLISHED)
def test_all_and_none_change(threshold: float, quiet: int) -> None:
    test = SequentialTest(threshold, 0.1 * threshold)
    assert (test.fewest(changing=True), test.fewest(changing=False)) == (15, quiet)
    changed = torch.stack([torch.ones(1300, dtype=torch.bool), torch.zeros(1300, dtype=torch.bool)])
    for block in (1, 7, 1300):
        assert run(test, changed, block) == ([1, -1], [15, quiet], [15, 0])


def test_image_mutants() -> None:
    kappa, mu = 0.0017, 1.2
    test = SequentialTest(mu * kappa, kappa * (mu - 1))
    assert (test.fewest(changing=True), test.fewest(changing=False)) == (9, 4322)
    changed = torch.zeros(2, 4400, dtype=torch.bool)
    changed[0] = True
    assert run(test, changed, 100) == ([1, -1], [9, 4322], [9, 0])


def test_bounds_are_those_of_wald() -> None:
    low, high = SequentialTest(0.1, 0.01).bounds
    assert (low, high) == pytest.approx((-2.944, 2.944), abs=1e-3)
    low, high = SequentialTest(0.1, 0.01, alpha=0.01, beta=0.2).bounds
    assert (low, high) == pytest.approx((math.log(0.2 / 0.99), math.log(0.8 / 0.01)))


def by_hand(test: SequentialTest, changed: list[bool]) -> tuple[int, int, int]:
    """The definition, one mutant after the other."""
    p0, p1 = test.threshold - test.half_width, test.threshold + test.half_width
    changes = 0
    for number, change in enumerate(changed, start=1):
        changes += change
        ratio = changes * math.log(p1 / p0) + (number - changes) * math.log((1 - p1) / (1 - p0))
        if ratio >= math.log((1 - test.beta) / test.alpha):
            return 1, number, changes
        if ratio <= math.log(test.beta / (1 - test.alpha)):
            return -1, number, changes
    return 0, len(changed), changes


@pytest.mark.parametrize("block", [1, 5, 64, 400])
def test_equals_the_definition(block: int) -> None:
    test = SequentialTest(0.2, 0.08, alpha=0.02, beta=0.1)
    shares = torch.linspace(0, 0.5, 120)[:, None]
    changed = torch.rand(120, 400, generator=torch.Generator().manual_seed(0)) < shares
    found = list(zip(*run(test, changed, block), strict=True))
    assert found == [by_hand(test, row) for row in changed.tolist()]
    assert {verdict for verdict, _, _ in found} == {1, 0, -1} or {verdict for verdict, _, _ in found} == {1, -1}


def test_rows_leave_when_decided() -> None:
    """What is asked of an image after its decision is not counted, and other images' rows do not mix with its own."""
    test = SequentialTest(0.0441, 0.00441)
    state = test.begin(4)
    rows = torch.tensor([3, 1])
    test.update(state, torch.ones(2, 15, dtype=torch.bool), rows)
    assert state.verdict.tolist() == [0, 1, 0, 1]
    test.update(state, torch.zeros(4, 10, dtype=torch.bool))
    assert state.mutants.tolist() == [10, 15, 10, 15]
    assert state.changes.tolist() == [0, 15, 0, 15]
    test.update(state, torch.zeros(4, 0, dtype=torch.bool))
    assert state.mutants.tolist() == [10, 15, 10, 15]


@pytest.mark.parametrize(("alpha", "beta"), [(0.05, 0.05), (0.01, 0.1)])
def test_error_rates(alpha: float, beta: float) -> None:
    """At p0 and p1 the shares of wrong decisions are α/(1-β) and β/(1-α) at most, and their sum α + β."""
    test = SequentialTest(0.3, 0.08, alpha=alpha, beta=beta)
    count, generator = 4000, torch.Generator().manual_seed(1)
    wrong = {}
    for share, verdict in ((0.22, 1), (0.38, -1)):
        state = test.begin(count)
        while bool(state.undecided.any()):
            test.update(state, torch.rand(count, 64, generator=generator) < share)
        wrong[verdict] = float((state.verdict == verdict).double().mean())
    noise = 3 * math.sqrt(0.1 / count)
    assert 0 < wrong[1] <= alpha / (1 - beta) + noise * math.sqrt(alpha)
    assert 0 < wrong[-1] <= beta / (1 - alpha) + noise * math.sqrt(beta)
    assert wrong[1] + wrong[-1] <= alpha + beta + noise * math.sqrt(alpha + beta)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"threshold": 0.0, "half_width": 0.0}, "threshold=0"),
        ({"threshold": 0.1, "half_width": 0.1}, "shares 0 and 0.2"),
        ({"threshold": 0.95, "half_width": 0.095}, "1.045"),
        ({"threshold": 0.1, "half_width": 0.0}, "the first below the second"),
        ({"threshold": 0.1, "half_width": 0.01, "alpha": 0.0}, "alpha=0.0"),
        ({"threshold": 0.1, "half_width": 0.01, "alpha": 0.5, "beta": 0.5}, "below 1"),
        ({"threshold": float("nan"), "half_width": 0.01}, "threshold=nan"),
    ],
)
def test_refuses(settings: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        SequentialTest(**settings)

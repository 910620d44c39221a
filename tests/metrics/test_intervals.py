from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_robust.errors import UserError
from lightning_robust.metrics import wilson_interval


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    # Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine 17 (1998), table I
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_published_values(successes: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(successes, total) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(0, 500), st.integers(0, 500), st.floats(0.5, 0.999))
def test_holds_the_share_and_mirrors(a: int, b: int, level: float) -> None:
    low, high = wilson_interval(a, a + b, level)
    share = a / (a + b) if a + b else 0.5
    assert 0 <= low <= share <= high <= 1
    assert wilson_interval(b, a + b, level) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_covers_as_often_as_it_says() -> None:
    share, total = 0.3, 80
    draws = torch.distributions.Binomial(total, torch.tensor(share)).sample((4000,)).int().tolist()
    covered = sum(low <= share <= high for low, high in (wilson_interval(count, total) for count in draws))
    assert covered / len(draws) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize(("successes", "total", "level"), [(-1, 5, 0.95), (6, 5, 0.95), (1, 5, 1.0), (1, 5, 0.0)])
def test_impossible_counts_are_refused(successes: int, total: int, level: float) -> None:
    with pytest.raises(UserError, match="wilson_interval"):
        wilson_interval(successes, total, level)

"""The rules that checks go by."""

from __future__ import annotations

import pytest
from scipy import stats

from lightning_robust.audit.statistics import ALPHA, MATTERS, STRAY, judge, sign_test, tail


@pytest.mark.parametrize(
    ("count", "total", "share"),
    [(0, 10, 0.3), (1, 7, 0.01), (40, 500, 0.05), (900, 1000, 0.9), (5, 5, 1.0), (0, 5, 0.0), (1, 5, 0.0), (6, 5, 1.0)],
)
def test_the_tail_is_the_binomial_one(count: int, total: int, share: float) -> None:
    expected = stats.binom.sf(count - 1, total, share)
    assert tail(count, total, share) == pytest.approx(expected, rel=1e-9)


def test_the_sign_test_is_mcnemars_exact_one() -> None:
    assert sign_test(15, 4) == pytest.approx(stats.binomtest(15, 19, alternative="greater").pvalue, rel=1e-9)


def test_a_sound_model_is_rarely_flagged_in_all_checks_together() -> None:
    for total in (50, 150, 500, 10_000):
        flagged = next(count for count in range(total + 1) if judge(count, total) == "flag")
        assert stats.binom.sf(flagged - 1, total, STRAY) < ALPHA
        assert 12 * stats.binom.sf(flagged - 1, total, STRAY) < 0.05


def test_a_pass_excludes_a_share_that_matters() -> None:
    for total in (80, 200, 1000):
        most = max(count for count in range(total) if judge(count, total) == "pass")
        # so few would seldom be seen, were the share as large
        assert stats.binom.cdf(most, total, MATTERS) < 0.05


def test_few_images_decide_nothing_unless_nearly_all_are_odd() -> None:
    assert judge(0, 72) == "unsure"
    assert judge(0, 74) == "pass"
    assert judge(0, 0) == "unsure"
    assert judge(10, 10) == "flag"

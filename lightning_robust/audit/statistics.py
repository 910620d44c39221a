"""The audit's rules: exact tests of counts of images, and the three constants that they need."""

from __future__ import annotations

import math
from typing import Literal

from lightning_robust.metrics.intervals import wilson_interval

Outcome = Literal["pass", "flag", "unsure", "skipped"]

ALPHA = 0.05 / 12
"""Error of one test: with about a dozen tests, a sound model is flagged by chance in 5 of 100 audits (Bonferroni)."""

STRAY = 0.01
"""Share of images that may behave oddly in a sound model (an exact tie, a dead unit): not worth a word."""

BLACK_BOX = 0.002
"""Share of images that a black-box attack may win alone: what AutoAttack's code warns of (arXiv 2003.01690)."""

MATTERS = 0.05
"""A share of images that would mislead: a check passes only where it can exclude as much.

It is about what sound published models lose between PGD-20 and AutoAttack: 3.5 points (TRADES, 56.6 to 53.1) and less.
"""


def tail(count: int, total: int, share: float) -> float:
    """P(K ≥ ``count``) of a binomial K of ``total`` images with probability ``share``, exactly.

    Example:
        >>> round(tail(3, 3, 0.5), 3), tail(0, 10, 0.2)
        (0.125, 1.0)
    """
    if count <= 0:
        return 1.0
    if count > total or share <= 0:
        return 0.0
    if share >= 1:
        return 1.0
    logs = [
        math.lgamma(total + 1)
        - math.lgamma(k + 1)
        - math.lgamma(total - k + 1)
        + k * math.log(share)
        + (total - k) * math.log1p(-share)
        for k in range(count, total + 1)
    ]
    largest = max(logs)
    return min(1.0, math.exp(largest) * math.fsum(math.exp(value - largest) for value in logs))


def sign_test(wins: int, losses: int) -> float:
    """How likely so many wins, or more, are among images on which two attacks differ, were neither the better one.

    The exact form of McNemar's paired comparison: images on which both succeed or both fail say nothing.

    Example:
        >>> sign_test(0, 0), sign_test(10, 0) < 0.001 < sign_test(6, 5)
        (1.0, True)
    """
    return tail(wins, wins + losses, 0.5)


def judge(count: int, total: int, usual: float = STRAY, matters: float = MATTERS) -> Outcome:
    """The outcome of a check that counts odd images.

    * "flag": more than the ``usual`` share, beyond chance (exact binomial test at :data:`ALPHA`).
    * "pass": the 95 % Wilson interval of the share ends below ``matters``. With no odd image at all that takes 73
      images for 5 points.
    * "unsure": neither, which more images would settle.

    Example:
        >>> judge(0, 100), judge(40, 100), judge(0, 20)
        ('pass', 'flag', 'unsure')
    """
    if tail(count, total, usual) < ALPHA:
        return "flag"
    return "pass" if wilson_interval(count, total)[1] < matters else "unsure"


def points(share: float) -> str:
    """A share in per cent, as texts write it.

    Example:
        >>> points(0.1234)
        '12.3 %'
    """
    return f"{100 * share:.1f} %"

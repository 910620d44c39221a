"""Confidence intervals of shares."""

from __future__ import annotations

import math
from statistics import NormalDist

from lightning_robust.errors import UserError


def wilson_interval(successes: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a share: usable with few images and at 0 and 1, where ±1.96σ is not.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).

    Args:
        successes: images counted, 0 to ``total``.
        total: all images.
        level: confidence level, between 0 and 1.

    Returns:
        (low, high) in [0, 1]; (0, 1) without images.

    Raises:
        UserError: for counts that are not 0 ≤ successes ≤ total, and a level that is not between 0 and 1.

    Example:
        >>> tuple(round(limit, 4) for limit in wilson_interval(8, 10))
        (0.4902, 0.9433)
    """
    if not 0 <= successes <= total:
        raise UserError(f"wilson_interval: {successes} of {total}: successes lie between 0 and the total")
    if not 0 < level < 1:
        raise UserError(f"wilson_interval: level={level} lies between 0 and 1, for example 0.95")
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, weight = successes / total, z * z / total
    centre = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / total + weight / (4 * total)) / (1 + weight)
    # at 0 and 1 the formula gives the limit itself but for rounding
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == total else centre + half)

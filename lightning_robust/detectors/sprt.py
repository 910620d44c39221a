"""Wald's sequential probability ratio test of a share, for many images at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_robust.errors import UserError


@dataclass
class SequentialState:
    """How far the test of each image has come.

    Attributes:
        changes: ``(N,)`` int64, label changes among the mutants that were counted.
        mutants: ``(N,)`` int64, mutants that were counted; none is after a decision.
        verdict: ``(N,)`` int8: 1 adversarial, -1 normal, 0 not decided yet.
    """

    changes: Tensor
    mutants: Tensor
    verdict: Tensor

    @property
    def undecided(self) -> Tensor:
        """``(N,)`` bool."""
        return self.verdict == 0


@dataclass(frozen=True)
class SequentialTest:
    """Is the share of mutants that change an image's label above a threshold, by as few mutants as it takes?

    Wald's test (Annals of Mathematical Statistics 16, 1945) of p₀ = t - σ against p₁ = t + σ. After n mutants of which
    c changed the label, LLR = c · ln(p₁/p₀) + (n - c) · ln((1-p₁)/(1-p₀)); adversarial where LLR ≥ ln((1-β)/α), normal
    where LLR ≤ ln(β/(1-α)), else another mutant is drawn. Both bounds are tested after every mutant: that is what arXiv
    1805.05010 and 1812.05793 define; their code tests after a label change only, or sums the LLR over the steps, and
    the numbers of mutants that it reports cannot be had.

    A share of p₀ or less is called adversarial with probability α/(1-β) at most, one of p₁ or more normal with
    β/(1-α) at most, and both errors together are α + β at most. Between p₀ and p₁ nothing is promised.

    Args:
        threshold: t, a share in (0, 1).
        half_width: σ; half of the range around t where either answer will do.
        alpha: α, error rate on normal images.
        beta: β, error rate on adversarial images.

    Raises:
        UserError: unless 0 < t - σ < t + σ < 1 and α and β are above 0 with a sum below 1.

    Example:
        >>> test = SequentialTest(threshold=0.0441, half_width=0.00441)
        >>> test.fewest(changing=True), test.fewest(changing=False)
        (15, 320)
    """

    threshold: float
    half_width: float
    alpha: float = 0.05
    beta: float = 0.05

    def __post_init__(self) -> None:
        low, high = self.threshold - self.half_width, self.threshold + self.half_width
        if not 0 < low < high < 1:
            raise UserError(
                f"SequentialTest: threshold={self.threshold:.6g} and half_width={self.half_width:.6g} compare the "
                f"shares {low:.6g} and {high:.6g}: both must lie between 0 and 1, the first below the second"
            )
        check_error_rates(self.alpha, self.beta, "SequentialTest")

    @property
    def steps(self) -> tuple[float, float]:
        """What a label change adds to the LLR (above 0), and what an unchanged label adds (below 0)."""
        low, high = self.threshold - self.half_width, self.threshold + self.half_width
        return math.log(high / low), math.log1p(-high) - math.log1p(-low)

    @property
    def bounds(self) -> tuple[float, float]:
        """The LLR at or below which an image is normal, and at or above which it is adversarial."""
        return math.log(self.beta / (1 - self.alpha)), math.log((1 - self.beta) / self.alpha)

    def fewest(self, changing: bool) -> int:
        """Mutants until the decision on an image whose label each of them changes, or none does."""
        bound, step = self.bounds[changing], self.steps[not changing]
        return max(1, math.ceil(bound / step))

    def begin(self, count: int, device: torch.device | str = "cpu") -> SequentialState:
        """Nothing known yet of so many images."""
        zeros = torch.zeros(count, dtype=torch.int64, device=device)
        return SequentialState(zeros, zeros.clone(), torch.zeros(count, dtype=torch.int8, device=device))

    def update(self, state: SequentialState, changed: Tensor, rows: Tensor | None = None) -> None:
        """Go on with some mutants, one after the other; those after an image's decision are not counted.

        Args:
            state: changed in place.
            changed: ``(n, m)`` bool: whether each of the next m mutants changed the label.
            rows: ``(n,)`` which images these are; default all.
        """
        if rows is None:
            rows = torch.arange(len(state.verdict), device=changed.device)
        going = state.undecided[rows]
        rows, changed = rows[going], changed[going]
        if changed.numel() == 0:
            return
        changes = state.changes[rows, None] + changed.cumsum(1)
        mutants = state.mutants[rows, None] + torch.arange(1, changed.shape[1] + 1, device=changed.device)
        up, down = self.steps
        ratio = changes.double() * up + (mutants - changes).double() * down
        low, high = self.bounds
        adversarial, normal = ratio >= high, ratio <= low
        decided = adversarial | normal
        # where it is decided, the first time; else the last mutant of these
        first = torch.where(decided.any(1), decided.int().argmax(1), changed.shape[1] - 1)[:, None]
        state.changes[rows] = changes.gather(1, first)[:, 0]
        state.mutants[rows] = mutants.gather(1, first)[:, 0]
        verdict = adversarial.to(torch.int8) - normal.to(torch.int8)
        state.verdict[rows] = verdict.gather(1, first)[:, 0]


def check_error_rates(alpha: float, beta: float, name: str) -> None:
    """Refuse error rates that make no test.

    Raises:
        UserError: unless both are above 0 and their sum is below 1.
    """
    if not (alpha > 0 and beta > 0 and alpha + beta < 1):
        raise UserError(
            f"{name}: alpha={alpha} and beta={beta} are error rates above 0 whose sum is below 1, such as 0.05"
        )

"""The L∞ attack of Carlini and Wagner (arXiv 1608.04644, section VI-C), a whole batch at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_robust.attacks.cw_search import Search
from lightning_robust.attacks.projection import norms, per_image

_SHRINK = 0.9  # of τ, as in the paper
_RAISE = 5  # of c after a round that failed. The original doubles it, which finds the same norms in twice the passes.
_LARGEST = 20.0  # c of the original
_PACE = 0.2  # A step is no longer than this share of τ: longer ones jump across the interval that is left
_SMALLEST = 1e-5  # τ, below which a perturbation is none


class LinfSearch(Search):
    """Σ (|δ| - τ)₊ + c · hinge, with τ lowered whenever a hit within it is found, and c raised when none is.

    The maximum norm itself has a gradient at one value only. A round goes on from the best perturbation so far, cut off
    at the new τ.

    Attributes:
        tau: ``(n,)``.
    """

    def begin(self) -> None:
        """Any size is within τ."""
        self.tau = torch.ones_like(self.const)
        self.move(per_image(self.const, self.slope) * self.slope)

    @property
    def most(self) -> int:
        """A few rounds' worth: as many rounds are to come as succeed."""
        return 10 * self.settings.steps

    def turn(self, value: Tensor, slope: Tensor, hit: Tensor) -> None:
        """A step, and the next τ or c where a round is over."""
        size = norms(self.delta, "linf")
        won = hit & (size <= self.tau * (1 + 1e-4))
        beyond = (self.delta.abs() - per_image(self.tau, self.delta)).clamp_min(0)
        lost = self.over(self.const * value.clamp_min(0) + beyond.flatten(1).sum(1)) & ~won
        done = won | lost
        if not done.all():
            self.move(per_image(self.const, slope) * slope + self.delta.sign() * (beyond > 0))
        if not done.any():
            return
        self.tau = torch.where(won, _SHRINK * size, self.tau)
        self.const = torch.where(lost, _RAISE * self.const, self.const)
        self.lr = torch.minimum(torch.full_like(self.tau, self.settings.lr), _PACE * self.tau)
        tau = per_image(self.tau, self.clean)
        found = self.best.images[self.rows] - self.clean
        self.restart(done, (self.clean + torch.maximum(torch.minimum(found, tau), -tau)).clamp(0, 1))
        self.keep((~lost | (self.const <= _LARGEST)) & (self.tau > _SMALLEST))

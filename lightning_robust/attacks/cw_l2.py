"""The L2 attack of Carlini and Wagner (arXiv 1608.04644, section VI-A), a whole batch at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_robust.attacks.cw_search import Search
from lightning_robust.attacks.projection import per_image

_FINER = 0.1  # length of the last steps


class L2Search(Search):
    """‖δ‖² + c · hinge, with c raised tenfold until a round succeeds and then bisected."""

    coasts = True

    def begin(self) -> None:
        """The first round."""
        self.low, self.high = torch.zeros_like(self.const), torch.full_like(self.const, torch.inf)
        self.round = torch.zeros_like(self.rows)
        self.found = torch.zeros_like(self.rows, dtype=torch.bool)
        self._next_round(~self.found)

    @property
    def most(self) -> int:
        """All steps of all rounds."""
        return self.settings.steps * self.settings.rounds

    def turn(self, value: Tensor, slope: Tensor, hit: Tensor) -> None:
        """A step, and the next constant where a round is over."""
        self.found = self.found | hit
        over = self.over(self.const * value.clamp_min(0) + self.delta.flatten(1).square().sum(1))
        self.move(per_image(self.const, slope) * slope + 2 * self.delta)
        if not over.any():
            return
        self.round = self.round + over
        self.high = torch.where(over & self.found, torch.minimum(self.high, self.const), self.high)
        self.low = torch.where(over & ~self.found, torch.maximum(self.low, self.const), self.low)
        # 1e10 is the original's largest constant
        following = torch.where(self.high.isinf(), (10 * self.const).clamp_max(1e10), (self.low + self.high) / 2)
        self.const = torch.where(over, following, self.const)
        left = self.round < self.settings.rounds
        self.keep(left)
        self._next_round(over[left])

    def stalled(self, stalled: Tensor) -> Tensor:
        """In its last round an image goes on once with shorter steps: the usual ones jump about at the boundary."""
        finer = stalled & (self.round == self.settings.rounds - 1) & (self.lr > 0.9 * self.settings.lr)
        self.lr = torch.where(finer, _FINER * self.lr, self.lr)
        return stalled & ~finer

    def _next_round(self, which: Tensor) -> None:
        """The first step of a round; the gradient at the clean image is the same in all of them."""
        if which.any():
            self.restart(which)
            self.move(per_image(self.const, self.slope) * self.slope, which)
            self.best.iterations[self.rows] += which
            self.found = self.found & ~which

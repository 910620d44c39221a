"""The L0 attack of Carlini and Wagner (arXiv 1608.04644, section VI-B), a whole batch at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_robust.attacks.cw_search import Search
from lightning_robust.attacks.projection import per_image

_SHARE = 0.1  # of the changed pixels that are given back after a hit, while that goes well


class L0Search(Search):
    """Fool, give back the pixels that matter least, fool again with those that are left, until that fails.

    How much a pixel matters is -Σ g·δ over its channels, g the gradient of the hinge. Many pixels are given back at a
    time; where the rest then fails, half as many, down to one. A round goes on from the last hit, and is over at the
    first hit: the original's L2 term has next to no weight by then (its constant grows to 2e6) and is left out here,
    which found fewer pixels in fewer passes.

    Attributes:
        free: ``(n, 1, H, W)`` bool, the pixels that may change in this round.
        held: ``(n, 1, H, W)`` bool, the pixels that the last hit changed.
        worth: ``(n, H, W)`` how much each of these matters.
        count: ``(n,)`` int64, how many are given back at a time.
    """

    def begin(self) -> None:
        """All pixels may change."""
        self.free = torch.ones_like(self.clean[:, :1], dtype=torch.bool)
        self.held = self.free
        self.worth = torch.zeros_like(self.clean[:, 0])
        self.count = torch.full_like(self.rows, self.worth[0].numel())
        self.move(self.slope)

    @property
    def most(self) -> int:
        """A few rounds' worth: as many rounds are to come as succeed."""
        return 5 * self.settings.steps

    def turn(self, value: Tensor, slope: Tensor, hit: Tensor) -> None:
        """A step, or the next choice of pixels where a round is over."""
        self.slope = torch.where(per_image(hit, slope), self.slope, slope)  # at a hit there is none
        lost = self.over(value.clamp_min(0)) & ~hit
        done = hit | lost
        if done.any():
            failed = lost & ((self.count <= 1) | self.best.norm[self.rows].isinf())
            self._choose(hit, lost)
        else:
            failed = done
        self.move(slope * self.free, ~done)
        self.keep(~failed & (self.held.flatten(1).sum(1) > 1))

    def _choose(self, hit: Tensor, lost: Tensor) -> None:
        changed = self.delta.ne(0).any(1)
        worth = -(self.slope * self.delta).sum(1)
        self.worth = torch.where(hit[:, None, None], worth, self.worth)
        self.held = torch.where(per_image(hit, self.held), changed[:, None], self.held)
        held = self.held.flatten(1)
        left = held.sum(1)
        usual = (left * _SHARE).long().clamp_min(1)
        self.count = torch.where(hit, torch.minimum(self.count, usual), torch.where(lost, self.count // 2, self.count))
        rank = self.worth.flatten(1).masked_fill(~held, -torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
        free = held & (rank >= (held.shape[1] - left + self.count)[:, None])
        self.free = torch.where(per_image(hit | lost, self.free), free.view_as(self.free), self.free)
        self.restart(hit | lost, torch.where(self.free, self.best.images[self.rows], self.clean))

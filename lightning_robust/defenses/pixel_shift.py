"""A shift by one pixel at test time: the moving part of the Pixel Robustness Manipulator's defense."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_robust.attacks.randomness import uniform
from lightning_robust.defenses.base import Defense, integers
from lightning_robust.defenses.pixels import take
from lightning_robust.defenses.votes import count_votes, mean_log_probabilities, vote_logits
from lightning_robust.errors import UserError

Mode = Literal["random", "vote"]

KING = tuple((down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if (down, right) != (0, 0))
"""A king's moves on a chess board: the eight shifts, as (rows down, columns right)."""


def shifted(images: Tensor, shift: tuple[int, int]) -> Tensor:
    """Images ``(N, C, H, W)`` moved by (rows down, columns right) of one pixel at most; zeros come in at the edge.

    Example:
        >>> shifted(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), (1, 0)).tolist()
        [[[[0.0, 0.0], [1.0, 2.0]]]]
    """
    down, right = shift
    height, width = images.shape[2:]
    return F.pad(images, (1, 1, 1, 1))[:, :, 1 - down : 1 - down + height, 1 - right : 1 - right + width]


class PixelShift(Defense):
    """Moves the image by one pixel, so that a perturbation no longer lies on the pixels that it was made for.

    The defense of the Pixel Robustness Manipulator (Hwang et al., ICLR 2019 DebugML workshop; no arXiv number known),
    where it follows a manipulator that has put the weak pixels on a grid:
    ``PixelShift().around(manipulated_network)``. Images are moved by one of the eight king's moves, or one of nine with
    staying; zeros (black, in pixel units) come in at the edge. The mode "vote" takes the majority over all nine.

    It is broken by design: an attacker who knows it averages over the eight or nine shifts exactly
    (:class:`~lightning_robust.attacks.EOT` over :meth:`draws`, arXiv 1802.00420). The source claims no more than a
    gray-box defense.

    Args:
        model: as of :class:`~lightning_robust.defenses.Defense`.
        mode: "random": a shift is drawn for each image; "vote": the majority label over all shifts, ties by the mean
            probability, which draws nothing.
        shifts: 8, or 9 with staying; by default 8 where one is drawn and 9 where they vote, as in the source.
        seed: of the draws; ``None`` for fresh ones.

    Raises:
        UserError: for another mode or another number of shifts.

    Example:
        >>> defense = PixelShift(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))
        >>> defense(torch.rand(4, 3, 2, 2)).shape, len(defense.draws(30))
        (torch.Size([4, 3]), 8)
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        mode: Mode = "random",
        shifts: Literal[8, 9] | None = None,
        seed: int | None = 0,
    ) -> None:
        super().__init__(model, seed=seed)
        if mode not in ("random", "vote"):
            raise UserError(f"PixelShift: mode={mode!r}: choose random or vote")
        if shifts not in (None, 8, 9) or isinstance(shifts, bool):
            raise UserError(f"PixelShift: shifts={shifts!r}: choose 8, the king's moves, or 9, with staying")
        self.mode, self.random = mode, mode == "random"
        if shifts is None:
            shifts = 8 if self.random else 9
        self.shifts: tuple[tuple[int, int], ...] = KING if shifts == 8 else (*KING, (0, 0))

    def decide(self, images: Tensor, keys: Tensor) -> Tensor:
        """A shift of each image's own, or the vote; the gradient of the vote is that of the mean probabilities."""
        if self.random:
            return self.single(images, keys)
        each = [self.protected()(shifted(images, shift)) for shift in self.shifts]
        votes, probabilities = count_votes(torch.stack([logits.detach() for logits in each], dim=1))
        near = mean_log_probabilities(each)
        return vote_logits(votes, probabilities / len(each)).to(near.dtype) + (near - near.detach())

    def single(self, images: Tensor, keys: Tensor) -> Tensor:
        """The classifier's logits of the images, each moved by a shift of its own."""
        return self.protected()(self.transform(images, keys))

    def transform(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """The images ``(N, C, H, W)``, each moved by a shift of its own.

        Args:
            images: ``(N, C, H, W)``.
            keys: ``(N,)`` to draw with; by default those of the verdict.
        """
        keys = self.keys(images) if keys is None else keys
        chosen = integers(uniform(keys, (len(images),), torch.float64), len(self.shifts))
        moves = torch.tensor(self.shifts, device=images.device)[chosen]
        rows = torch.arange(images.shape[2], device=images.device) - moves[:, :1]
        columns = torch.arange(images.shape[3], device=images.device) - moves[:, 1:]
        return take(images, rows, columns)

    def draws(self, samples: int) -> Sequence[nn.Module]:
        """All eight or nine shifts, over which the attacker's average is exact; draws, where he wants fewer."""
        fewer = super().draws(samples)
        return fewer if samples < len(self.shifts) else [_Moved(self, shift) for shift in self.shifts]

    def extra_repr(self) -> str:
        """What ``print`` says of the settings."""
        return f"mode={self.mode!r}, shifts={len(self.shifts)}, seed={self.seed}"


class _Moved(nn.Module):
    """The classifier behind one shift."""

    def __init__(self, defense: PixelShift, shift: tuple[int, int]) -> None:
        super().__init__()
        self.defense, self.shift = defense, shift

    def forward(self, images: Tensor) -> Tensor:
        """``(N, C, H, W)`` to logits ``(N, K)``."""
        return self.defense.protected()(shifted(images, self.shift))

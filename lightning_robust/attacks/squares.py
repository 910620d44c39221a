"""The points that the Square attack asks about: its starts and proposals (arXiv 1912.00049; L1: 2103.01208)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.projection import norms, per_image, project
from lightning_robust.attacks.threat_model import ThreatModel


class Squares:
    """Starts and proposals around the images of a problem, all of them functions of given random numbers.

    Attributes:
        start_draws: shape of the numbers that one image's start takes.
        draws: how many numbers a proposal takes.
    """

    def __init__(self, problem: Problem, threat_model: ThreatModel) -> None:
        self.problem, self.norm, self.eps = problem, threat_model.ball, threat_model.radius
        self.channels, self.height, self.width = problem.images.shape[1:]
        self.tile = max(min(self.height, self.width) // 5, 1)
        if self.norm == "linf":
            self.start_draws, self.draws = (self.channels, 1, self.width), 2 + self.channels
        else:
            self.start_draws = (self.height // self.tile, self.width // self.tile, 1 + self.channels)
            self.draws = 5 + self.channels
        self._bumps: dict[int, Tensor] = {}
        mask = problem.mask
        self.reach = [None, None] if mask is None else [_reach(mask.amax((1, across))) for across in (3, 2)]

    def start(self, rows: Tensor, draws: Tensor) -> Tensor:
        """Vertical stripes (L∞), or the shape that is proposed later, tiled five by five (L2, L1).

        Args:
            rows: ``(n,)`` places in the batch.
            draws: ``(n, *self.start_draws)`` uniform in [0, 1).
        """
        clean = self.problem.images.index_select(0, rows)
        if self.norm == "linf":
            return (clean + self._masked(self.eps * _signs(draws), rows)).clamp(0, 1)
        side, (high, wide) = self.tile, draws.shape[1:3]
        tiles = self._bump(side)[(draws[..., 0] < 0.5).long()][:, :, :, None] * _signs(draws[..., 1:, None, None])
        grid = tiles.permute(0, 3, 1, 4, 2, 5).reshape(len(clean), self.channels, high * side, wide * side)
        above, before = (self.height - high * side) // 2, (self.width - wide * side) // 2
        delta = torch.zeros_like(clean)
        delta[:, :, above : above + high * side, before : before + wide * side] = grid
        return self._within(clean, self._masked(delta, rows))

    def propose(self, points: Tensor, rows: Tensor, draws: Tensor, side: int) -> Tensor:
        """Another point for each of some points.

        Args:
            points: ``(n, C, H, W)`` in ball and box.
            rows: ``(n,)`` their places in the batch, any number of times each.
            draws: ``(n, self.draws)`` uniform in [0, 1).
            side: of the square, in pixels.
        """
        clean = self.problem.images.index_select(0, rows)
        inside, above, before = self._window(rows, draws[:, 0], draws[:, 1], side)
        signs = _signs(draws[:, -self.channels :, None, None])
        if self.norm == "linf":
            ends = (clean + self.eps * signs).clamp(0, 1)
            return torch.lerp(points, ends, self._masked(inside, rows))  # exactly one or the other
        other, _, _ = self._window(rows, draws[:, 2], draws[:, 3], side)
        bump = self._bump(side)[(draws[:, 4] < 0.5).long()[:, None, None], above, before] * inside[:, 0]
        shape = self._masked(bump[:, None] * signs, rows)
        if self.problem.mask is not None:
            shape = shape / (self._length(shape) + 1e-12)
        delta = self._moved(points - clean, inside, other, shape)
        return self._within(clean, delta)

    def _window(self, rows: Tensor, down: Tensor, across: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
        """A square at a random place, where the mask has something in its reach.

        Returns:
            1 for the pixels in it and else 0, ``(n, 1, H, W)``; and each pixel's row ``(n, H, 1)`` and column
            ``(n, 1, W)`` within it, brought to the nearest where it is outside.
        """
        offsets = []
        for draw, size, reach in zip((down, across), (self.height, self.width), self.reach, strict=True):
            low: Tensor | int = 0
            high: Tensor | int = size - side
            if reach is not None:
                first, last = (of if len(of) == 1 else of[rows] for of in reach)
                low, high = (first - side + 1).clamp_min(0), last.clamp_max(size - side)
            start = (draw * (high - low + 1)).floor().long() + low
            offsets.append(torch.arange(size, device=rows.device) - start[:, None])
        # 0 and 1 as floats: on a processor several times faster than bool
        within = [((offset >= 0) & (offset < side)).to(self.problem.images) for offset in offsets]
        inside = within[0][:, None, :, None] * within[1][:, None, None, :]
        above, before = (offset.clamp(0, side - 1) for offset in offsets)
        return inside, above[:, :, None], before[:, None, :]

    def _moved(self, delta: Tensor, inside: Tensor, other: Tensor, shape: Tensor) -> Tensor:
        """Take the budget of the square ``other`` away, and give it, with what is unspent, to the square ``inside``."""
        here = delta * inside
        there = self._length(delta * torch.maximum(inside, other))
        size = per_image(norms(delta, self.norm), delta)
        if self.norm == "l2":
            budget = ((self.eps**2 - size**2).clamp_min(0) / self.channels + there**2).sqrt()
        else:
            # more than there is: the projection sees to it
            budget = (self.eps - size).clamp_min(0) + there * self.channels
        shape = shape + here / (self._length(here) + 1e-12)
        return torch.lerp(delta * (1 - other), shape / (self._length(shape) + 1e-12) * budget, inside)

    def _length(self, values: Tensor) -> Tensor:
        """Of each channel, ``(n, C, 1, 1)``."""
        return torch.linalg.vector_norm(values, 2 if self.norm == "l2" else 1, (-2, -1), keepdim=True)

    def _within(self, clean: Tensor, delta: Tensor) -> Tensor:
        """All of the budget spent (L2), or the nearest point of ball and box (L1)."""
        if self.norm == "l2":
            return (clean + delta * (self.eps / (per_image(norms(delta, self.norm), delta) + 1e-12))).clamp(0, 1)
        return project(clean, clean + delta, self.norm, self.eps)

    def _masked(self, values: Tensor, rows: Tensor) -> Tensor:
        mask = self.problem.mask
        return values if mask is None else values * (mask if len(mask) == 1 else mask[rows])

    def _bump(self, side: int) -> Tensor:
        """The shape of arXiv 1912.00049 (section 3.3) of length one, upright and lying: ``(2, side, side)``."""
        if side not in self._bumps:
            power, order = (2, 2) if self.norm == "l2" else (4, 1)
            halves = [_hill(height, side, power, order) for height in (side // 2, side - side // 2)]
            shape = torch.cat([halves[0], -halves[1]])
            shape = (shape / torch.linalg.vector_norm(shape, order)).to(self.problem.images)
            self._bumps[side] = torch.stack([shape, shape.T])
        return self._bumps[side]


def _hill(height: int, width: int, power: int, order: int) -> Tensor:
    """Nested rectangles piled up, the k-th smallest of height 1 / k^power; of length one."""
    down, across = ((torch.arange(size) - size // 2).abs() for size in (height, width))
    away = torch.maximum(down[:, None], across)
    heights = torch.arange(1, max(height, width) // 2 + 2, dtype=torch.float64) ** -power
    hill = heights.flip(0).cumsum(0).flip(0)[away]
    return hill / torch.linalg.vector_norm(hill, order) if height else hill


def _reach(lines: Tensor) -> tuple[Tensor, Tensor]:
    """First and last line ``(N,)`` with a pixel that may change, of ``(N, lines)``."""
    return lines.argmax(1), lines.shape[1] - 1 - lines.flip(1).argmax(1)


def _signs(draws: Tensor) -> Tensor:
    return torch.where(draws < 0.5, -1.0, 1.0).to(draws)

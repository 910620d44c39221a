"""The goal of the attacks of Carlini and Wagner as a hinge on the logits, asked about with few backward passes."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_robust.attacks.losses import margin
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.projection import per_image

# A backward pass is left out where that saves it for so many points at a time. On a GPU, a pass over a few points takes
# as long as one over many, and two passes in place of one have to pay for themselves.
_WORTH = {"cpu": 1}
_WORTH_ELSEWHERE = 48


class Hinge:
    """How far the logits are from the goal: max(κ - lead, 0) (arXiv 1608.04644).

    The lead is max_{i≠y} Z_i - Z_y, targeted Z_t - max_{i≠t} Z_i. A point is a hit where the model is fooled with a
    lead of κ or more, and there the hinge is flat. Once the boundary is crossed most points of a search are hits, and a
    backward pass would give zero: where the last two leads of an image say that its next point will be a hit, too, only
    a forward pass is made. Points that were not hits after all are passed through once more, with gradient.

    Args:
        problem: the batch.
        confidence: κ, 0 or more.
        copies: points about each image that are followed.
    """

    def __init__(self, problem: Problem, confidence: float, copies: int = 1) -> None:
        self.problem, self.confidence, self.copies = problem, confidence, copies
        count, like = len(problem.images) * copies, problem.images
        # lead at the last point, and by how much it was more than at the point before
        self._lead = torch.full((count,), -torch.inf, dtype=like.dtype, device=like.device)
        self._trend = torch.zeros_like(self._lead)

    def forget(self, rows: Tensor) -> None:
        """The next points of the images ``rows`` are no continuation of the last ones."""
        self._lead.view(-1, self.copies)[rows] = -torch.inf

    def lead(self, logits: Tensor, rows: Tensor) -> Tensor:
        """``(n,)``, positive where the model is fooled."""
        return self.problem.sign * margin(logits, self.problem.goal[rows])

    def hit(self, logits: Tensor, rows: Tensor) -> Tensor:
        """``(n,)`` bool: fooled, and with a lead of κ or more."""
        return self.problem.fooled(logits, rows) & (self.lead(logits, rows) >= self.confidence)

    def hits(self, points: Tensor, rows: Tensor) -> Tensor:
        """``(n,)`` bool for points ``(n, C, H, W)``, by one forward pass."""
        with torch.no_grad():
            return self.hit(self.problem.logits(points), rows)

    def __call__(self, points: Tensor, rows: Tensor, slots: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Ask the model.

        Args:
            points: ``(n, C, H, W)``.
            rows: ``(n,)`` places of their images in the batch.
            slots: ``(n,)`` which of the points followed these are, row · copies + number; default: the rows.

        Returns:
            κ - lead ``(n,)``, the hinge's gradient ``(n, C, H, W)``, and which points are hits ``(n,)``. Of a model
            with draws, the mean hinge in place of κ - lead.
        """
        problem, kappa = self.problem, self.confidence
        if problem.draws is not None:
            # the mean of a hinge is not the hinge of the mean: a hit may well have a gradient
            value, gradient, logits = problem.loss_and_gradient(
                points, rows, lambda logits, rows: (kappa - self.lead(logits, rows)).clamp_min(0)
            )
            return value.to(points.dtype), gradient, self.hit(logits, rows)
        slots = rows if slots is None else slots
        before = self._lead[slots]
        flat = before + self._trend[slots].clamp_max(0) > kappa
        lead, hit, gradient = torch.zeros_like(before), torch.zeros_like(flat), torch.zeros_like(points)
        places = flat.nonzero()[:, 0]
        if len(places) >= _WORTH.get(points.device.type, _WORTH_ELSEWHERE):
            whole = len(places) == len(points)
            with torch.no_grad():
                logits = problem.logits(points if whole else points[places])
            lead[places] = self.lead(logits, rows[places]).to(lead.dtype)
            hit[places] = self.hit(logits, rows[places])
        places = (~hit).nonzero()[:, 0]
        if len(places):
            whole = len(places) == len(points)
            # the slope of the lead and not of the hinge: in low precision many points lie on the kink itself
            value, found, logits = problem.loss_and_gradient(
                points if whole else points[places], rows[places], self.lead, fooled_leave=kappa == 0
            )
            lead[places], hit[places] = value.to(lead.dtype), self.hit(logits, rows[places])
            gradient[places] = -found.masked_fill(per_image(hit[places], found), 0)
        self._trend[slots] = torch.where(before.isfinite(), lead - before, 0)
        self._lead[slots] = lead
        return kappa - lead, gradient, hit

"""OptMargin (He, Li & Song, ICLR 2018): adversarial images whose neighbours fool the model, too."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_robust.attacks.base import Outcome
from lightning_robust.attacks.cw import check_gradient, check_settings
from lightning_robust.attacks.cw_hinge import Hinge
from lightning_robust.attacks.cw_l2 import L2Search
from lightning_robust.attacks.cw_search import Settings, draw_back
from lightning_robust.attacks.minimal_norm import MinimalNormAttack
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.randomness import uniform
from lightning_robust.attacks.threat_model import Norm, parse_number
from lightning_robust.errors import UserError


@dataclass(frozen=True, kw_only=True)
class OptMargin(MinimalNormAttack):
    """The CW attack in L2 on several models at once: f(x) and f(x + v) for fixed random v.

    It minimises ‖δ‖² + c · Σ_v max(κ - lead(x + δ + v), 0) and has succeeded where all of these points fool the model.
    That breaks defenses that let a region around the image vote (Cao & Gong, arXiv 1709.05583), which see through an
    image at the decision boundary ("Decision boundary analysis of adversarial examples", ICLR 2018). The search is that
    of :class:`~lightning_robust.attacks.cw.CW`.

    The v are corners of the cube [-radius, radius]^d, drawn for each image: nearly orthogonal, and farther away than
    most points of the cube are. As a region vote does it, x + δ + v is clipped to [0, 1]. One step costs ``surrogates``
    passes.

    Args:
        radius: half the edge of the cube, in pixel units of [0, 1], a number or a fraction; that of the defense (0.02
            for CIFAR-10 and 0.3 for MNIST in region-based classification).
        surrogates: points that have to fool, the image itself among them; 20 in the paper.
        confidence: κ at each of them.
        steps: steps of a round at most.
        binary_search_steps: rounds.
        lr: of Adam, in the argument of the tanh.
        initial_const: the first c.
        abort_early: end an image's round when its loss no longer falls.
        chunk: points that go through the model at a time at most, which bounds the memory.
        eps: L2 budget in pixel units: larger perturbations count as failures; ``None``: none.
        seed: of the v.

    Raises:
        UserError: for settings outside these ranges.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> images = torch.rand(4, 3, 2, 2)
        >>> attack = OptMargin(radius=0.05, steps=50, binary_search_steps=4)
        >>> result = attack.run(model, images, model(images).argmax(1))
        >>> bool((model(result.images).argmax(1) != model(images).argmax(1))[result.success].all())
        True
    """

    radius: float | str = 0.02
    surrogates: int = 20
    confidence: float = 0.0
    steps: int = 1000
    binary_search_steps: int = 6
    lr: float = 0.01
    initial_const: float = 1e-3
    abort_early: bool = True
    chunk: int = 512
    eps: float | str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings("OptMargin", self.confidence, self.settings)
        radius = parse_number(self.radius, "radius")
        if not 0 < radius <= 1:
            raise UserError(f"OptMargin: radius={self.radius}: give pixel units above 0 and up to 1, for example 0.02")
        if self.surrogates < 2:
            raise UserError(
                f"OptMargin: surrogates={self.surrogates}: the image itself is one, so give 2 or more; with it alone "
                "the attack is CW"
            )
        if self.chunk < 1:
            raise UserError(f"OptMargin: chunk={self.chunk}: at least one point goes through the model at a time")

    @property
    def _norm(self) -> Norm:
        return "l2"

    @property
    def settings(self) -> Settings:
        """Of the search."""
        return Settings(self.steps, self.lr, self.abort_early, self.initial_const, self.binary_search_steps)

    def perturb(self, problem: Problem) -> Outcome:
        """Search for all images at once; each leaves when it has done its rounds."""
        best = self.begin(problem)
        rows = best.todo.nonzero()[:, 0]
        if len(rows):
            ask = _Surrogates(self, problem)
            best.queries[rows] += ask.copies
            _, slope, _ = ask(problem.images[rows], rows)
            check_gradient(slope)
            L2Search(self.settings, problem, best, ask, rows, slope).run()
            draw_back(best, ask)
        return best.outcome()


class _Surrogates:
    """The sum of the hinges at x and x + v, some images at a time."""

    def __init__(self, attack: OptMargin, problem: Problem) -> None:
        self.problem, self.copies, self.chunk = problem, attack.surrogates, attack.chunk
        self.radius = parse_number(attack.radius, "radius")
        self.hinge = Hinge(problem, attack.confidence, copies=self.copies)

    def forget(self, rows: Tensor) -> None:
        self.hinge.forget(rows)

    def __call__(self, points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, slope = points.new_zeros(len(rows)), torch.zeros_like(points)
        room = points.new_full((len(rows),), torch.inf)
        hit = torch.ones_like(rows, dtype=torch.bool)
        for images, copies in self._parts(len(rows)):
            near, slots = self._near(points[images], rows[images], copies)
            hinges, slopes, hits = self.hinge(near.clamp(0, 1), slots // self.copies, slots)
            # what clipping took away has no slope
            slopes = slopes.masked_fill((near < 0) | (near > 1), 0)
            shape = (-1, copies.stop - copies.start)
            value[images] += hinges.view(shape).clamp_min(0).sum(1)
            room[images] = torch.minimum(room[images], -hinges.view(shape).amax(1))
            slope[images] += slopes.view(*shape, *points.shape[1:]).sum(1)
            hit[images] &= hits.view(shape).all(1)
        return torch.where(hit, -room, value), slope, hit

    def hits(self, points: Tensor, rows: Tensor) -> Tensor:
        hit = torch.ones_like(rows, dtype=torch.bool)
        for images, copies in self._parts(len(rows)):
            near, slots = self._near(points[images], rows[images], copies)
            hits = self.hinge.hits(near.clamp(0, 1), slots // self.copies)
            hit[images] &= hits.view(-1, copies.stop - copies.start).all(1)
        return hit

    def _parts(self, count: int) -> list[tuple[slice, slice]]:
        """Which images and which of their copies go together: whole images, where one fits into a chunk."""
        images, copies = max(self.chunk // self.copies, 1), min(self.chunk, self.copies)
        return [
            (slice(i, i + images), slice(j, min(j + copies, self.copies)))
            for i in range(0, count, images)
            for j in range(0, self.copies, copies)
        ]

    def _near(self, points: Tensor, rows: Tensor, copies: slice) -> tuple[Tensor, Tensor]:
        """The points ``(n · m, C, H, W)`` x + v for the numbers ``copies`` of v, before clipping, and their slots."""
        numbers = torch.arange(copies.start, copies.stop, device=rows.device)
        parts = [
            # drawn again each time, which costs little beside a pass and no memory
            (uniform(self.problem.keys[rows], points.shape, points.dtype, stream=number) < 0.5) * 2.0 - 1.0
            if number
            else torch.zeros_like(points)
            for number in range(copies.start, copies.stop)
        ]
        near = points[:, None] + self.radius * torch.stack(parts, dim=1).to(points.dtype)
        return near.flatten(0, 1), (rows[:, None] * self.copies + numbers).flatten()

"""Random points of the ball: the floor that every attack has to beat (Carlini et al., arXiv 1902.06705)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_robust.attacks.base import Attack, Outcome
from lightning_robust.attacks.losses import margin
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.projection import norms, per_image, project
from lightning_robust.attacks.randomness import ball, uniform
from lightning_robust.attacks.threat_model import Norm, ThreatModel, check_ball_norm
from lightning_robust.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RandomNoise(Attack):
    """Random points of the ball, one after the other, until one fools.

    A sanity check and no attack: where it fools more than a gradient attack, that attack is broken or the gradients
    are. The checklist of arXiv 1902.06705 asks for 10,000 draws or more. No gradient is asked for, so the model may be
    any function from images to logits.

    Args:
        eps: budget in pixel units of [0, 1], a number or a fraction such as 8/255.
        norm: norm of the budget.
        draws: points for each image, at least one.
        kind: "uniform": anywhere in the ball; "sign": corners, where every value moves by the same length up or down
            and the whole budget is spent. In L∞ corners are much the stronger noise.
        max_batch: points in one pass of the model; it bounds memory and has no influence on the result.
        seed: of the points.

    An image that withstands comes back at the point where its margin was smallest.

    Raises:
        UserError: for settings outside these ranges.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> images = torch.rand(4, 3, 2, 2)
        >>> result = RandomNoise(eps="8/255", draws=50).run(model, images, model(images).argmax(1))
        >>> bool((result.iterations <= 50).all())
        True
    """

    wants_logits = False
    stop_at_success = True

    eps: float | str = "8/255"
    norm: Norm = "linf"
    draws: int = 10_000
    kind: Literal["uniform", "sign"] = "uniform"
    max_batch: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        check_ball_norm(self.norm, "RandomNoise")
        _ = self.threat_model  # refuses a bad ε
        if self.draws < 1:
            raise UserError(f"RandomNoise: draws={self.draws}: at least one is needed, 10,000 for a sanity check")
        if self.max_batch < 1:
            raise UserError(f"RandomNoise: max_batch={self.max_batch}: at least one point goes through the model")
        if self.kind not in ("uniform", "sign"):
            raise UserError(f"RandomNoise: kind={self.kind!r} does not exist: choose uniform or sign")

    @property
    def threat_model(self) -> ThreatModel:
        """Norm and budget."""
        return ThreatModel(self.norm, self.eps)

    @torch.no_grad()
    def perturb(self, problem: Problem) -> Outcome:
        """Ask about as many points at a time as fit into a pass; fooled images leave."""
        logits = problem.clean_logits
        iterations = torch.zeros_like(problem.labels)
        queries = torch.zeros_like(iterations)
        if logits is None:
            queries += 1
            logits = problem.logits(problem.images)
        images = problem.images.clone()
        success = problem.fooled(logits)
        best = torch.full((len(images),), -torch.inf, dtype=logits.dtype, device=images.device)
        done = 0
        while done < self.draws and not success.all():
            left = (~success).nonzero()[:, 0]
            # more images than a pass may hold: one draw of each in several passes
            draws = min(max(self.max_batch // len(left), 1), self.draws - done)
            for rows in left.split(self.max_batch):
                numbers = torch.arange(done, done + draws, device=rows.device)
                points = self._points(problem, rows, numbers)
                everywhere = rows.repeat_interleave(draws)
                logits = problem.logits(points)
                hit = problem.fooled(logits, everywhere).view(-1, draws)
                goal = problem.goal[everywhere]
                value = (problem.sign * margin(logits, goal)).view(-1, draws).masked_fill(hit, torch.inf)
                # the first that fools, or the nearest to it
                size, place = value.max(1)
                found = hit.any(1)
                better = size > best[rows]
                chosen = torch.arange(len(rows), device=rows.device) * draws + place
                images[rows[better]] = points[chosen[better]]
                best[rows[better]] = size[better]
                success[rows] = found
                iterations[rows] += torch.where(found, place + 1, draws)
                queries[rows] += draws
            done += draws
            if problem.progress is not None:
                problem.progress(done, self.draws)
        return Outcome(images, iterations, queries, success)

    def _points(self, problem: Problem, rows: Tensor, numbers: Tensor) -> Tensor:
        """The points of these numbers for each of the rows, ``(rows x numbers, C, H, W)``."""
        eps = self.threat_model.radius
        # a key for each point: the numbers are mixed with the keys bit by bit, so neighbours have nothing in common
        keys = (problem.keys[rows, None] + numbers).flatten()
        clean = problem.images[rows].repeat_interleave(len(numbers), 0)
        mask = problem.mask
        if mask is not None and len(mask) > 1:
            mask = mask[rows].repeat_interleave(len(numbers), 0)
        if self.kind == "uniform":
            noise = ball(keys, clean.shape, clean.dtype, self.norm, eps)
            return project(clean, clean + (noise if mask is None else noise * mask), self.norm, eps)
        noise = torch.where(uniform(keys, clean.shape, clean.dtype) < 0.5, -1.0, 1.0).to(clean)
        noise = noise if mask is None else noise * mask
        noise = noise * per_image(eps / norms(noise, self.norm).clamp_min(1e-12), noise)
        return project(clean, clean + noise, self.norm, eps)

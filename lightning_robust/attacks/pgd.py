"""Projected gradient descent (Madry et al., arXiv 1706.06083) in the L∞, L2 and L1 ball."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_robust.attacks.base import Attack, Outcome
from lightning_robust.attacks.losses import LOSSES, AttackLoss
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.projection import project, steepest
from lightning_robust.attacks.randomness import ball
from lightning_robust.attacks.threat_model import Norm, ThreatModel, check_ball_norm, parse_number
from lightning_robust.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Projected gradient descent: steepest steps on the loss, each followed by a projection onto ball and box.

    x ← Π(x + step_size · steepest(∇L)), from a random start in the ball (Madry et al., arXiv 1706.06083). The L1 step
    is spread over the largest 1 % of gradients (SLIDE, arXiv 1904.13000) and projected onto ball and box exactly.

    Args:
        eps: budget in pixel units of [0, 1], a number or a fraction such as 8/255.
        norm: norm of the budget.
        steps: gradient steps of each restart.
        step_size: length of a step in pixel units; default 2.5 · eps / steps, enough to cross the ball.
        random_start: start at a random point of the ball (True) or at the clean image (False).
        restarts: independent random starts; an image counts as fooled if one of them fools it.
        loss: "ce" (cross-entropy), "ce_scaled" (of logits brought to one scale), "margin" (Carlini-Wagner) or "dlr"
            (Croce & Hein).
        stop_at_success: an image that is fooled leaves the batch at once, and one that is misclassified to begin with
            is returned unchanged. The success rate is the same or higher and evaluation much faster; the images lie
            nearer to the decision boundary, so adversarial training switches it off.
        seed: of the random start.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
        >>> adversarial = PGD(eps="8/255", steps=5)(model, images, labels)
        >>> bool((adversarial - images).abs().max() <= 8 / 255 + 1e-6)
        True
    """

    eps: float | str = "8/255"
    norm: Norm = "linf"
    steps: int = 10
    step_size: float | str | None = None
    random_start: bool = True
    restarts: int = 1
    loss: Literal["ce", "ce_scaled", "margin", "dlr"] = "ce"
    stop_at_success: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_ball_norm(self.norm, type(self).__name__)
        _ = self.threat_model  # refuses a bad ε
        name = type(self).__name__
        if self.steps < 1:
            raise UserError(f"{name}: steps={self.steps}: at least one step is needed")
        if self.restarts < 1:
            raise UserError(f"{name}: restarts={self.restarts}: at least one run is needed")
        if self.restarts > 1 and not self.random_start:
            raise UserError(
                f"{name}: restarts={self.restarts} without a random start would repeat one run: set random_start"
            )
        if self.loss not in LOSSES:
            raise UserError(f"{name}: loss={self.loss!r} does not exist: choose one of {', '.join(LOSSES)}")
        if self.step_size is not None:
            step = parse_number(self.step_size, "step_size")
            if step <= 0:
                raise UserError(
                    f"{name}: step_size={self.step_size} never moves: give a positive length, for example 2/255"
                )
            if self.norm == "linf" and step > 1:
                raise UserError(
                    f"{name}: step_size={self.step_size} is larger than the pixel range [0, 1]: did you mean "
                    f"{step:g}/255?"
                )

    @property
    def length(self) -> float:
        """The length of a step in pixel units."""
        if self.step_size is not None:
            return parse_number(self.step_size, "step_size")
        return 2.5 * self.threat_model.radius / self.steps

    @property
    def threat_model(self) -> ThreatModel:
        """Norm and budget."""
        return ThreatModel(self.norm, self.eps)

    def perturb(self, problem: Problem) -> Outcome:
        """Attack with every restart; only images that are not yet fooled go on."""
        return restarted(
            problem,
            reference=problem.goal,
            loss=LOSSES[self.loss],
            threat_model=self.threat_model,
            steps=self.steps,
            length=self.length,
            random_start=self.random_start,
            restarts=self.restarts,
            stop_at_success=self.stop_at_success,
        )


def restarted(
    problem: Problem,
    *,
    reference: Tensor,
    loss: AttackLoss,
    threat_model: ThreatModel,
    steps: int,
    length: float,
    random_start: bool = True,
    restarts: int = 1,
    stop_at_success: bool = True,
    noise: Tensor | None = None,
) -> Outcome:
    """The loop of every PGD-like attack, with any loss.

    Args:
        problem: the batch.
        reference: ``(N, ...)`` what the loss compares the logits with (labels, targets, probabilities).
        loss: from logits and reference to one value an image; raised, or lowered where the problem is targeted.
        threat_model: ball to stay in.
        steps: gradient steps of each run.
        length: length of a step.
        random_start: start in the ball at random.
        restarts: runs.
        stop_at_success: fooled images leave the batch.
        noise: perturbation ``(N, C, H, W)`` to start from in place of a uniform draw (as TRADES does).
    """
    clean, norm, eps = problem.images, threat_model.ball, threat_model.radius
    count, device = len(clean), clean.device
    best = clean.clone()
    done = torch.zeros(count, dtype=torch.bool, device=device)
    best_loss = torch.full((count,), -torch.inf, device=device)
    iterations = torch.zeros(count, dtype=torch.int64, device=device)
    queries = torch.zeros_like(iterations)
    clean_gradient: Tensor | None = None
    # More than one run without stopping: the run that raised the loss most is kept.
    compare = restarts > 1 and not stop_at_success

    if stop_at_success and (random_start or noise is not None or problem.clean_logits is not None):
        logits = problem.clean_logits
        if logits is None:
            queries += 1
            with torch.no_grad():
                logits = problem.logits(clean)
        done = problem.fooled(logits)

    for restart in range(restarts):
        rows = (~done).nonzero()[:, 0]
        if len(rows) == 0:
            break
        base = clean[rows]
        points = base
        if noise is not None or random_start:
            drawn = (
                noise[rows]
                if noise is not None
                else ball(problem.keys[rows], base.shape, base.dtype, norm, eps, stream=restart)
            )
            if problem.mask is not None:
                drawn = drawn * (problem.mask if len(problem.mask) == 1 else problem.mask[rows])
            points = project(base, base + drawn, norm, eps)

        for step in range(steps):
            at_clean = step == 0 and restart == 0 and noise is None and not random_start and len(rows) == count
            _, gradient, logits = problem.loss_and_gradient(
                points,
                rows,
                lambda logits, rows: problem.sign * loss(logits, reference[rows]),
                fooled_leave=stop_at_success and not at_clean,
            )
            queries[rows] += 1
            if at_clean:
                clean_gradient = problem.sign * gradient
            if stop_at_success:
                hit = problem.fooled(logits, rows)
                if hit.any():
                    best[rows[hit]] = points[hit]
                    done[rows[hit]] = True
                    keep = ~hit
                    rows, base, points, gradient = rows[keep], base[keep], points[keep], gradient[keep]
                    if len(rows) == 0:
                        break
            points = project(base, points + length * steepest(gradient, norm), norm, eps)
            iterations[rows] += 1
            if problem.progress is not None:
                problem.progress(restart * steps + step + 1, restarts * steps)
        if len(rows) == 0:
            continue

        if not (stop_at_success or compare):
            best = points
            continue
        queries[rows] += 1
        with torch.no_grad():
            logits = problem.logits(points)
            hit = problem.fooled(logits, rows)
            value = (problem.sign * loss(logits, reference[rows])).to(best_loss)
        # a success is never given up for a higher loss without one
        better = (hit & ~done[rows]) | ((value > best_loss[rows]) & (hit | ~done[rows]))
        best[rows[better]] = points[better]
        best_loss[rows[better]] = value[better]
        done[rows] |= hit

    return Outcome(best, iterations, queries, done if stop_at_success or compare else None, clean_gradient)

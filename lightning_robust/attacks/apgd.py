"""Auto-PGD (Croce & Hein, arXiv 2003.01690): PGD that finds its own step size; L1 form of arXiv 2103.01208."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_robust.attacks.apgd_search import Search
from lightning_robust.attacks.base import Attack, Outcome
from lightning_robust.attacks.losses import LOSSES, dlr_targeted
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.threat_model import Norm, ThreatModel, check_ball_norm
from lightning_robust.errors import UserError


@dataclass(frozen=True, kw_only=True)
class APGD(Attack):
    """Auto-PGD: steps of 2ε with momentum, halved at checkpoints when progress stalls, always from the best point.

    Constants of the paper (arXiv 2003.01690): momentum 0.75; first checkpoint after 22 % of the steps, each interval
    3 % shorter down to 6 %; the step is halved and the search returns to its best point if at most ``rho`` of the last
    steps raised the loss, or if neither the step was halved nor the best loss improved since the last checkpoint.

    Args:
        eps: budget in pixel units of [0, 1], a number or a fraction such as 8/255.
        norm: norm of the budget.
        steps: gradient steps of each run.
        restarts: independent random starts; an image is fooled if one of them fools it.
        loss: "ce" (cross-entropy), "ce_scaled" (of logits brought to one scale), "margin", "dlr" (scale invariant, 3
            classes or more) or "dlr_targeted" (4 classes or more: one run for each of the ``n_targets`` most likely
            other classes).
        n_targets: target classes of "dlr_targeted".
        random_start: start at a random point of the ball (True) or at the clean image (False).
        rho: share of raising steps under which the step is halved.
        warm_up: in L1, spend 30 % of the steps in a ball of 3ε and 30 % in one of 2ε before those in that of ε. Each
            ball begins at the best point of the last one (arXiv 2103.01208, where that is stronger on CIFAR-10; it was
            not on 8×8 images).
        stop_at_success: fooled images leave the batch at once, and ones that are misclassified to begin with are
            returned unchanged; the success rate is the same. Without it the image of highest loss that fools the model
            is returned. In both cases an image that withstands comes back where its loss was highest.
        seed: of the random start.
    """

    eps: float | str = "8/255"
    norm: Norm = "linf"
    steps: int = 100
    restarts: int = 1
    loss: Literal["ce", "ce_scaled", "dlr", "dlr_targeted", "margin"] = "ce"
    n_targets: int = 9
    random_start: bool = True
    rho: float = 0.75
    warm_up: bool = False
    stop_at_success: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_ball_norm(self.norm, "APGD")
        _ = self.threat_model  # refuses a bad ε
        if self.steps < 1:
            raise UserError(f"APGD: steps={self.steps}: at least one step is needed")
        if self.restarts < 1 or self.n_targets < 1:
            raise UserError("APGD: restarts and n_targets are at least 1")
        if self.restarts > 1 and not self.random_start:
            raise UserError("APGD: restarts without a random start would repeat one run: set random_start")
        if self.loss != "dlr_targeted" and self.loss not in LOSSES:
            raise UserError(f"APGD: loss={self.loss!r} does not exist: choose {', '.join([*LOSSES, 'dlr_targeted'])}")
        if not 0 < self.rho < 1:
            raise UserError(f"APGD: rho={self.rho} is a share between 0 and 1, 0.75 in the paper")
        if self.warm_up and self.norm != "l1":
            raise UserError(f"APGD: warm_up is for norm='l1', and norm={self.norm!r}: leave it out")

    @property
    def threat_model(self) -> ThreatModel:
        """Norm and budget."""
        return ThreatModel(self.norm, self.eps)

    @property
    def balls(self) -> list[tuple[float, int]]:
        """Radius of each ball that a run goes through, and its steps there."""
        eps, steps = self.threat_model.radius, self.steps
        early = min(-(-3 * steps // 10), (steps - 1) // 2) if self.warm_up else 0
        balls = [(3 * eps, early), (2 * eps, early), (eps, steps - 2 * early)]
        return [ball for ball in balls if ball[1] > 0]

    def perturb(self, problem: Problem) -> Outcome:
        """One run for each restart and target; only images that are not yet fooled go on."""
        clean, device = problem.images, problem.images.device
        count = len(clean)
        images = clean.clone()
        success = torch.zeros(count, dtype=torch.bool, device=device)
        iterations = torch.zeros(count, dtype=torch.int64, device=device)
        queries = torch.zeros_like(iterations)
        logits = problem.clean_logits
        if logits is None and (self.stop_at_success or self.loss == "dlr_targeted"):
            queries += 1
            with torch.no_grad():
                logits = problem.logits(clean)
        if self.stop_at_success:
            assert logits is not None
            success = problem.fooled(logits)
        best_loss = torch.full((count,), -torch.inf, device=device)
        losses, balls = self._losses(problem, logits), self.balls
        for number, (restart, loss) in enumerate((r, loss) for r in range(self.restarts) for loss in losses):
            rows = (~success).nonzero()[:, 0] if self.stop_at_success else torch.arange(count, device=device)
            if len(rows) == 0:
                break

            def report(step: int, number: int = number) -> None:
                if problem.progress is not None:
                    problem.progress(number * self.steps + step, self.restarts * len(losses) * self.steps)

            run = Search(
                problem,
                rows,
                loss,
                norm=self.norm,
                balls=balls,
                rho=self.rho,
                leave=self.stop_at_success,
                start=restart if self.random_start else None,
                report=report,
            )
            run.run()
            iterations[rows] += run.iterations
            queries[rows] += run.iterations + len(balls)
            better = (run.success & ~success[rows]) | (
                (run.final_loss > best_loss[rows]) & (run.success | ~success[rows])
            )
            images[rows[better]] = run.final[better]
            best_loss[rows[better]] = run.final_loss[better].to(best_loss)
            success[rows] |= run.success
        return Outcome(images, iterations, queries, success)

    def _losses(self, problem: Problem, logits: Tensor | None) -> list[Callable[[Tensor, Tensor], Tensor]]:
        """The losses to raise, one a run: functions of logits and rows."""
        if self.loss != "dlr_targeted":
            function = LOSSES[self.loss]
            return [lambda logits, rows: problem.sign * function(logits, problem.goal[rows])]
        if problem.targets is not None:
            orders = [problem.targets]
        elif problem.aims is not None:
            orders = [problem.aims]
        else:
            assert logits is not None
            others = logits.scatter(1, problem.labels[:, None], -torch.inf).argsort(1, descending=True)
            orders = [others[:, rank] for rank in range(min(self.n_targets, logits.shape[1] - 1))]

        def towards(targets: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
            return lambda logits, rows: dlr_targeted(logits, problem.labels[rows], targets[rows])

        return [towards(targets) for targets in orders]

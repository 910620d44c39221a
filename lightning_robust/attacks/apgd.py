"""Auto-PGD (Croce & Hein, arXiv 2003.01690): PGD that finds its own step size; L1 form of arXiv 2103.01208."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_robust.attacks.base import Attack, Outcome, Problem
from lightning_robust.attacks.losses import LOSSES, dlr_targeted
from lightning_robust.attacks.projection import norms, per_image, project, steepest
from lightning_robust.attacks.randomness import normal, uniform
from lightning_robust.attacks.threat_model import Norm, ThreatModel, check_ball_norm
from lightning_robust.errors import UserError

_MOMENTUM = 0.75
_L1_SPARSITY = 0.2  # share of values that the first L1 steps move
_L1_CHECK = 0.04  # share of the budget between two checks in L1


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
            raise UserError(f"APGD: loss={self.loss!r} does not exist: choose ce, dlr, dlr_targeted or margin")
        if not 0 < self.rho < 1:
            raise UserError(f"APGD: rho={self.rho} is a share between 0 and 1, 0.75 in the paper")

    @property
    def threat_model(self) -> ThreatModel:
        """Norm and budget."""
        return ThreatModel(self.norm, self.eps)

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
        losses = self._losses(problem, logits)
        for number, (restart, loss) in enumerate((r, loss) for r in range(self.restarts) for loss in losses):
            rows = (~success).nonzero()[:, 0] if self.stop_at_success else torch.arange(count, device=device)
            if len(rows) == 0:
                break

            def report(step: int, number: int = number) -> None:
                if problem.progress is not None:
                    problem.progress(number * self.steps + step, self.restarts * len(losses) * self.steps)

            run = _Run(self, problem, rows, loss, restart, report)
            run.search()
            iterations[rows] += run.iterations
            queries[rows] += run.iterations + 1
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


class _Run:
    """One run of APGD on the images ``rows``: per-image state, from which fooled images are dropped."""

    def __init__(
        self,
        attack: APGD,
        problem: Problem,
        rows: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor],
        restart: int,
        report: Callable[[int], None],
    ) -> None:
        self.attack, self.problem, self.loss, self.report = attack, problem, loss, report
        self.norm, self.eps = attack.threat_model.ball, attack.threat_model.radius
        self.rows = rows
        self.all = torch.arange(len(rows), device=rows.device)  # where the images still running stand in the results
        clean = problem.images[rows]
        self.final = clean.clone()
        self.success = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        self.final_loss = torch.full((len(rows),), -torch.inf, device=rows.device, dtype=torch.float64)
        self.iterations = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        self.start = self._start(clean, restart) if attack.random_start else clean.clone()

    def _start(self, clean: Tensor, restart: int) -> Tensor:
        """The official start: noise scaled to the surface of the ball (L∞, L2), projected into it (L1)."""
        keys = self.problem.keys[self.rows]
        if self.norm == "linf":
            noise = 2 * uniform(keys, clean.shape, clean.dtype, restart) - 1
        else:
            noise = normal(keys, clean.shape, clean.dtype, restart)
        if self.problem.mask is not None:
            noise = noise * self._of_rows(self.problem.mask)
        if self.norm != "l1":
            noise = self.eps * noise / per_image(norms(noise, self.norm), noise).clamp_min(1e-12)
        return project(clean, clean + noise, self.norm, self.eps)

    def _of_rows(self, mask: Tensor) -> Tensor:
        return mask if len(mask) == 1 else mask[self.rows]

    def search(self) -> None:
        """Run to the end, or until every image is fooled."""
        steps, values = self.attack.steps, self.start[0].numel()
        first, shortest, shrink = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
        interval = max(int(_L1_CHECK * steps), 1) if self.norm == "l1" else first
        longest_step = self.eps if self.norm == "l1" else 2 * self.eps

        points = self.start
        leave = self.attack.stop_at_success
        loss, gradient, logits = self.problem.loss_and_gradient(points, self.rows, self.loss, fooled_leave=leave)
        # one row an image; dropped together when the image leaves
        state = {
            "rows": self.rows,
            "place": self.all,
            "clean": self.problem.images[self.rows],
            "points": points,
            "previous": points,
            "gradient": gradient,
            "best": points,
            "best_gradient": gradient,
            "best_loss": loss,
            "last_loss": loss,
            "length": torch.full_like(loss, longest_step, dtype=points.dtype),
            "rises": torch.zeros_like(loss, dtype=torch.int64),
            "checked_loss": loss,
            "reduced": torch.ones_like(loss, dtype=torch.bool),
            # of the L1 step: the share of values to move, and how many the best point had moved at the last check
            "sparse": torch.full_like(loss, _L1_SPARSITY, dtype=points.dtype),
            "moved": torch.full_like(loss, values, dtype=points.dtype),
        }
        state = self._harvest(state, logits)
        since_check = 0
        for step in range(steps):
            if len(state["rows"]) == 0:
                break
            moved_to = self._step(state, momentum=_MOMENTUM if step > 0 else 1.0)
            state["previous"], state["points"] = state["points"], moved_to
            loss, state["gradient"], logits = self.problem.loss_and_gradient(
                moved_to, state["rows"], self.loss, fooled_leave=leave
            )
            self.iterations[state["place"]] += 1
            state["rises"] = state["rises"] + (loss > state["last_loss"])
            state["last_loss"] = loss
            better = loss > state["best_loss"]
            for name, value in (
                ("best", moved_to),
                ("best_gradient", state["gradient"]),
                ("best_loss", loss),
            ):
                state[name] = torch.where(per_image(better, value) if value.dim() > 1 else better, value, state[name])
            state = self._harvest(state, logits)
            since_check += 1
            if since_check == interval and len(state["rows"]):
                if self.norm == "l1":
                    self._check_l1(state, values)
                else:
                    self._check(state, interval)
                    interval = max(interval - shrink, shortest)
                since_check = 0
            self.report(step + 1)
        # what never fooled the model ends where its loss was highest (of use against another model)
        lost = ~self.success[state["place"]]
        place = state["place"][lost]
        self.final[place] = state["best"][lost]
        self.final_loss[place] = state["best_loss"][lost].double()

    def _harvest(self, state: dict[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
        """Keep the points that fool the model, and let their images leave if they may."""
        hit = self.problem.fooled(logits, state["rows"])
        if not hit.any():
            return state
        place, value = state["place"], state["last_loss"].double()
        take = hit & (~self.success[place] | (value > self.final_loss[place]))
        self.final[place[take]] = state["points"][take]
        self.final_loss[place[take]] = value[take]
        self.success[place] |= hit
        if not self.attack.stop_at_success:
            return state
        return {name: tensor[~hit] for name, tensor in state.items()}

    def _step(self, state: dict[str, Tensor], momentum: float) -> Tensor:
        clean, points, gradient = state["clean"], state["points"], state["gradient"]
        length = per_image(state["length"], points)
        if self.norm == "l1":
            return project(clean, points + length * _sparse_sign(gradient, state["sparse"]), "l1", self.eps)
        ahead = project(clean, points + length * steepest(gradient, self.norm), self.norm, self.eps)
        inertia = (ahead - points) * momentum + (points - state["previous"]) * (1 - momentum)
        return project(clean, points + inertia, self.norm, self.eps)

    def _check(self, state: dict[str, Tensor], interval: int) -> None:
        """Halve the step of the images that stall and send them back to their best point (conditions 1 and 2)."""
        stalls = state["rises"] <= interval * self.attack.rho
        stalls |= ~state["reduced"] & (state["checked_loss"] >= state["best_loss"])
        state["reduced"], state["checked_loss"] = stalls, state["best_loss"]
        state["rises"] = torch.zeros_like(state["rises"])
        state["length"] = torch.where(stalls, state["length"] / 2, state["length"])
        self._return_to_best(state, stalls)

    def _check_l1(self, state: dict[str, Tensor], values: int) -> None:
        """Fit the sparsity of the L1 step to that of the best point (arXiv 2103.01208, section 4)."""
        moved = (state["best"] - state["clean"]).flatten(1).ne(0).sum(1).to(state["moved"])
        sparser = moved / state["moved"].clamp_min(1) < 0.95
        state["sparse"] = (moved / values / 1.5).clamp_min(1 / values)
        shorter = (state["length"] / 1.5).clamp_min(self.eps / 10)
        state["length"] = torch.where(sparser, torch.full_like(shorter, self.eps), shorter)
        state["moved"] = moved
        self._return_to_best(state, sparser)

    @staticmethod
    def _return_to_best(state: dict[str, Tensor], which: Tensor) -> None:
        for name, best in (("points", "best"), ("gradient", "best_gradient")):
            state[name] = torch.where(per_image(which, state[best]), state[best], state[name])


def _sparse_sign(gradient: Tensor, share: Tensor) -> Tensor:
    """An L1 step of length one, spread evenly over each image's own ``share`` of largest gradients."""
    flat = gradient.flatten(1)
    size = flat.abs()
    order = size.sort(dim=1, descending=True).values
    last = (share * flat.shape[1]).ceil().long().clamp(1, flat.shape[1]) - 1
    chosen = torch.where(size >= order.gather(1, last[:, None]), flat.sign(), torch.zeros_like(flat))
    return (chosen / chosen.abs().sum(1, keepdim=True).clamp_min(1)).view_as(gradient)

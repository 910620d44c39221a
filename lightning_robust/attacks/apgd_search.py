"""One run of APGD: steps that halve where progress stalls (arXiv 2003.01690), and their L1 form (arXiv 2103.01208)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.projection import norms, per_image, project, steepest
from lightning_robust.attacks.randomness import normal, uniform
from lightning_robust.attacks.threat_model import Norm

_MOMENTUM = 0.75
_L1_SPARSITY = 0.2  # share of values that the first L1 steps move
_L1_CHECK = 0.04  # share of the budget between two checks in L1


class Search:
    """One run on the images ``rows``: per-image state, from which fooled images are dropped.

    Args:
        problem: the batch.
        rows: ``(n,)`` the images to attack.
        loss: to raise: from logits and rows to one value an image.
        norm: of the balls.
        balls: radius of each ball that the run goes through, and its steps there. Only what is found in the last one
            counts; the next one begins at the projection of the last one's best point.
        rho: share of raising steps under which the step is halved.
        leave: fooled images leave at once.
        start: number of the random start; ``None``: the clean image.
        report: told the steps done.

    Attributes:
        final: ``(n, C, H, W)`` the image that fools and has the highest loss, else the one of highest loss.
        final_loss: ``(n,)`` its loss.
        success: ``(n,)`` bool.
        iterations: ``(n,)`` int64 steps made.
    """

    def __init__(
        self,
        problem: Problem,
        rows: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        norm: Norm,
        balls: Sequence[tuple[float, int]],
        rho: float,
        leave: bool,
        start: int | None,
        report: Callable[[int], None],
    ) -> None:
        self.problem, self.rows, self.loss, self.report = problem, rows, loss, report
        self.norm, self.balls, self.rho, self.leave, self.start = norm, balls, rho, leave, start
        self.final = problem.images[rows].clone()
        self.success = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        self.final_loss = torch.full((len(rows),), -torch.inf, device=rows.device, dtype=torch.float64)
        self.iterations = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)

    def run(self) -> None:
        """Run to the end, or until every image is fooled."""
        points = self._starts(self.balls[0][0])
        done = 0
        for place, (eps, steps) in enumerate(self.balls):
            if place > 0:
                points = project(self.problem.images[self.rows], points, self.norm, eps)
            points = _InBall(self, eps, steps, done, counts=place == len(self.balls) - 1).run(points)
            done += steps

    def _starts(self, eps: float) -> Tensor:
        """The official start: noise scaled to the surface of the ball (L∞, L2), projected into it (L1)."""
        clean = self.problem.images[self.rows]
        if self.start is None:
            return clean.clone()
        keys = self.problem.keys[self.rows]
        if self.norm == "linf":
            noise = 2 * uniform(keys, clean.shape, clean.dtype, self.start) - 1
        else:
            noise = normal(keys, clean.shape, clean.dtype, self.start)
        mask = self.problem.mask
        if mask is not None:
            noise = noise * (mask if len(mask) == 1 else mask[self.rows])
        if self.norm != "l1":
            noise = eps * noise / per_image(norms(noise, self.norm), noise).clamp_min(1e-12)
        return project(clean, clean + noise, self.norm, eps)


class _InBall:
    """A search in one ball.

    Args:
        search: the run that it belongs to, whose results it writes.
        eps: radius of the ball.
        steps: to make in it.
        done: steps that the run has made before.
        counts: whether what it finds counts; else no image leaves.
    """

    def __init__(self, search: Search, eps: float, steps: int, done: int, counts: bool) -> None:
        self.search, self.norm, self.eps, self.steps, self.done = search, search.norm, eps, steps, done
        self.counts, self.leave = counts, counts and search.leave

    def run(self, points: Tensor) -> Tensor:
        """Go from ``points`` ``(n, C, H, W)`` to those of highest loss; of images that have left, to the clean ones."""
        search, problem, rows = self.search, self.search.problem, self.search.rows
        values = points[0].numel()
        first, shortest, shrink = (max(int(share * self.steps), 1) for share in (0.22, 0.06, 0.03))
        interval = max(int(_L1_CHECK * self.steps), 1) if self.norm == "l1" else first
        longest_step = self.eps if self.norm == "l1" else 2 * self.eps
        clean = problem.images[rows]

        loss, gradient, logits = problem.loss_and_gradient(points, rows, search.loss, fooled_leave=self.leave)
        # one row an image; dropped together when the image leaves
        state = {
            "rows": rows,
            "place": torch.arange(len(rows), device=rows.device),  # in the results
            "clean": clean,
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
        if len(search.balls) > 1:  # a point that was brought into the ball is sparse already
            moved = (points - clean).flatten(1).ne(0).sum(1).to(points)
            state["sparse"] = torch.where(moved > 0, moved / values / 1.5, state["sparse"])
            state["moved"] = torch.where(moved > 0, moved, state["moved"])
        state = self._harvest(state, logits)
        since_check = 0
        for step in range(self.steps):
            if len(state["rows"]) == 0:
                break
            moved_to = self._step(state, momentum=_MOMENTUM if step > 0 else 1.0)
            state["previous"], state["points"] = state["points"], moved_to
            loss, state["gradient"], logits = problem.loss_and_gradient(
                moved_to, state["rows"], search.loss, fooled_leave=self.leave
            )
            search.iterations[state["place"]] += 1
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
            search.report(self.done + step + 1)
        if self.counts:
            # what never fooled the model ends where its loss was highest (of use against another model)
            lost = ~search.success[state["place"]]
            place = state["place"][lost]
            search.final[place] = state["best"][lost]
            search.final_loss[place] = state["best_loss"][lost].double()
        return clean.index_copy(0, state["place"], state["best"])

    def _harvest(self, state: dict[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
        """Keep the points that fool the model, and let their images leave if they may."""
        if not self.counts:
            return state
        search = self.search
        hit = search.problem.fooled(logits, state["rows"])
        if not hit.any():
            return state
        place, value = state["place"], state["last_loss"].double()
        take = hit & (~search.success[place] | (value > search.final_loss[place]))
        search.final[place[take]] = state["points"][take]
        search.final_loss[place[take]] = value[take]
        search.success[place] |= hit
        if not self.leave:
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
        stalls = state["rises"] <= interval * self.search.rho
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

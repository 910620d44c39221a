"""The search of the Jacobian saliency map attack: features of many images, changed pair by pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.saliency import best_pairs, best_sums
from lightning_robust.attacks.threat_model import parse_number
from lightning_robust.errors import UserError

if TYPE_CHECKING:  # which imports this file
    from lightning_robust.attacks.jsma import JSMA


class SaliencySearch:
    """One run of :class:`~lightning_robust.attacks.jsma.JSMA`, and the best that it has found.

    Args:
        attack: its settings.
        budget: features of an image that may change.
        problem: the batch.

    Attributes:
        best: ``(N, F)`` what comes back.
        success: ``(N,)`` bool.
        changed: ``(N,)`` int64, the features that differ in ``best``.
        aims: ``(N, attempts)`` int64, the classes to go for; ``None`` before the clean logits are known.
    """

    def __init__(self, attack: JSMA, budget: int, problem: Problem) -> None:
        self.attack, self.problem = attack, problem
        self.clean = problem.images.flatten(1)
        self.best = self.clean.clone()
        self.budget = budget
        self.step = parse_number(attack.theta, "theta")
        self.visits = math.ceil(1 / abs(self.step))  # after so many steps a feature is at its end, wherever it started
        self.open = None if problem.mask is None else problem.mask.expand_as(problem.images).flatten(1) != 0
        self.iterations = torch.zeros(len(self.clean), dtype=torch.int64, device=self.clean.device)
        self.queries = torch.zeros_like(self.iterations)
        self.changed = torch.zeros_like(self.iterations)
        self.success = torch.zeros_like(self.iterations, dtype=torch.bool)
        self.aims: Tensor | None = None
        logits = problem.clean_logits
        several = attack.target == "all" and problem.targets is None
        if logits is None and (several or problem.draws is not None):
            # the number of classes, or the mean over draws, has to be known before the first step
            self.queries += 1
            with torch.no_grad():
                logits = problem.logits(problem.images)
        if logits is not None:
            self.aims = self.choose(logits, slice(None))
            self.success = problem.fooled(logits)

    def choose(self, logits: Tensor, rows: Tensor | slice) -> Tensor:
        """The classes to go for, given clean logits ``(n, K)``: ``(n, attempts)``."""
        if self.problem.targets is not None:
            return self.problem.targets[rows, None]
        if logits.shape[1] < 2:
            raise UserError("JSMA: the model has one class: there is no other to go for")
        labels = self.problem.labels[rows, None]
        if self.attack.target == "next":
            return (labels + 1) % logits.shape[1]
        if self.attack.target == "least_likely":
            return logits.scatter(1, labels, torch.inf).argmin(1, keepdim=True)
        others = logits.scatter(1, labels, -torch.inf)
        if self.attack.target == "second":
            return others.argmax(1, keepdim=True)
        return others.argsort(dim=1, descending=True, stable=True)[:, :-1]

    def attempt(self, number: int, attempts: int) -> None:
        """Go for one class, and keep what comes of it where that is better than what there was."""
        problem = self.problem
        # of a success only one with fewer features is better
        budgets = torch.where(self.success, self.changed - 1, self.budget)
        rows = (budgets >= 2).nonzero()[:, 0]
        if not len(rows):
            return
        budgets = budgets[rows]
        limits = budgets * self.visits // 2
        flat = self.clean[rows]
        success = torch.zeros_like(rows, dtype=torch.bool)
        left = torch.arange(len(rows), device=rows.device)  # places in `rows`
        limit = self.budget * self.visits // 2
        for step in range(limit + 1):
            points, here = flat[left], rows[left]
            allowed = self.allowed(points, here, budgets[left])
            movable = (limits[left] > step) & (allowed.sum(1) >= 2)
            success[left], places, slopes = self.ask(points, here, movable, number)
            self.queries[here] += 1
            if not len(places):
                break
            features, found = self.salient(slopes, allowed[places])
            left, features = left[places[found]], features[found]
            if not len(left):
                break
            flat[left[:, None], features] = (flat[left[:, None], features] + self.step).clamp(0, 1)
            self.iterations[rows[left]] += 1
            if problem.progress is not None:
                problem.progress(number * limit + step + 1, attempts * limit)
        # where none succeeds, it is the first attempt that comes back
        kept = success if number else torch.ones_like(success)
        self.best[rows[kept]] = flat[kept]
        self.changed[rows[kept]] = (flat != self.clean[rows]).sum(1)[kept]
        self.success[rows[kept]] = success[kept]

    def allowed(self, points: Tensor, rows: Tensor, budgets: Tensor) -> Tensor:
        """``(n, F)`` bool: the features that may be changed at the points ``(n, F)``."""
        attack = self.attack
        allowed = points < 1 - attack.saturation if self.step > 0 else points > attack.saturation
        if self.open is not None:
            allowed &= self.open[rows]
        if self.visits == 1 and attack.eps is None:
            return allowed  # every step uses up two features for good: the number of steps keeps to the budget
        changed = points != self.clean[rows]
        full = changed.sum(1) + 2 > budgets
        allowed &= changed | ~full[:, None]
        if attack.eps is not None:
            shape = self.problem.images.shape
            pixels = changed.view(len(points), shape[1], -1).any(1)
            full = pixels.sum(1) + 2 > parse_number(attack.eps)
            allowed &= (pixels | ~full[:, None]).repeat(1, shape[1])
        return allowed

    def ask(
        self, points: Tensor, rows: Tensor, movable: Tensor, number: int
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Ask the model about some points, and for gradients at those from which the search goes on.

        Whether a point fools is seen in the same forward pass. A backward pass cannot be had for a part of a batch:
        where too many images turn out to be done, fresh passes for the others alone are cheaper.

        Args:
            points: ``(n, F)``.
            rows: ``(n,)`` their places in the batch.
            movable: ``(n,)`` bool: images that may go on if they are not fooled.
            number: of the attempt.

        Returns:
            which are fooled ``(n,)``; places ``(m,)`` among the points of those that go on; their gradients ``(m, F)``.
        """
        problem = self.problem
        images = points.view(-1, *problem.images.shape[1:])
        outputs = self.outputs(number)
        fooled = gradients = None
        if not movable.any():
            with torch.no_grad():
                logits = problem.logits(images)
        else:

            def unless_done(logits: Tensor, rows: Tensor) -> Sequence[Tensor]:
                nonlocal fooled
                values = outputs(logits, rows)
                if problem.draws is None:  # averages over draws are known only when all of them are there
                    fooled = problem.fooled(logits.detach(), rows)
                    going = int((movable & ~fooled).sum())
                    if going * (1 + len(values)) < len(rows) * len(values):
                        return []
                return values

            _, gradients, logits = problem.gradients(images, rows, unless_done)
            if self.aims is None:
                self.aims = self.choose(logits, slice(None))
        if fooled is None:
            fooled = problem.fooled(logits, rows)
        places = (movable & ~fooled).nonzero()[:, 0]
        if len(places) and not gradients:
            _, gradients, _ = problem.gradients(images[places], rows[places], outputs)
        elif len(places) < len(rows):
            gradients = [gradient[places] for gradient in gradients or []]
        return fooled, places, [gradient.flatten(1) for gradient in gradients or []]

    def outputs(self, number: int) -> Callable[[Tensor, Tensor], Sequence[Tensor]]:
        """What is differentiated: the target's output, and the sum of the others where it is not one minus that."""

        def functions(logits: Tensor, rows: Tensor) -> Sequence[Tensor]:
            aims = self.choose(logits.detach(), rows) if self.aims is None else self.aims[rows]
            aim = aims[:, number : number + 1]
            if self.attack.output == "softmax":
                return [(logits / self.attack.temperature).softmax(1).gather(1, aim)[:, 0]]
            return [logits.gather(1, aim)[:, 0], logits.scatter(1, aim, 0).sum(1)]

        return functions

    def salient(self, slopes: Sequence[Tensor], allowed: Tensor) -> tuple[Tensor, Tensor]:
        """The pair of each image to change next ``(m, 2)``, and whether there is one ``(m,)``."""
        # of the sums: one value that is not finite makes them so, and they cost a tenth of a look at each
        if not math.isfinite(sum(float(slope.sum()) for slope in slopes)):
            raise UserError(
                "the model's gradient is NaN or infinite at an attacked image: no step can be made along it",
                non_finite=True,
            )
        way = math.copysign(1, self.step)
        if self.attack.output == "softmax":
            return best_sums(way * slopes[0], allowed)
        return best_pairs(way * slopes[0], -way * slopes[1], allowed)

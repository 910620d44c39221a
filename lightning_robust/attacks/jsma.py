"""The Jacobian saliency map attack (Papernot et al., arXiv 1511.07528): few features, changed as far as they go."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_robust.attacks.base import Attack, Outcome, Problem
from lightning_robust.attacks.saliency import best_pairs, best_sums
from lightning_robust.attacks.threat_model import ThreatModel, parse_number
from lightning_robust.errors import UserError

Target = Literal["second", "least_likely", "next", "all"]


@dataclass(frozen=True, kw_only=True)
class JSMA(Attack):
    """Jacobian saliency map attack: changes the two most salient features (values of a channel) by ``theta``, again.

    At each step the pair p, q is changed that maximises -α·β, with α = ∂F_t/∂x_p + ∂F_t/∂x_q > 0 and β the same sum of
    Σ_{j≠t} F_j, < 0 (for a negative ``theta`` α < 0 and β > 0): the exact maximum over all pairs (see
    :mod:`lightning_robust.attacks.saliency`). It ends with success, or when the share of features is used up, or when
    no pair satisfies the two conditions. A feature at the end of the pixel range leaves the search, as do those outside
    the mask. An image on which the attack fails comes back with the features that were changed, within the budget.

    Where ``theta`` is shorter than 1, a feature stays in the search until it is at its end; what is counted is how many
    different ones have changed, and when the budget is used up, these alone go on.

    A targeted run succeeds at its target. A run without targets needs a class to go for, see ``target``, but succeeds
    as soon as the label changes, to whatever class: give targets to make it go all the way.

    Args:
        theta: how far a feature is changed at a step, in pixel units, a number or a fraction; positive: increased (as
            in the paper, by 1), negative: decreased.
        gamma: the budget Υ, as a share of all features (C · H · W) in (0, 1]; 0.145 in the paper, which is 112 of
            MNIST's.
        max_features: the budget as a number of features, in place of ``gamma``.
        target: what a run without targets goes for: "second" (the likeliest other class), "least_likely", "next" (the
            label plus one, and after the last class the first: as torchattacks does with ten classes) or "all" (each
            other class in turn, from the likeliest on; the attempt that changed the fewest features is kept).
        output: F is the "logits", or the "softmax" of logits / temperature, whose sum is constant, so that β is -α and
            one backward pass does; on networks that are not distilled it needs fewer features. In arXiv 1608.04644
            the two are JSMA-Z and JSMA-F.
        temperature: see ``output``; the temperature of the training undoes defensive distillation's hidden gradients
            (arXiv 1607.04311).
        saturation: a feature as near as this to the end of the pixel range, in pixel units, counts as at its end. The
            paper's is 0; with it, features one gray level from white use up the budget.
        eps: a budget of pixels besides, of which any channel may change.
        seed: takes no part: nothing is random.

    Raises:
        UserError: for settings that do not exist or do not fit.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
        >>> adversarial = JSMA(max_features=4)(model, images, labels)
        >>> bool((adversarial != images).flatten(1).sum(1).max() <= 4)
        True
    """

    stop_at_success = True  # what is misclassified to begin with is for the model itself to say

    theta: float | str = 1.0
    gamma: float = 0.145
    max_features: int | None = None
    target: Target = "second"
    output: Literal["logits", "softmax"] = "logits"
    temperature: float = 1.0
    saturation: float = 0.01
    eps: float | str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        theta = parse_number(self.theta, "theta")
        if not 0 < abs(theta) <= 1:
            raise UserError(
                f"JSMA: theta={self.theta}: it is a change of a pixel value in [0, 1]: give 1, or -1 to darken"
            )
        if not 0 < self.gamma <= 1:
            raise UserError(f"JSMA: gamma={self.gamma} is a share of all features, above 0 and up to 1, such as 0.145")
        if self.max_features is not None and self.max_features < 2:
            raise UserError(
                f"JSMA: max_features={self.max_features}: features change in pairs, so at least 2 are needed"
            )
        if self.target not in get_args(Target):
            raise UserError(
                f"JSMA: target={self.target!r} does not exist: choose one of {', '.join(get_args(Target))}; classes of "
                "your own are given as targets in the call"
            )
        if self.output not in ("logits", "softmax"):
            raise UserError(f"JSMA: output={self.output!r} does not exist: choose logits or softmax")
        if not self.temperature > 0:
            raise UserError(f"JSMA: temperature={self.temperature}: it is a positive number, for example 100")
        if self.output == "logits" and self.temperature != 1:
            raise UserError(
                f"JSMA: temperature={self.temperature} changes nothing with output='logits': set output='softmax'"
            )
        if not 0 <= self.saturation < 1:
            raise UserError(f"JSMA: saturation={self.saturation} is a distance in pixel units, from 0 to below 1")
        if self.eps is not None and parse_number(self.eps) < 2:
            raise UserError(f"JSMA: eps={self.eps} is a number of pixels, and features change in pairs: give 2 or more")
        _ = self.threat_model

    @property
    def threat_model(self) -> ThreatModel:
        """L0, bounded where the number of pixels is known before the images are."""
        budget = self.max_features if self.eps is None else self.eps
        return ThreatModel.unbounded("l0") if budget is None else ThreatModel("l0", budget)

    def budget(self, features: int) -> int:
        """How many features of an image may change.

        Args:
            features: how many it has, C · H · W.

        Raises:
            UserError: for a share of fewer than two, and for more than there are.
        """
        if self.max_features is not None:
            if self.max_features > features:
                raise UserError(f"JSMA: max_features={self.max_features}, but the images have {features}")
            return self.max_features
        # a millionth for shares such as 0.29, which times 100 is a little less than 29
        budget = math.floor(self.gamma * features + 1e-6)
        if budget < 2:
            raise UserError(
                f"JSMA: gamma={self.gamma} of {features} features is fewer than the two of a step: give a larger share"
            )
        return budget

    def perturb(self, problem: Problem) -> Outcome:
        """Search for all images at once; those that are done leave."""
        search = _Search(self, problem)
        attempts = 1 if search.aims is None else search.aims.shape[1]
        for number in range(attempts):
            search.attempt(number, attempts)
        return Outcome(search.best.view_as(problem.images), search.iterations, search.queries, search.success)


class _Search:
    """One run of :class:`JSMA`, and the best that it has found.

    Attributes:
        best: ``(N, F)`` what comes back.
        success: ``(N,)`` bool.
        changed: ``(N,)`` int64, the features that differ in ``best``.
        aims: ``(N, attempts)`` int64, the classes to go for; ``None`` before the clean logits are known.
    """

    def __init__(self, attack: JSMA, problem: Problem) -> None:
        self.attack, self.problem = attack, problem
        self.clean = problem.images.flatten(1)
        self.best = self.clean.clone()
        self.budget = attack.budget(self.clean.shape[1])
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

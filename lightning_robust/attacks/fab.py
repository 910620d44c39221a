"""Fast Adaptive Boundary attack (Croce & Hein, arXiv 1907.02044): the smallest perturbation that fools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_robust.attacks.base import Outcome
from lightning_robust.attacks.hyperplane import Functions, gradients_if_worthwhile, nearest, smallest_move
from lightning_robust.attacks.losses import margin
from lightning_robust.attacks.minimal_norm import MinimalNormAttack, Smallest
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.projection import norms, per_image
from lightning_robust.attacks.randomness import normal, uniform
from lightning_robust.attacks.threat_model import Norm, check_ball_norm
from lightning_robust.errors import UserError

# A random start lies half as far away, where nothing is known yet and there is no budget; as in the official code.
_REACH = {"linf": 0.3, "l2": 1.0, "l1": 5.0}
_FINAL_STEPS = 3
# How far beyond the tie a step of the final search goes, as a share of the way to the best point: at the tie itself
# rounding decides who wins.
_FINAL_PAST = 0.01
# Values that the gradients of one forward pass may hold together: 1 GiB of float32.
_GRADIENT_VALUES = 2**28


@dataclass(frozen=True, kw_only=True)
class FAB(MinimalNormAttack):
    """Fast Adaptive Boundary attack: walks along the decision boundary towards the clean image.

    Each step linearises the nearest decision boundary, projects the point and the clean image onto it within [0, 1],
    goes a little past it (``eta``) towards a mix of both projections (at most ``alpha_max`` of the clean image's), and,
    once the model is fooled, comes back towards the clean image (``beta``). At the end three secant steps bring the
    best point nearer to the boundary (the paper's final search). Without a budget the smallest perturbation is
    returned. With ``eps`` an image is done, and leaves the batch, as soon as one within the budget is found, as in
    AutoAttack (arXiv 2003.01690).

    A step asks the model at one point, and at a second one if the first has fooled it; it takes one backward pass, or
    as many as there are other classes in the untargeted form with ``targeted_classes=None``.

    Args:
        norm: the norm to minimise, "linf", "l2" or "l1".
        eps: budget in pixel units of [0, 1], a number or a fraction such as 8/255; ``None``: no budget.
        steps: steps of each run.
        restarts: runs; all but the first start at random, half as far from the image as the best point known, or as the
            budget where that is smaller.
        targeted_classes: one run towards each of that many most likely other classes, at one gradient a step:
            AutoAttack takes 9 (FAB-T). ``None``: runs that watch all classes, at one gradient a step for each.
        alpha_max: largest share of the clean image's projection in a step, in (0, 1].
        eta: how far past the boundary a step goes, 1 or more (1: onto it).
        beta: share of the perturbation that is left after a step back, in (0, 1).
        seed: of the random starts.

    Raises:
        UserError: for settings outside these ranges.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> images = torch.rand(4, 3, 2, 2)
        >>> result = FAB(norm="l2", steps=10).run(model, images, model(images).argmax(1))
        >>> bool((model(result.images).argmax(1) != model(images).argmax(1))[result.success].all())
        True
    """

    norm: Norm = "linf"
    eps: float | str | None = None
    steps: int = 100
    restarts: int = 1
    targeted_classes: int | None = None
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        check_ball_norm(self.norm, "FAB")
        super().__post_init__()
        if self.steps < 1:
            raise UserError(f"FAB: steps={self.steps}: at least one step is needed")
        if self.restarts < 1:
            raise UserError(f"FAB: restarts={self.restarts}: at least one run is needed")
        if self.targeted_classes is not None and self.targeted_classes < 1:
            raise UserError(
                f"FAB: targeted_classes={self.targeted_classes}: give the number of classes to aim at, 9 in "
                "AutoAttack, or None for runs that watch all classes"
            )
        if not 0 < self.alpha_max <= 1:
            raise UserError(f"FAB: alpha_max={self.alpha_max} is a share above 0 and up to 1, 0.1 in the paper")
        if not self.eta >= 1:
            raise UserError(f"FAB: eta={self.eta} would stop short of the boundary: give 1 or more, 1.05 in the paper")
        if not 0 < self.beta < 1:
            raise UserError(f"FAB: beta={self.beta} is a share between 0 and 1, 0.9 in the paper")

    @property
    def _norm(self) -> Norm:
        return self.norm

    def perturb(self, problem: Problem) -> Outcome:
        """One run for each class aimed at and each restart; with a budget only images that withstand go on."""
        best = self.begin(problem)
        aims = self._aims(problem, best.clean_logits)
        runs = [aim for aim in aims for _ in range(self.restarts)]
        for number, aim in enumerate(runs):
            run = _Run(self, problem, best, aim, number, len(runs))
            if len(run.rows) == 0:
                break
            run.search()
        best.leave_the_boundary()
        return best.outcome()

    def _aims(self, problem: Problem, logits: Tensor) -> Sequence[Tensor | None]:
        """The class each run goes for, ``(N,)``; ``None``: whichever is nearest."""
        if problem.targets is not None or self.targeted_classes is None:
            return [None]
        if problem.aims is not None:
            return [problem.aims]
        others = logits.scatter(1, problem.labels[:, None], -torch.inf).argsort(1, descending=True)
        return others[:, : min(self.targeted_classes, logits.shape[1] - 1)].unbind(1)


class _Run:
    """One run from one start, on the images that are not done."""

    def __init__(
        self,
        attack: FAB,
        problem: Problem,
        best: Smallest,
        aim: Tensor | None,
        number: int,
        runs: int,
    ) -> None:
        self.attack, self.problem, self.best, self.aim = attack, problem, best, aim
        self.number, self.runs, self.classes = number, runs, best.clean_logits.shape[1]
        self.rows = best.todo.nonzero()[:, 0]
        self.rows = self.rows[~self._done(self.rows)]
        # logits at the best point of this run, and whether there is one: for the final search
        self.logits = best.clean_logits.clone()
        self.improved = torch.zeros_like(best.todo)

    def search(self) -> None:
        attack, problem, best = self.attack, self.problem, self.best
        clean = problem.images[self.rows]
        points = clean
        if self.number % attack.restarts > 0:
            points = self._random_start(clean)
            best.queries[self.rows] += 1
        elif problem.clean_logits is not None or self.number > 0:
            best.queries[self.rows] += 1  # else it was asked for the clean logits
        value, gradient = self._linearise(points, self.rows)
        for step in range(attack.steps):
            points = self._step(clean, points, value, gradient)
            best.iterations[self.rows] += 1
            best.queries[self.rows] += 1
            if step == attack.steps - 1:
                with torch.no_grad():
                    self._offer(points, problem.logits(points))
                break
            value, gradient, known, logits = self._ask(points)
            hit = self._offer(points, logits)
            go = ~self._done(self.rows)
            if not go.all():
                self.rows, clean, points = self.rows[go], clean[go], points[go]
                value, gradient, known, hit = value[go], gradient[go], known[go], hit[go]
                if len(self.rows) == 0:
                    break
            points = torch.where(per_image(hit, points), torch.lerp(clean, points, attack.beta), points)
            best.queries[self.rows] += hit
            new = (hit | ~known).nonzero()[:, 0]
            if len(new) == len(self.rows):
                value, gradient = self._linearise(points, self.rows)
            elif len(new):
                value[new], gradient[new] = self._linearise(points[new], self.rows[new])
            self._report(step + 1)
        self._final_search()
        self._report(attack.steps)

    def _report(self, steps: int) -> None:
        if self.problem.progress is not None:
            self.problem.progress(self.number * self.attack.steps + steps, self.runs * self.attack.steps)

    def _done(self, rows: Tensor) -> Tensor:
        """Which of the images have a perturbation within the budget."""
        model = self.attack.threat_model
        return self.best.norm[rows] <= (model.radius + 1e-6 if model.bounded else -1)

    def _random_start(self, clean: Tensor) -> Tensor:
        """A point of random direction, half as far away as the best known or as the budget."""
        attack, problem, rows = self.attack, self.problem, self.rows
        keys, shape, dtype, stream = problem.keys[rows], clean.shape, clean.dtype, self.number
        if attack.norm == "linf":
            noise = 2 * uniform(keys, shape, dtype, stream) - 1
        else:
            noise = normal(keys, shape, dtype, stream)
        if problem.mask is not None:
            noise = noise * (problem.mask if len(problem.mask) == 1 else problem.mask[rows])
        limit = attack.threat_model.radius if attack.threat_model.bounded else _REACH[attack.norm]
        known = self.best.norm[rows]
        far = known.clamp_max(limit) if attack.threat_model.bounded else torch.where(known.isfinite(), known, limit)
        size = norms(noise, attack.norm).clamp_min(torch.finfo(dtype).tiny)
        return (clean + noise * per_image(far / 2 / size, noise)).clamp(0, 1)

    def _functions(self) -> Functions:
        """Logit differences that are negative until the goal is reached."""
        problem = self.problem

        def functions(logits: Tensor, rows: Tensor) -> Sequence[Tensor]:
            if problem.targets is not None:
                return [-margin(logits, problem.targets[rows])]
            labels = problem.labels[rows][:, None]
            if self.aim is not None:
                others = self.aim[rows][:, None]
            else:
                others = (labels + torch.arange(1, logits.shape[1], device=logits.device)) % logits.shape[1]
            return (logits.gather(1, others) - logits.gather(1, labels)).unbind(1)

        return functions

    def _parts(self, points: Tensor) -> int:
        """How many images to linearise at a time, so that the gradients of all classes fit into memory."""
        many = self.problem.targets is None and self.aim is None
        return max(1, _GRADIENT_VALUES // (points[0].numel() * (self.classes - 1))) if many else len(points)

    def _linearise(self, points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest boundary at each of some points: its function and gradient there."""
        found = []
        part = self._parts(points)
        for some, at in zip(points.split(part), rows.split(part), strict=True):
            values, gradients, _ = self.problem.gradients(some, at, self._functions())
            found.append(nearest(values, gradients, self.attack.norm))
        return torch.cat([value for value, _ in found]), torch.cat([gradient for _, gradient in found])

    def _ask(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits at the points; and what :meth:`_linearise` gives, where it comes nearly for free, and where it did."""
        found = []
        part = self._parts(points)
        for some, at in zip(points.split(part), self.rows.split(part), strict=True):
            values, gradients, logits = gradients_if_worthwhile(self.problem, some, at, self._functions())
            value, gradient = logits.new_zeros(len(some)), torch.zeros_like(some)
            if values:
                value, gradient = nearest(values, gradients, self.attack.norm)
            found.append((value, gradient, torch.full_like(at, bool(values), dtype=torch.bool), logits))
        value, gradient, known, logits = (torch.cat(of) for of in zip(*found, strict=True))
        return value, gradient, known, logits

    def _step(self, clean: Tensor, points: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        """Past the linearised boundary, between the projections of the point and of the clean image (section 3.2)."""
        attack = self.attack
        value = value.to(points.dtype)
        onto = smallest_move(points, gradient, -value, attack.norm)
        offset = (gradient * (points - clean)).flatten(1).sum(1)
        from_clean = smallest_move(clean, gradient, offset - value, attack.norm)
        size, size_from_clean = (norms(move, attack.norm).clamp_min(1e-8) for move in (onto, from_clean))
        alpha = per_image((size / (size + size_from_clean)).clamp_max(attack.alpha_max), points)
        return torch.lerp(points + attack.eta * onto, clean + attack.eta * from_clean, alpha).clamp(0, 1)

    def _offer(self, points: Tensor, logits: Tensor) -> Tensor:
        hit = self.problem.fooled(logits, self.rows)
        better = self.best.offer(self.rows, points, hit)
        self.logits[self.rows[better]] = logits[better].to(self.logits)
        self.improved[self.rows[better]] = True
        return hit

    def _final_search(self) -> None:
        """The paper's final search: secant steps between clean image and best point, to where two classes tie."""
        problem, best = self.problem, self.best
        self.rows = self.improved.nonzero()[:, 0]
        self.rows = self.rows[~self._done(self.rows)]
        if len(self.rows) == 0:
            return
        low, low_logits = problem.images[self.rows], best.clean_logits[self.rows]
        high, high_logits = best.images[self.rows], self.logits[self.rows]
        for _ in range(_FINAL_STEPS):
            # the class that the image is to be, and the one that it must not be
            goal = high_logits.argmax(1, keepdim=True)
            rival = problem.labels[self.rows, None] if problem.targets is None else low_logits.argmax(1, keepdim=True)
            below = (low_logits.gather(1, rival) - low_logits.gather(1, goal)).clamp_min(0)[:, 0]
            above = (high_logits.gather(1, goal) - high_logits.gather(1, rival)).clamp_min(0)[:, 0]
            share = (below / (below + above).clamp_min(torch.finfo(below.dtype).tiny)).to(low)
            share = share + _FINAL_PAST * (1 - share)
            points = torch.lerp(low, high, per_image(share, low))
            best.queries[self.rows] += 1
            with torch.no_grad():
                logits = problem.logits(points)
            hit = self._offer(points, logits)
            low, high = (torch.where(per_image(w, low), points, old) for w, old in ((~hit, low), (hit, high)))
            low_logits, high_logits = (
                torch.where(w[:, None], logits, old) for w, old in ((~hit, low_logits), (hit, high_logits))
            )

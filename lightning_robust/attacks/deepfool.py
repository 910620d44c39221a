"""DeepFool (Moosavi-Dezfooli et al., arXiv 1511.04599) on whole batches, in L2 and L∞."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_robust.attacks.base import Outcome
from lightning_robust.attacks.hyperplane import gradients_if_worthwhile, slopes
from lightning_robust.attacks.losses import margin
from lightning_robust.attacks.minimal_norm import MinimalNormAttack, Smallest
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.projection import per_image, steepest
from lightning_robust.errors import UserError

# How far a step goes past the linearised boundary, in pixel units, so that it is crossed without overshoot, too (first
# step, later ones): 1e-4 as in the original code. In L∞, where perturbations are a hundredth of those in L2, the first
# step takes a hundredth of that, and every further one twice as much as the last, up to 1e-4.
_NUDGE = {"l2": (1e-4, 1e-4), "linf": (1e-6, 1e-4)}
# How many times steeper a class may have become since it was last looked at; one that never was may be that many times
# steeper than the image's steepest. A class that is not the nearest even so is not looked at.
_STEEPER = 2.0
# Classes to look at first, those that seem nearest: at the clean image, where no slope is known, and later.
_FIRST, _LATER = 3, 1
# Values that the gradients of one forward pass may hold together: 1 GiB of float32.
_GRADIENT_VALUES = 2**28


@dataclass(frozen=True, kw_only=True)
class DeepFool(MinimalNormAttack):
    """DeepFool: step after step onto the nearest linearised decision boundary, until the model is fooled.

    Each step takes the class of least |f|/‖w‖ (f the logit difference to the label, w its gradient, ‖·‖ the dual norm)
    and adds the smallest perturbation that reaches its hyperplane. What is tried is the clean image plus (1 +
    ``overshoot``) times the sum of all steps, clipped to [0, 1] (arXiv 1511.04599). A targeted run goes for the target,
    away from whichever other class leads. An image is given back where the model is first fooled; it is then done.

    The original computes a gradient for every candidate at every step. Here a class is passed over whose |f| is so
    large that it could be the nearest only if its slope had doubled since it was last looked at: nearly always the same
    path, with about half of the passes.

    Args:
        norm: "l2" or "linf".
        steps: steps at most.
        overshoot: share that is added to the sum of all steps; 0.02 in the original, 0 allowed.
        candidates: how many classes may be approached, those of largest logits at the clean image, the label among
            them (so 10 stands for nine others, as in the original); ``None``: all.
        eps: budget in pixel units of [0, 1], a number or a fraction such as 128/255: larger perturbations count as
            failures; ``None``: none.
        seed: takes no part; the attack draws nothing.

    Raises:
        UserError: for settings outside these ranges.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> images = torch.rand(4, 3, 2, 2)
        >>> result = DeepFool().run(model, images, model(images).argmax(1))
        >>> bool((model(result.images).argmax(1) != model(images).argmax(1))[result.success].all())
        True
    """

    norm: Literal["l2", "linf"] = "l2"
    steps: int = 50
    overshoot: float = 0.02
    candidates: int | None = 10
    eps: float | str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.norm not in _NUDGE:
            raise UserError(f"DeepFool: norm={self.norm!r}: choose l2 or linf")
        super().__post_init__()
        if self.steps < 1:
            raise UserError(f"DeepFool: steps={self.steps}: at least one step is needed")
        if not 0 <= self.overshoot < float("inf"):
            raise UserError(f"DeepFool: overshoot={self.overshoot}: give 0 or more, 0.02 in the original")
        if self.candidates is not None and self.candidates < 2:
            raise UserError(
                f"DeepFool: candidates={self.candidates}: the label is one of them, so give 2 or more, or None for all "
                "classes"
            )

    @property
    def _norm(self) -> Literal["l2", "linf"]:
        return self.norm

    def perturb(self, problem: Problem) -> Outcome:
        """All images step together; those that are fooled leave."""
        return _Search(self, problem).outcome()


class _Search:
    """The images that are not fooled yet, and what is known of their boundaries.

    Attributes:
        rows: ``(n,)`` their places in the batch.
        points: ``(n, C, H, W)`` where they are.
        total: ``(n, C, H, W)`` the sum of their steps.
        classes: ``(n, m)`` the classes that each may approach; ``None`` until the clean logits are known.
        steep: ``(n, m)`` slope of each class's function where it was last looked at; negative where it never was.
    """

    def __init__(self, attack: DeepFool, problem: Problem) -> None:
        self.attack, self.problem = attack, problem
        self.rows = torch.arange(len(problem.images), device=problem.images.device)
        self.points = problem.images
        self.total = torch.zeros_like(problem.images)
        self.classes: Tensor | None = None
        self.steep = torch.zeros(0)

    def outcome(self) -> Outcome:
        attack, problem = self.attack, self.problem
        best: Smallest | None = None
        # Clean logits that nobody has yet come out of the first step's forward pass. An average over draws has to be
        # known before a gradient is asked for: what to look at depends on it.
        if problem.clean_logits is not None or problem.draws is not None:
            best = attack.begin(problem)
            self._choose_classes(best.clean_logits)
            self._keep(best.todo)
        normals: list[Tensor] = []
        for step in range(attack.steps):
            if len(self.rows) == 0:
                break
            if step == 0 and best is not None and problem.draws is not None:
                logits, normals = best.clean_logits[self.rows], []
            else:
                logits, normals = self._look()
            if best is None:
                best = attack.begin(dataclasses.replace(problem, clean_logits=logits))
            if step > 0 or problem.draws is None or problem.clean_logits is not None:
                best.queries[self.rows] += 1
            hit = problem.fooled(logits, self.rows)
            best.offer(self.rows, self.points, hit)
            normals = [normal[~hit] for normal in normals]
            self._keep(~hit)
            if len(self.rows):
                first, last = _NUDGE[attack.norm]
                self._step(self._gaps(logits[~hit], self.rows), normals, min(first * 2**step, last))
                best.iterations[self.rows] += 1
            if problem.progress is not None:
                problem.progress(step + 1, attack.steps)
        assert best is not None
        if len(self.rows):
            best.queries[self.rows] += 1
            with torch.no_grad():
                best.offer(self.rows, self.points, problem.fooled(problem.logits(self.points), self.rows))
        return best.outcome()

    def _keep(self, which: Tensor) -> None:
        assert self.classes is not None
        self.rows, self.points, self.total = self.rows[which], self.points[which], self.total[which]
        self.classes, self.steep = self.classes[which], self.steep[which]

    def _choose_classes(self, logits: Tensor) -> None:
        """What each image may approach, from the logits of all clean images."""
        problem = self.problem
        if problem.targets is not None:
            self.classes = problem.targets[:, None]
        else:
            count = min(self.attack.candidates or logits.shape[1], logits.shape[1]) - 1
            others = logits.detach().scatter(1, problem.labels[:, None], -torch.inf)
            self.classes = others.argsort(dim=1, descending=True, stable=True)[:, :count]
        self.steep = torch.full(self.classes.shape, -1.0, dtype=problem.images.dtype, device=problem.images.device)

    def _gaps(self, logits: Tensor, rows: Tensor, classes: Tensor | None = None) -> Tensor:
        """By how much the logit of each class is too small, ``(n, m)``."""
        if self.problem.targets is not None:
            return margin(logits, self.problem.targets[rows])[:, None]
        classes = self.classes if classes is None else classes
        assert classes is not None
        return logits.gather(1, self.problem.labels[rows][:, None]) - logits.gather(1, classes)

    def _likely(self, gaps: Tensor) -> Tensor:
        """The columns ``(n, q)`` of the classes that seem nearest."""
        count = _LATER if bool((self.steep >= 0).any()) else _FIRST
        seen = self.steep.amax(1, keepdim=True)
        guess = gaps.to(self.steep) / torch.where(self.steep >= 0, self.steep, seen.abs()).clamp_min(1e-30)
        return guess.argsort(dim=1, stable=True)[:, :count]

    def _look(self) -> tuple[Tensor, list[Tensor]]:
        """Logits at the points, and gradients of the likely classes where they come cheaply; else an empty list."""
        if self.problem.draws is not None:
            with torch.no_grad():
                return self.problem.logits(self.points), []

        def functions(logits: Tensor, rows: Tensor) -> Sequence[Tensor]:
            if self.classes is None:
                self._choose_classes(logits)
            gaps = self._gaps(logits, rows)
            return (-gaps.gather(1, self._likely(gaps.detach()))).unbind(1)

        _, normals, logits = gradients_if_worthwhile(self.problem, self.points, self.rows, functions)
        return logits, normals

    def _step(self, gaps: Tensor, normals: list[Tensor], nudge: float) -> None:
        """Past the nearest boundary by ``nudge``; images whose boundaries are all flat leave."""
        attack, norm = self.attack, self.attack.norm
        gaps = gaps.to(self.steep)
        found = _Nearest(gaps, self.steep, self.points, norm)
        picks = self._likely(gaps)
        if normals:
            found.learn(slice(None), picks, normals)
        else:
            self._differentiate(torch.arange(len(gaps), device=gaps.device), picks, found)
        steepest_now = _STEEPER * torch.where(self.steep >= 0, self.steep, self.steep.amax(1, keepdim=True))
        near = (gaps < steepest_now * found.distance[:, None]) | found.distance.isinf()[:, None]
        self._differentiate_each(near.scatter(1, picks, False), found)

        # no further than the box is wide: where f is nearly flat, the sum of steps would overflow
        widest = 1.0 if norm == "linf" else self.points[0].numel() ** 0.5
        length = (found.distance + nudge).clamp_max(widest)
        self.total = self.total + per_image(length, self.points) * steepest(found.normal, norm)
        self.points = (self.problem.images[self.rows] + (1 + attack.overshoot) * self.total).clamp(0, 1)
        self._keep(found.distance.isfinite())

    def _differentiate(self, places: Tensor, columns: Tensor, found: _Nearest) -> None:
        """Forward pass of the images in ``places`` ``(p,)``, and gradients of the classes in ``columns`` ``(p, q)``."""
        assert self.classes is not None
        classes = self.classes[places].gather(1, columns)
        part = max(1, _GRADIENT_VALUES // (columns.shape[1] * self.points[0].numel()))
        for some, chosen, aims in zip(places.split(part), columns.split(part), classes.split(part), strict=True):

            def functions(logits: Tensor, rows: Tensor, aims: Tensor = aims) -> Sequence[Tensor]:
                return (-self._gaps(logits, rows, aims)).unbind(1)

            found.learn(some, chosen, self.problem.gradients(self.points[some], self.rows[some], functions)[1])

    def _differentiate_each(self, wanted: Tensor, found: _Nearest) -> None:
        """The classes that are ``wanted`` ``(n, m)``, with a few of them going together and many going together.

        A backward pass is for all images of a batch, so those that want few classes would wait for those that want
        many: they go in two batches, parted where that costs least.
        """
        count = wanted.sum(1)
        sizes = torch.bincount(count).tolist()
        most = len(sizes) - 1
        if most == 0:
            return

        def cost(few: int) -> int:
            return sum(sizes[1 : few + 1]) * (1 + few) + sum(sizes[few + 1 :]) * (1 + most)

        few = min(range(most), key=cost)
        for above, most_here in ((0, few), (few, most)):
            places = ((count > above) & (count <= most_here)).nonzero()[:, 0]
            if len(places) == 0:
                continue
            columns = wanted[places].long().argsort(dim=1, descending=True, stable=True)[:, :most_here]
            # an image that wants fewer has its first one again: what is not wanted must not be seen
            spare = torch.arange(most_here, device=columns.device) >= count[places, None]
            self._differentiate(places, torch.where(spare, columns[:, :1], columns), found)


class _Nearest:
    """The nearest boundary of each image among those looked at in this step.

    Attributes:
        distance: ``(n,)`` how far it is; infinity where all that were looked at are flat.
        normal: ``(n, C, H, W)`` the gradient of its function.
    """

    def __init__(self, gaps: Tensor, steep: Tensor, points: Tensor, norm: Literal["l2", "linf"]) -> None:
        self.gaps, self.steep, self.norm = gaps, steep, norm
        self.distance = torch.full_like(gaps[:, 0], torch.inf)
        self.normal = torch.zeros_like(points)

    def learn(self, places: Tensor | slice, columns: Tensor, normals: list[Tensor]) -> None:
        """Take note of the gradients of the classes in ``columns`` ``(p, q)`` at the images in ``places``."""
        rows = torch.arange(len(self.gaps), device=self.gaps.device)[places]
        for column, normal in zip(columns.unbind(1), normals, strict=True):
            steep = slopes(normal, self.norm)
            self.steep[rows, column] = steep
            distance = torch.where(steep > 0, self.gaps[rows, column] / steep, torch.inf)
            nearer = distance < self.distance[rows]
            self.distance[rows[nearer]] = distance[nearer]
            self.normal[rows[nearer]] = normal[nearer]

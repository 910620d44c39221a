"""What attacks share that look for the *smallest* perturbation instead of any in a ball."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_robust.attacks.base import Attack, Outcome
from lightning_robust.attacks.losses import margin
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.projection import norms
from lightning_robust.attacks.threat_model import AnyNorm, ThreatModel

_ROUNDING = 32  # by how many units in the last place a logit may come out otherwise in a batch of another size


@dataclass(frozen=True, kw_only=True)
class MinimalNormAttack(Attack):
    """An attack that minimises the norm of a perturbation that fools.

    An image that is misclassified to begin with is returned unchanged, with a norm of zero, and an image on which the
    attack fails is returned unchanged, too. With a budget ``eps`` only perturbations within it count: a larger one is a
    failure.

    Subclasses have a field or property ``norm`` and fill in :meth:`perturb`, for which :meth:`begin` gives a
    :class:`Smallest` to collect in.
    """

    stop_at_success = True  # what is misclassified to begin with is for the model itself to say, not for a stand-in

    eps: float | str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.threat_model  # refuses a bad norm or ε

    @property
    @abstractmethod
    def _norm(self) -> AnyNorm:
        """The norm that is minimised."""

    @property
    def threat_model(self) -> ThreatModel:
        """Norm, and budget where there is one."""
        return ThreatModel.unbounded(self._norm) if self.eps is None else ThreatModel(self._norm, self.eps)

    def begin(self, problem: Problem) -> Smallest:
        """Ask about the clean images; those that need no attack are done."""
        return Smallest(problem, self.threat_model)


class Smallest:
    """The smallest successful perturbation of each image so far.

    Attributes:
        images: ``(N, C, H, W)`` the best found; the clean image where there is none.
        norm: ``(N,)`` its norm; infinity where there is none.
        todo: ``(N,)`` bool: images that were not misclassified to begin with.
        clean_logits: ``(N, K)`` of the clean images.
        iterations: ``(N,)`` int64, for the attack to count in.
        queries: ``(N,)`` int64, points at which the model was asked; the clean image is counted already.
    """

    def __init__(self, problem: Problem, threat_model: ThreatModel) -> None:
        self.problem, self.threat_model = problem, threat_model
        count, device = len(problem.images), problem.images.device
        self.images = problem.images.clone()
        self.iterations = torch.zeros(count, dtype=torch.int64, device=device)
        self.queries = torch.zeros_like(self.iterations)
        logits = problem.clean_logits
        if logits is None:
            self.queries += 1
            with torch.no_grad():
                logits = problem.logits(problem.images)
        self.clean_logits = logits.detach()
        self.todo = ~problem.fooled(self.clean_logits)
        self.norm = torch.where(self.todo, torch.inf, 0.0).to(problem.images.dtype)

    def offer(self, rows: Tensor, points: Tensor, hit: Tensor) -> Tensor:
        """Take over the points that fool and are nearer than what is known.

        Args:
            rows: ``(n,)`` places in the batch, each at most once.
            points: ``(n, C, H, W)`` in [0, 1].
            hit: ``(n,)`` bool, whether the model is fooled there.

        Returns:
            ``(n,)`` bool: which were taken over.
        """
        size = norms(points - self.problem.images[rows], self.threat_model.norm)
        better = hit & (size < self.norm[rows])
        self.images[rows[better]] = points[better].detach()
        self.norm[rows[better]] = size[better]
        return better

    def leave_the_boundary(self) -> None:
        """Move what lies on a decision boundary, up to rounding, a little past it.

        There a point fools in one batch and not in another. It is moved away from the clean image by a ten-thousandth
        of its way, or a thousandth, or a hundredth: the first that is clear of the boundary and within the budget.
        """
        problem = self.problem
        rows = (self.todo & self.norm.isfinite()).nonzero()[:, 0]
        for further in (0, 1e-4, 1e-3, 1e-2):
            if len(rows) == 0:
                return
            clean = problem.images[rows]
            points = (clean + (1 + further) * (self.images[rows] - clean)).clamp(0, 1) if further else self.images[rows]
            with torch.no_grad():
                logits = problem.logits(points)
            self.queries[rows] += 1
            lead = problem.sign * margin(logits, problem.goal[rows])
            clear = lead > _ROUNDING * torch.finfo(logits.dtype).eps * logits.abs().amax(1)
            if further:
                size = norms(points - clean, self.threat_model.norm)
                clear &= size <= self.threat_model.radius
                self.images[rows[clear]], self.norm[rows[clear]] = points[clear], size[clear]
            rows = rows[~clear]

    def outcome(self) -> Outcome:
        """What was found, held to the budget."""
        # a millionth for rounding, as the promise allows
        success = self.norm <= self.threat_model.radius + 1e-6 if self.threat_model.bounded else self.norm.isfinite()
        images = torch.where(success[:, None, None, None], self.images, self.problem.images)
        return Outcome(images, self.iterations, self.queries, success)

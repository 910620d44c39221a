"""PGD from a small normal start, and the inner maximiser of TRADES (Zhang et al., arXiv 1901.08573): PGD on KL."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_robust.attacks.base import Outcome
from lightning_robust.attacks.losses import LOSSES, AttackLoss, kl_divergence
from lightning_robust.attacks.pgd import PGD, restarted
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.randomness import normal
from lightning_robust.errors import UserError


@dataclass(frozen=True, kw_only=True)
class NormalStartPGD(PGD):
    """PGD that starts at x + ``sigma`` · N(0, 1), next to the image and not anywhere in the ball (as MART does).

    Args:
        eps: budget in pixel units of [0, 1], a number or a fraction such as 8/255.
        norm: norm of the budget.
        steps: gradient steps.
        step_size: length of a step in pixel units; default 2.5 · eps / steps.
        sigma: standard deviation of the start, in pixel units; the start is brought into ball and box.
        random_start: always True: the start is what this class is about.
        restarts: always 1: the starts lie too near to each other for more.
        loss: "ce", "ce_scaled", "margin" or "dlr".
        stop_at_success: images that are misclassified to begin with are returned unchanged, fooled ones leave.
        seed: of the random start.

    Raises:
        UserError: for settings that do not exist or do not fit.
    """

    sigma: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if not self.sigma > 0:
            raise UserError(
                f"{name}: sigma={self.sigma} is no noise: give a positive deviation such as 0.001, or use PGD"
            )
        if not self.random_start:
            raise UserError(f"{name} always starts from noise: leave random_start out, or use PGD")
        if self.restarts > 1:
            raise UserError(f"{name}: restarts={self.restarts}: one start is all it has; use PGD for several")

    def perturb(self, problem: Problem) -> Outcome:
        """One run from the noisy image."""
        return self._run(problem, problem.goal, LOSSES[self.loss])

    def _run(self, problem: Problem, reference: Tensor, loss: AttackLoss) -> Outcome:
        images = problem.images
        return restarted(
            problem,
            reference=reference,
            loss=loss,
            threat_model=self.threat_model,
            steps=self.steps,
            length=self.length,
            stop_at_success=self.stop_at_success,
            noise=self.sigma * normal(problem.keys, images.shape, images.dtype),
        )


@dataclass(frozen=True, kw_only=True)
class KLPGD(NormalStartPGD):
    """PGD that leads the prediction away from the clean one: raises KL(f(x) ‖ f(x')), labels play no part in it.

    The inner maximiser of TRADES (Zhang et al., arXiv 1901.08573): f(x) is computed once, and the start is x +
    0.001 · N(0, 1), since the gradient of the divergence is zero at x itself. Labels only decide what counts as
    success, so that it also serves as an evaluation attack.

    Args:
        eps: budget in pixel units of [0, 1], a number or a fraction such as 8/255.
        norm: norm of the budget.
        steps: gradient steps.
        step_size: length of a step in pixel units; default 2.5 · eps / steps.
        sigma: standard deviation of the start, in pixel units; the start is brought into ball and box.
        random_start: always True: at the clean image the gradient is zero.
        restarts: always 1.
        loss: always "kl".
        stop_at_success: images that are misclassified to begin with are returned unchanged, fooled ones leave. TRADES
            switches it off.
        seed: of the random start.

    Raises:
        UserError: for settings that do not exist or do not fit, and when it is called with targets.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
        >>> adversarial = KLPGD(eps=0.031, step_size=0.007)(model, images, labels)
        >>> bool((adversarial - images).abs().max() <= 0.031 + 1e-6)
        True
    """

    loss: Literal["kl"] = "kl"  # type: ignore[assignment]  # narrower on purpose: there is one choice

    def __post_init__(self) -> None:
        if self.loss != "kl":
            raise UserError(
                f"KLPGD: loss={self.loss!r}: it has the one loss 'kl'; use PGD or NormalStartPGD for others"
            )
        object.__setattr__(self, "loss", "ce")  # a name that PGD knows while it checks the other settings
        super().__post_init__()
        object.__setattr__(self, "loss", "kl")

    def perturb(self, problem: Problem) -> Outcome:
        """One run from the noisy image against the clean probabilities."""
        if problem.targets is not None:
            raise UserError("KLPGD leads away from the clean prediction and cannot aim at targets: use PGD")
        known = problem.clean_logits is not None
        logits = problem.clean_logits
        if logits is None:
            with torch.no_grad():
                logits = problem.logits(problem.images)
            problem = dataclasses.replace(problem, clean_logits=logits)
        outcome = self._run(problem, _full(logits).softmax(1), _divergence)
        outcome.queries += int(not known)
        return outcome


def _full(logits: Tensor) -> Tensor:
    """At least float32: the divergence near the clean image is a small difference of large numbers."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _divergence(logits: Tensor, probabilities: Tensor) -> Tensor:
    return kl_divergence(_full(logits), probabilities)

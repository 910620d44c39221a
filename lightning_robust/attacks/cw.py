"""The attacks of Carlini and Wagner (arXiv 1608.04644) in L2, L∞ and L0."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_robust.attacks.base import Outcome
from lightning_robust.attacks.cw_hinge import Hinge
from lightning_robust.attacks.cw_l0 import L0Search
from lightning_robust.attacks.cw_l2 import L2Search
from lightning_robust.attacks.cw_linf import LinfSearch
from lightning_robust.attacks.cw_search import Search, Settings, draw_back
from lightning_robust.attacks.minimal_norm import MinimalNormAttack, Smallest
from lightning_robust.attacks.problem import Problem
from lightning_robust.errors import UserError

CWNorm = Literal["l2", "linf", "l0"]
_SEARCHES: dict[str, type[Search]] = {"l2": L2Search, "linf": LinfSearch, "l0": L0Search}
_LR = {"l2": 0.01, "linf": 0.01, "l0": 0.05}


@dataclass(frozen=True, kw_only=True)
class CW(MinimalNormAttack):
    """The attacks of Carlini and Wagner: the smallest perturbation by Adam on norm + c · max(κ - lead, 0).

    The lead is max_{i≠y} Z_i - Z_y of the logits, targeted Z_t - max_{i≠t} Z_i, which no scale of the logits saturates:
    these attacks broke defensive distillation (arXiv 1608.04644).

    * ``l2``: ‖δ‖² + c · hinge. From ``initial_const`` on, c is raised tenfold until a round of ``steps`` succeeds, and
      then bisected, ``binary_search_steps`` rounds in all, each from the clean image.
    * ``linf``: Σ (|δ| - τ)₊ + c · hinge, τ shrinking below what was found, c raised up to 20 where a round fails.
    * ``l0``: pixels that matter least are given back, until those that are left no longer fool. Counts pixels, of which
      all channels may change.

    What differs from the authors' code, to the attack's advantage: every image has its own constant, bisection and end
    of a round, so that it does not depend on its neighbours; the box's tanh reaches a little beyond [0, 1], so that
    black and white pixels move; and the result of L2 and L∞ is drawn back towards the clean image as far as it still
    fools. Their code makes up to 10,000 steps a round; rounds that stall end early, and 1,000 come within a percent or
    two.

    Args:
        norm: "l2", "linf" or "l0".
        confidence: κ: success means a lead of this or more. 0 is the boundary itself; more transfers better.
        steps: steps of a round at most.
        binary_search_steps: rounds of ``l2``; plays no part in the other norms.
        lr: of Adam, in the argument of the tanh (a grey pixel moves by 0.6 of it); default 0.01, for ``l0`` 0.05.
        initial_const: the first c; plays no part in ``l0``.
        abort_early: end an image's round when its loss no longer falls, looked at after every tenth of the steps.
        eps: budget in pixel units of [0, 1], a number or a fraction such as 128/255 (``l0``: pixels): larger
            perturbations count as failures, and an image leaves as soon as it is within; ``None``: none.
        seed: takes no part; the attack draws nothing.

    Raises:
        UserError: for settings outside these ranges.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> images = torch.rand(4, 3, 2, 2)
        >>> result = CW(steps=50, binary_search_steps=4).run(model, images, model(images).argmax(1))
        >>> bool((model(result.images).argmax(1) != model(images).argmax(1))[result.success].all())
        True
    """

    norm: CWNorm = "l2"
    confidence: float = 0.0
    steps: int = 1000
    binary_search_steps: int = 9
    lr: float | None = None
    initial_const: float = 1e-3
    abort_early: bool = True
    eps: float | str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.norm not in get_args(CWNorm):
            raise UserError(f"CW: norm={self.norm!r}: choose one of {', '.join(get_args(CWNorm))}")
        super().__post_init__()
        check_settings("CW", self.confidence, self.settings)

    @property
    def _norm(self) -> CWNorm:
        return self.norm

    @property
    def settings(self) -> Settings:
        """Of the search."""
        lr = _LR[self.norm] if self.lr is None else self.lr
        return Settings(self.steps, lr, self.abort_early, self.initial_const, self.binary_search_steps)

    def perturb(self, problem: Problem) -> Outcome:
        """Search for all images at once; each leaves when it is done."""
        hinge = Hinge(problem, self.confidence)
        best, rows, slope = self._first_look(problem, hinge)
        if len(rows):
            _SEARCHES[self.norm](self.settings, problem, best, hinge, rows, slope).run()
            if self.norm != "l0":
                draw_back(best, hinge)
        return best.outcome()

    def _first_look(self, problem: Problem, hinge: Hinge) -> tuple[Smallest, Tensor, Tensor]:
        """The images to attack and the hinge's gradient there; one pass for these and for the clean logits."""
        known = problem.clean_logits is not None
        if known:
            best = self.begin(problem)
            rows = best.todo.nonzero()[:, 0]
            if len(rows) == 0:
                return best, rows, problem.images[rows]
            _, gradient, _ = problem.loss_and_gradient(problem.images[rows], rows, hinge.lead)
        else:
            rows = torch.arange(len(problem.images), device=problem.images.device)
            _, gradient, logits = problem.loss_and_gradient(problem.images, rows, hinge.lead, fooled_leave=True)
            best = self.begin(dataclasses.replace(problem, clean_logits=logits))
            best.queries += 1
            rows = best.todo.nonzero()[:, 0]
            gradient = gradient[rows]
        best.queries[rows] += int(known)
        check_gradient(gradient)
        return best, rows, -gradient


def check_settings(name: str, confidence: float, settings: Settings) -> None:
    """Refuse settings that make no search.

    Raises:
        UserError: naming the setting and the mend.
    """
    if not 0 <= confidence < math.inf:
        raise UserError(f"{name}: confidence={confidence}: κ is a difference of logits, 0 or more")
    if settings.steps < 1:
        raise UserError(f"{name}: steps={settings.steps}: at least one step is needed")
    if settings.rounds < 1:
        raise UserError(f"{name}: binary_search_steps={settings.rounds}: at least one round is needed")
    if not 0 < settings.lr < math.inf:
        raise UserError(f"{name}: lr={settings.lr} never moves: give a positive number, 0.01 in the paper")
    if not 0 < settings.initial_const < math.inf:
        raise UserError(
            f"{name}: initial_const={settings.initial_const}: the constant is raised tenfold and bisected, so begin "
            "above 0, with 0.001 in the paper"
        )


def check_gradient(gradient: Tensor) -> None:
    """Refuse to search along a gradient that is not finite: the image would seem robust.

    Raises:
        UserError: if any of it is NaN or infinite.
    """
    if not bool(torch.isfinite(gradient).all()):
        raise UserError(
            "the model's gradient is NaN or infinite at a clean image: no step can be made along it", non_finite=True
        )

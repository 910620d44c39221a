"""The Jacobian saliency map attack (Papernot et al., arXiv 1511.07528): few features, changed as far as they go."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_robust.attacks.base import Attack, Outcome
from lightning_robust.attacks.jsma_search import SaliencySearch
from lightning_robust.attacks.problem import Problem
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
        >>> import torch
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
        """L0, bounded where pixels are counted; features are counted apart, of which a pixel has several."""
        return ThreatModel.unbounded("l0") if self.eps is None else ThreatModel("l0", self.eps)

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
        search = SaliencySearch(self, self.budget(problem.images[0].numel()), problem)
        attempts = 1 if search.aims is None else search.aims.shape[1]
        for number in range(attempts):
            search.attempt(number, attempts)
        return Outcome(search.best.view_as(problem.images), search.iterations, search.queries, search.success)

"""How many features an attack has to change: the robustness ρ of defensive distillation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_robust.errors import UserError


class FeatureRobustnessScores(NamedTuple):
    """What :class:`FeatureRobustness` computes; float64 scalars, NaN where nothing was counted.

    Attributes:
        robustness: ρ.
        changed: mean share of features that the successful runs changed.
    """

    robustness: Tensor
    changed: Tensor


class FeatureRobustness(Metric):
    """ρ: mean over the images of the smallest share of features with which an attack misled the model.

    Papernot et al. (arXiv 1511.04508) define ρ as the expected smallest perturbation that changes the class, and
    measure it by the saliency attack: of an image's runs (one a target) the one that changed fewest features. An image
    that no run misled counts with the attack's whole budget, so ρ cannot exceed it and is then a lower bound; the
    paper's 14.1 % at T = 100 is its budget of 14.3 % of the features, reached by nearly all images. What it measures is
    the *attack's* reach: where gradients are hidden, ρ rises though the model is as easy to mislead as before.

    Args:
        budget: the largest share of features that the attack may change, in (0, 1].

    Raises:
        UserError: for a share outside (0, 1]; from ``update`` for tensors that do not fit each other and shares outside
            [0, 1].

    Example:
        >>> metric = FeatureRobustness(budget=0.5)
        >>> image = torch.tensor([0, 0, 1, 1])  # two runs of each of two images
        >>> metric.update(2, image, torch.tensor([0.1, 0.3, 0.5, 0.4]), torch.tensor([True, True, False, False]))
        >>> round(float(metric.compute().robustness), 3), round(float(metric.compute().changed), 3)
        (0.3, 0.2)
    """

    full_state_update = False
    is_differentiable = False
    least: Tensor
    images: Tensor
    changed: Tensor
    successes: Tensor

    def __init__(self, budget: float) -> None:
        super().__init__()
        if not 0 < budget <= 1:
            raise UserError(f"FeatureRobustness: budget={budget} is a share of the features, above 0 and up to 1")
        self.budget = float(budget)
        for name in ("least", "changed"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("images", "successes"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, count: int, image: Tensor, share: Tensor, success: Tensor) -> None:
        """Count a batch; all runs of an image belong into one update.

        Args:
            count: N images.
            image: ``(M,)`` which of the N images a run attacked.
            share: ``(M,)`` share of features that it changed, in [0, 1].
            success: ``(M,)`` bool: it misled the model.
        """
        if not image.shape == share.shape == success.shape == (len(image),) or success.dtype != torch.bool:
            raise UserError("FeatureRobustness: image, share and success are vectors of one value a run")
        if len(image) and not 0 <= int(image.min()) <= int(image.max()) < count:
            raise UserError(f"FeatureRobustness: image holds numbers outside 0 to {count - 1}")
        share = share.detach().double()
        if not bool(((share >= 0) & (share <= 1)).all()):
            raise UserError("FeatureRobustness: a share of features lies outside [0, 1]")
        least = torch.full((count,), self.budget, dtype=torch.float64, device=share.device)
        least = least.scatter_reduce(0, image[success], share[success], "amin")
        device = self.least.device
        self.least = self.least + least.sum().to(device)
        self.images = self.images + count
        self.changed = self.changed + share[success].sum().to(device)
        self.successes = self.successes + success.sum().to(device)

    def compute(self) -> FeatureRobustnessScores:
        """Over all images counted, on every rank the same."""
        return FeatureRobustnessScores(self.least / self.images, self.changed / self.successes)

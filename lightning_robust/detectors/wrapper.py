"""A classifier that may refuse an image."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_robust.detectors.detector import MutationTestingDetector

REJECTED = -1
"""The label of an image that is refused."""


class Verdict(NamedTuple):
    """What a :class:`DetectingClassifier` says of a batch.

    Attributes:
        label: ``(N,)`` int64, the class, or -1 for an image that is refused.
        predicted: ``(N,)`` int64, the class without regard to the detector.
        kappa: ``(N,)`` float64, share of the mutants that changed the label.
        mutants: ``(N,)`` int64, mutants that the decision took.
        decided: ``(N,)`` bool; an image that is undecided at the cap is not refused.
    """

    label: Tensor
    predicted: Tensor
    kappa: Tensor
    mutants: Tensor
    decided: Tensor


class DetectingClassifier(nn.Module):
    """A model with a detector at its door.

    Args:
        model: images in [0, 1] to logits.
        detector: calibrated for this model.

    Raises:
        UserError: for a detector that is not calibrated, or was for another model.
    """

    def __init__(self, model: nn.Module, detector: MutationTestingDetector) -> None:
        super().__init__()
        detector.require(model)
        self.model, self.detector = model, detector

    def forward(self, images: Tensor) -> Tensor:
        """The model's logits ``(N, K)``, whatever the detector says: what an attacker of the model alone sees."""
        return self.model(images)

    @torch.no_grad()
    def decide(self, images: Tensor) -> Verdict:
        """Classify or refuse images ``(N, C, H, W)`` in [0, 1]."""
        found = self.detector.decide(self.model, images)
        label = torch.where(found.adversarial, REJECTED, found.predicted)
        return Verdict(label, found.predicted, found.kappa, found.mutants, found.decided)

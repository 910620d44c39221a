"""Training on clean images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_robust.attacks.context import Model
from lightning_robust.objectives.awp import AWP
from lightning_robust.objectives.base import Objective, ObjectiveOutput, Perturbed, check_share
from lightning_robust.objectives.losses import cross_entropy


@dataclass(frozen=True, kw_only=True)
class Natural(Objective):
    """Cross-entropy on clean images; one forward pass.

    Args:
        label_smoothing: share of the label's weight that is spread over all classes, in [0, 1).
        awp: adversarial weight perturbation.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
        >>> output = Natural()(model, torch.rand(2, 1, 2, 2), torch.tensor([0, 2]), seed=0)
        >>> output.loss.shape, output.logits.shape, output.images_adv
        (torch.Size([]), torch.Size([2, 3]), None)
    """

    label_smoothing: float = 0.0
    awp: AWP | None = None

    def __post_init__(self) -> None:
        check_share(self, "label_smoothing", self.label_smoothing)

    def loss(self, model: Model, images: Tensor, labels: Tensor, perturbed: Perturbed) -> ObjectiveOutput:
        """CE(f(x), y)."""
        logits = model(images)
        detached = logits.detach()
        return ObjectiveOutput(
            cross_entropy(logits, labels, self.label_smoothing), logits=detached, clean_logits=detached
        )

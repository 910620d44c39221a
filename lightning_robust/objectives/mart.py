"""MART (Wang et al., ICLR 2020): adversarial training that cares most for images that are misclassified clean."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_robust.attacks.context import Model
from lightning_robust.attacks.kl_pgd import NormalStartPGD
from lightning_robust.attacks.threat_model import Norm
from lightning_robust.objectives.awp import AWP
from lightning_robust.objectives.base import Objective, ObjectiveOutput, Perturbed, adversarial_images, check_weight
from lightning_robust.objectives.losses import boosted_cross_entropy, full_precision, kl_divergences


@dataclass(frozen=True, kw_only=True)
class MART(Objective):
    """BCE(f(x'), y) + λ · mean of KL(f(x) ‖ f(x')) · (1 - p_y(x)), where x' maximises the cross-entropy.

    BCE is the cross-entropy plus a margin term, see
    :func:`~lightning_robust.objectives.losses.boosted_cross_entropy`. Wang et al., "Improving Adversarial Robustness
    Requires Revisiting Misclassified Examples", ICLR 2020 (openreview rklOg6EFwS), equations 6 and 11; step sizes and
    the start x + 0.001 · N(0, 1) are of the authors' code. Two forward passes in train mode, clean images first, both
    with gradients: BatchNorm statistics move twice.

    Args:
        beta: weight λ of the divergence; 5 in the authors' ResNet-18 runs, 6 for wide networks.
        eps: budget in pixel units of [0, 1], a number or a fraction such as 8/255.
        step_size: length of a step in pixel units.
        steps: gradient steps.
        norm: norm of the budget.
        awp: adversarial weight perturbation.

    Raises:
        UserError: for settings that do not exist or do not fit.
    """

    beta: float = 5.0
    eps: float | str = 0.031
    step_size: float | str = 0.007
    steps: int = 10
    norm: Norm = "linf"
    awp: AWP | None = None

    def __post_init__(self) -> None:
        check_weight(self, "beta", self.beta)
        _ = self.attack  # checks its settings now and not in the first batch

    @property
    def attack(self) -> NormalStartPGD:
        """PGD on the cross-entropy from x + 0.001 · N(0, 1)."""
        return NormalStartPGD(
            eps=self.eps, norm=self.norm, steps=self.steps, step_size=self.step_size, stop_at_success=False
        )

    def loss(self, model: Model, images: Tensor, labels: Tensor, perturbed: Perturbed) -> ObjectiveOutput:
        """BCE(f(x'), y) + λ · mean of KL(f(x) ‖ f(x')) · (1 - p_y(x)), the weight with its gradient, as published."""
        images_adv = adversarial_images(perturbed)
        clean = model(images)
        logits = model(images_adv)
        doubt = 1 - full_precision(clean).softmax(1).gather(1, labels[:, None])[:, 0]
        loss = boosted_cross_entropy(logits, labels) + self.beta * (kl_divergences(logits, clean) * doubt).mean()
        return ObjectiveOutput(loss, logits=logits.detach(), images_adv=images_adv, clean_logits=clean.detach())

"""TRADES (Zhang et al., arXiv 1901.08573): clean accuracy, and a prediction that does not change nearby."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_robust.attacks.context import Model
from lightning_robust.attacks.kl_pgd import KLPGD
from lightning_robust.attacks.threat_model import Norm
from lightning_robust.objectives.awp import AWP
from lightning_robust.objectives.base import Objective, ObjectiveOutput, Perturbed, adversarial_images, check_weight
from lightning_robust.objectives.losses import cross_entropy, kl_divergences


@dataclass(frozen=True, kw_only=True)
class TRADES(Objective):
    """CE(f(x), y) + β · KL(f(x) ‖ f(x')), where x' maximises the divergence (arXiv 1901.08573).

    Two forward passes in train mode, clean images first, both with gradients: BatchNorm statistics move twice. The
    inner maximiser is :class:`~lightning_robust.attacks.kl_pgd.KLPGD` in eval mode.

    Args:
        beta: weight of the divergence: more gives more robustness and less clean accuracy; 6 in the paper.
        eps: budget in pixel units of [0, 1], a number or a fraction such as 8/255.
        step_size: length of a step in pixel units.
        steps: gradient steps.
        norm: norm of the budget.
        awp: adversarial weight perturbation; γ = 0.005 in its paper for this objective.

    Raises:
        UserError: for settings that do not exist or do not fit.
    """

    beta: float = 6.0
    eps: float | str = 0.031
    step_size: float | str = 0.007
    steps: int = 10
    norm: Norm = "linf"
    awp: AWP | None = None

    def __post_init__(self) -> None:
        check_weight(self, "beta", self.beta)
        _ = self.attack  # checks its settings now and not in the first batch

    @property
    def attack(self) -> KLPGD:
        """PGD on the divergence from x + 0.001 · N(0, 1)."""
        return KLPGD(eps=self.eps, norm=self.norm, steps=self.steps, step_size=self.step_size, stop_at_success=False)

    def loss(self, model: Model, images: Tensor, labels: Tensor, perturbed: Perturbed) -> ObjectiveOutput:
        """CE(f(x), y) + β · KL(f(x) ‖ f(x'))."""
        images_adv = adversarial_images(perturbed)
        clean = model(images)
        logits = model(images_adv)
        loss = cross_entropy(clean, labels) + self.beta * kl_divergences(logits, clean).mean()
        return ObjectiveOutput(loss, logits=logits.detach(), images_adv=images_adv, clean_logits=clean.detach())

"""Distillation of robustness: ARD (Goldblum et al., arXiv 1905.09747) and RSLAD (Zi et al., arXiv 2108.07969)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_robust.attacks import PGD, attacking
from lightning_robust.attacks.context import Model
from lightning_robust.attacks.kl_pgd import NormalStartPGD
from lightning_robust.attacks.losses import kl_divergence
from lightning_robust.attacks.threat_model import Norm
from lightning_robust.errors import UserError
from lightning_robust.objectives.awp import AWP
from lightning_robust.objectives.base import ObjectiveOutput, Perturbed, adversarial_images, check_share
from lightning_robust.objectives.distillation import DistillationObjective, SoftLabels
from lightning_robust.objectives.losses import cross_entropy, kl_divergences


@dataclass(frozen=True, kw_only=True)
class ARD(DistillationObjective):
    """Adversarially robust distillation: α · T² · KL(teacher_T(x) ‖ f_T(x')) + (1 - α) · CE(f(x), y).

    Goldblum et al., arXiv 1905.09747. The teacher is an adversarially trained, larger network and says what it thinks
    of the *clean* image; x' raises the cross-entropy of the true label. The divergence is summed over the classes and
    averaged over the images, as in the paper's formula; the authors' code averages over the classes, too, which divides
    the learning rate of this term by their number. They run it at T = 30 and α = 1. One forward pass, of the
    adversarial images; with α < 1 a second one, of the clean images, after it.

    Args:
        alpha: α, share of the distillation in [0, 1]; the true labels have the rest.
        eps: budget in pixel units of [0, 1], a number or a fraction such as 8/255.
        step_size: length of a step in pixel units.
        steps: gradient steps.
        norm: norm of the budget.
        awp: adversarial weight perturbation.

    Raises:
        UserError: for settings that do not exist or do not fit.
    """

    alpha: float = 1.0
    eps: float | str = "8/255"
    step_size: float | str = "2/255"
    steps: int = 10
    norm: Norm = "linf"
    awp: AWP | None = None

    def __post_init__(self) -> None:
        _check_alpha(self, self.alpha)
        _ = self.attack  # checks its settings now and not in the first batch

    @property
    def attack(self) -> PGD:
        """PGD on the cross-entropy of the true label."""
        return PGD(eps=self.eps, norm=self.norm, steps=self.steps, step_size=self.step_size, stop_at_success=False)

    def distil(
        self, model: Model, images: Tensor, labels: Tensor, perturbed: Perturbed, soft: SoftLabels
    ) -> ObjectiveOutput:
        """α · T² · KL(teacher_T(x) ‖ f_T(x')) + (1 - α) · CE(f(x), y)."""
        images_adv = adversarial_images(perturbed)
        logits = model(images_adv)
        divergence = kl_divergences(soft.tempered(logits), soft.tempered(soft.logits)).mean()
        loss = self.alpha * soft.temperature**2 * divergence
        clean = model(images) if self.alpha < 1 else None
        if clean is not None:
            loss = loss + (1 - self.alpha) * cross_entropy(clean, labels)
        return ObjectiveOutput(
            loss,
            logits=logits.detach(),
            images_adv=images_adv,
            clean_logits=None if clean is None else clean.detach(),
        )


@dataclass(frozen=True, kw_only=True)
class RSLAD(DistillationObjective):
    """Robust soft label adversarial distillation: (1 - α) · KL(t(x) ‖ f(x)) + α · KL(t(x) ‖ f(x')).

    Zi et al., arXiv 2108.07969. The soft labels of a robust teacher t take the place of the true ones everywhere: x'
    raises KL(t(x) ‖ f(x')) from x + 0.001 · N(0, 1). T is 1 in the paper; another divides the logits of both. The
    divergences are summed over the classes and averaged over the images, as in the paper's formula; the authors' code
    averages over the classes, too. Two forward passes in train mode, adversarial images first.

    Args:
        alpha: α, share of the adversarial images in [0, 1]; 5/6 in the paper.
        hard_label_weight: w, share in [0, 1) of CE(f(x), y) mixed in beside (1 - w) times the above; 0 in the paper.
        eps: budget in pixel units of [0, 1], a number or a fraction such as 8/255.
        step_size: length of a step in pixel units.
        steps: gradient steps.
        norm: norm of the budget.
        awp: adversarial weight perturbation.

    Raises:
        UserError: for settings that do not exist or do not fit.
    """

    alpha: float = 5 / 6
    hard_label_weight: float = 0.0
    eps: float | str = "8/255"
    step_size: float | str = "2/255"
    steps: int = 10
    norm: Norm = "linf"
    awp: AWP | None = None

    def __post_init__(self) -> None:
        _check_alpha(self, self.alpha)
        check_share(self, "hard_label_weight", self.hard_label_weight)
        _ = self.attack

    @property
    def attack(self) -> NormalStartPGD:
        """PGD from x + 0.001 · N(0, 1); in training on the divergence from the soft labels."""
        return NormalStartPGD(
            eps=self.eps, norm=self.norm, steps=self.steps, step_size=self.step_size, stop_at_success=False
        )

    def perturb_from(
        self, model: Model, images: Tensor, labels: Tensor, soft: SoftLabels, *, seed: int, mask: Tensor | None = None
    ) -> Perturbed:
        """Images that raise KL(t(x) ‖ f(x'))."""
        attack = self.attack
        with attacking(model) as lent:
            problem = attack._problem(lent, images, labels, None, mask, seed)

            def divergence(logits: Tensor, probabilities: Tensor) -> Tensor:
                return kl_divergence(soft.tempered(logits), probabilities)

            outcome = attack._run(problem, soft.probabilities, divergence)
        return Perturbed(outcome.images.detach())

    def distil(
        self, model: Model, images: Tensor, labels: Tensor, perturbed: Perturbed, soft: SoftLabels
    ) -> ObjectiveOutput:
        """(1 - w) · [(1 - α) · KL(t(x) ‖ f(x)) + α · KL(t(x) ‖ f(x'))] + w · CE(f(x), y)."""
        images_adv = adversarial_images(perturbed)
        teacher = soft.tempered(soft.logits)
        logits = model(images_adv)
        clean = model(images)
        loss = (1 - self.alpha) * kl_divergences(soft.tempered(clean), teacher).mean()
        loss = loss + self.alpha * kl_divergences(soft.tempered(logits), teacher).mean()
        if self.hard_label_weight > 0:
            loss = (1 - self.hard_label_weight) * loss + self.hard_label_weight * cross_entropy(clean, labels)
        return ObjectiveOutput(loss, logits=logits.detach(), images_adv=images_adv, clean_logits=clean.detach())


def _check_alpha(owner: object, alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise UserError(f"{type(owner).__name__}: alpha={alpha} is a share: from 0 to 1")

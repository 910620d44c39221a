"""Adversarial training (Madry et al., arXiv 1706.06083) with any attack."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from lightning_robust.attacks import PGD, Attack
from lightning_robust.attacks.context import Model
from lightning_robust.errors import UserError
from lightning_robust.objectives.awp import AWP
from lightning_robust.objectives.base import Objective, ObjectiveOutput, Perturbed, adversarial_images, check_share
from lightning_robust.objectives.losses import cross_entropy


@dataclass(frozen=True, kw_only=True)
class PGDAdversarial(Objective):
    """Cross-entropy on adversarial images (Madry et al., arXiv 1706.06083); PGD-10 at ε = 8/255 by default.

    One forward pass in train mode, of the adversarial images; with ``clean_weight`` > 0 a second one, of the clean
    images, before it (so that BatchNorm statistics move twice).

    With an attack from the clean image (``random_start: false``) and without a mask, the output's ``clean_gradient`` is
    the attack's first step and costs nothing.

    Args:
        attack: what makes the images; default PGD with 10 steps of 2/255 and ε = 8/255. Its own
            ``stop_at_success`` and ``seed`` are overridden.
        stop_at_success: stop attacking an image as soon as it is fooled. Faster, but the images then lie near the
            decision boundary and images that are misclassified stay clean, which is a weaker training than Madry's.
        clean_weight: share of the clean images' loss, in [0, 1): (1 - w) · CE(f(x'), y) + w · CE(f(x), y). 0 in Madry
            et al., 0.5 in Goodfellow et al. (arXiv 1412.6572).
        label_smoothing: share of the label's weight that is spread over all classes, in [0, 1).
        awp: adversarial weight perturbation; γ = 0.01 in its paper for this objective.

    Raises:
        UserError: for settings that do not exist or do not fit.
    """

    # None and not PGD(): the command line would carry the steps and the random start of that over to an FGSM
    attack: Attack | None = None
    stop_at_success: bool = False
    clean_weight: float = 0.0
    label_smoothing: float = 0.0
    awp: AWP | None = None

    def __post_init__(self) -> None:
        check_share(self, "clean_weight", self.clean_weight)
        check_share(self, "label_smoothing", self.label_smoothing)
        attack = PGD(eps="8/255", step_size="2/255", steps=10) if self.attack is None else self.attack
        if not isinstance(attack, Attack):
            raise UserError(f"PGDAdversarial: attack={attack!r} is not an attack: give one such as PGD()")
        if not self.stop_at_success:
            attack = attack.to_the_end()
        elif any(setting.name == "stop_at_success" for setting in dataclasses.fields(attack)):  # type: ignore[arg-type]
            attack = attack.replace(stop_at_success=True)
        object.__setattr__(self, "attack", attack)

    def loss(self, model: Model, images: Tensor, labels: Tensor, perturbed: Perturbed) -> ObjectiveOutput:
        """(1 - w) · CE(f(x'), y) + w · CE(f(x), y)."""
        images_adv = adversarial_images(perturbed)
        clean = model(images) if self.clean_weight > 0 else None
        logits = model(images_adv)
        loss = cross_entropy(logits, labels, self.label_smoothing)
        if clean is not None:
            loss = (1 - self.clean_weight) * loss + self.clean_weight * cross_entropy(
                clean, labels, self.label_smoothing
            )
        return ObjectiveOutput(
            loss,
            logits=logits.detach(),
            images_adv=images_adv,
            clean_logits=None if clean is None else clean.detach(),
            clean_gradient=perturbed.clean_gradient,
        )

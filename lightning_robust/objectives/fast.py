"""Fast adversarial training (Wong, Rice & Kolter, arXiv 2001.03994), and the alarm for its catastrophic overfitting."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_robust.attacks import FGSM, PGD, ThreatModel
from lightning_robust.attacks.context import Model
from lightning_robust.attacks.threat_model import Norm
from lightning_robust.errors import UserError
from lightning_robust.objectives.awp import AWP
from lightning_robust.objectives.base import Objective, ObjectiveOutput, Perturbed, adversarial_images, check_share
from lightning_robust.objectives.losses import cross_entropy


@dataclass(frozen=True, kw_only=True)
class FastFGSM(Objective):
    """Cross-entropy on images of one gradient step from a uniform random start (arXiv 2001.03994); one train forward.

    It may collapse within an epoch into a network that resists FGSM and nothing else. The paper watches the robust
    accuracy under five steps of PGD for that: :attr:`check_attack` is that attack and
    :class:`CatastrophicOverfitting` reads its results. The authors take the gradient in train mode; here, as in every
    attack, it is taken in eval mode, so that BatchNorm statistics see adversarial images alone.

    Args:
        eps: budget in pixel units of [0, 1], a number or a fraction such as 8/255.
        step_size: length of the step; default 1.25 · eps, as in the paper.
        norm: norm of the budget; the paper's is linf.
        detect_overfitting: whether training is to be watched and stopped at a collapse.
        drop: fall of the robust accuracy between two checks that counts as a collapse, in (0, 1].
        label_smoothing: share of the label's weight that is spread over all classes, in [0, 1).
        awp: adversarial weight perturbation.

    Raises:
        UserError: for settings that do not exist or do not fit.
    """

    eps: float | str = "8/255"
    step_size: float | str | None = None
    norm: Norm = "linf"
    detect_overfitting: bool = True
    drop: float = 0.2
    label_smoothing: float = 0.0
    awp: AWP | None = None

    def __post_init__(self) -> None:
        check_share(self, "label_smoothing", self.label_smoothing)
        CatastrophicOverfitting(self.drop)
        if self._radius == 0:
            raise UserError("FastFGSM: eps=0 leaves nothing to train against: use Natural")
        _ = self.attack  # all settings are checked here and not in the first batch

    @property
    def _radius(self) -> float:
        return ThreatModel(self.norm, self.eps).radius

    @property
    def attack(self) -> FGSM:
        """One step of FGSM from a uniform random start."""
        step = (
            1.25 * PGD(eps=self.eps, norm=self.norm).threat_model.radius if self.step_size is None else self.step_size
        )
        return FGSM(eps=self.eps, norm=self.norm, step_size=step, random_start=True, stop_at_success=False)

    @property
    def check_attack(self) -> PGD:
        """Five steps of ε / 4 (2/255 at ε = 8/255), as the authors check for overfitting."""
        return PGD(eps=self.eps, norm=self.norm, steps=5, step_size=self._radius / 4)

    def loss(self, model: Model, images: Tensor, labels: Tensor, perturbed: Perturbed) -> ObjectiveOutput:
        """CE(f(x'), y)."""
        images_adv = adversarial_images(perturbed)
        logits = model(images_adv)
        return ObjectiveOutput(
            cross_entropy(logits, labels, self.label_smoothing), logits=logits.detach(), images_adv=images_adv
        )


class CatastrophicOverfitting:
    """Says when robust accuracy has collapsed: it fell by more than ``drop`` since the last check (arXiv 2001.03994).

    The authors check once an epoch, on one training batch, and keep the weights of the last check before the collapse.

    Args:
        drop: fall that counts as a collapse, in (0, 1]; 0.2 in the paper.

    Raises:
        UserError: for a drop outside (0, 1].

    Example:
        >>> alarm = CatastrophicOverfitting()
        >>> [alarm.update(accuracy) for accuracy in (0.30, 0.41, 0.35, 0.02)]
        [False, False, False, True]
    """

    def __init__(self, drop: float = 0.2) -> None:
        if not 0 < drop <= 1:
            raise UserError(f"drop={drop} is a fall of the robust accuracy between 0 and 1, for example 0.2")
        self.drop = drop
        self.last: float | None = None

    def update(self, robust_accuracy: float) -> bool:
        """Take the next robust accuracy, in [0, 1], and say whether it is a collapse."""
        if not 0 <= robust_accuracy <= 1:
            raise UserError(f"robust_accuracy={robust_accuracy} is a share of images in [0, 1]")
        collapsed = self.last is not None and self.last - robust_accuracy > self.drop
        self.last = robust_accuracy
        return collapsed

    def state_dict(self) -> dict[str, float | None]:
        """What a resumed run needs."""
        return {"last": self.last}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Go on from :meth:`state_dict`."""
        self.last = state["last"]

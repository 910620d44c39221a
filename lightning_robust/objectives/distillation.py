"""Training on a teacher's soft labels (Papernot et al., arXiv 1511.04508), and what all such objectives share."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from lightning_robust.attacks import Attack
from lightning_robust.attacks.context import Model
from lightning_robust.errors import UserError
from lightning_robust.objectives.awp import AWP
from lightning_robust.objectives.base import Objective, ObjectiveOutput, Perturbed, check_share
from lightning_robust.objectives.losses import cross_entropy, full_precision


class SoftLabels(NamedTuple):
    """What a teacher says of the clean images of a batch.

    Attributes:
        logits: ``(N, K)`` of the teacher, as they are.
        temperature: T > 0: its soft labels are softmax(logits / T).
    """

    logits: Tensor
    temperature: float

    @property
    def probabilities(self) -> Tensor:
        """softmax(logits / T), ``(N, K)``."""
        return self.tempered(self.logits).softmax(1)

    def tempered(self, logits: Tensor) -> Tensor:
        """Logits divided by T, in float32 at least."""
        return full_precision(logits) / self.temperature


def soft_cross_entropy(logits: Tensor, soft: SoftLabels) -> Tensor:
    """-Σ_i q_i log p_i with q = softmax(teacher / T) and p = softmax(logits / T), mean over the batch."""
    return -(soft.probabilities * soft.tempered(logits).log_softmax(1)).sum(1).mean()


class DistillationObjective(Objective):
    """An objective that needs a teacher's logits of the clean images.

    They are given with the batch: ``objective(model, images, labels, seed=0, teacher_logits=..., temperature=...)``;
    :class:`~lightning_robust.modules.DistilledClassifier` does that. Subclasses fill in :meth:`distil`, and
    :meth:`perturb_from` where their attack looks at the soft labels, too.
    """

    @abstractmethod
    def distil(
        self, model: Model, images: Tensor, labels: Tensor, perturbed: Perturbed, soft: SoftLabels
    ) -> ObjectiveOutput:
        """The loss, by forward passes in the model's present mode; arguments as in :meth:`Objective.loss`."""

    def perturb_from(
        self, model: Model, images: Tensor, labels: Tensor, soft: SoftLabels, *, seed: int, mask: Tensor | None = None
    ) -> Perturbed:
        """Adversarial images of a batch; by default those of :attr:`attack`, which does not look at the teacher."""
        return super().perturb(model, images, labels, seed=seed, mask=mask)

    def loss(self, model: Model, images: Tensor, labels: Tensor, perturbed: Perturbed) -> ObjectiveOutput:
        """Not without a teacher.

        Raises:
            UserError: always.
        """
        raise self._without_teacher()

    def __call__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        seed: int,
        mask: Tensor | None = None,
        stand_in: Model | None = None,
        epoch: int = 0,
        teacher_logits: Tensor | None = None,
        temperature: float = 1.0,
    ) -> ObjectiveOutput:
        """As :meth:`Objective.__call__`, with what the teacher says.

        Args:
            model: as there.
            images: as there.
            labels: as there.
            seed: as there.
            mask: as there.
            stand_in: as there.
            epoch: as there.
            teacher_logits: ``(N, K)`` the teacher's logits of the clean images; no gradient goes through them.
            temperature: T > 0 that the logits of both are divided by.

        Raises:
            UserError: without the teacher's logits, and where they do not fit the batch.
        """
        if teacher_logits is None:
            raise self._without_teacher()
        if teacher_logits.dim() != 2 or len(teacher_logits) != len(images):
            raise UserError(
                f"{type(self).__name__}: teacher_logits of shape {tuple(teacher_logits.shape)} for {len(images)} "
                "images: they are (N, classes)"
            )
        given = _WithTeacher(self, SoftLabels(teacher_logits.detach(), temperature))
        return given(model, images, labels, seed=seed, mask=mask, stand_in=stand_in, epoch=epoch)

    def _without_teacher(self) -> UserError:
        return UserError(
            f"{type(self).__name__} trains on a teacher's soft labels, and there is no teacher: set model.class_path "
            "to DistilledClassifier"
        )


class _WithTeacher(Objective):
    """An objective with the soft labels of one batch: what the steps of :class:`Objective` are taken on."""

    def __init__(self, objective: DistillationObjective, soft: SoftLabels) -> None:
        self.objective, self.soft, self.awp = objective, soft, objective.awp

    @property
    def attack(self) -> Attack | None:
        return self.objective.attack

    def perturb(
        self, model: Model, images: Tensor, labels: Tensor, *, seed: int, mask: Tensor | None = None
    ) -> Perturbed:
        return self.objective.perturb_from(model, images, labels, self.soft, seed=seed, mask=mask)

    def loss(self, model: Model, images: Tensor, labels: Tensor, perturbed: Perturbed) -> ObjectiveOutput:
        return self.objective.distil(model, images, labels, perturbed, self.soft)


@dataclass(frozen=True, kw_only=True)
class Distillation(DistillationObjective):
    """Cross-entropy with the teacher's soft labels at temperature T; one forward pass.

    (1 - w) · CE(softmax(z/T), softmax(z_teacher/T)) + w · CE(softmax(z/T), y). With w = 0, both networks trained at the
    same T and the student deployed at 1 this is *defensive distillation* (Papernot et al., arXiv 1511.04508), which is
    **broken** (arXiv 1607.04311, 1608.04644): it makes no image harder to attack, it blows the logits up by about T, so
    that the softmax saturates and its gradient underflows. Attack such a model on logits / T.

    The gradient with respect to the logits falls with T: SGD needs a learning rate that rises with it; Adam does not.

    Args:
        hard_label_weight: w, share of the true labels in [0, 1); 0 in the paper.
        awp: adversarial weight perturbation.

    Raises:
        UserError: for a share outside [0, 1).

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
        >>> images, labels = torch.rand(2, 1, 2, 2), torch.tensor([0, 2])
        >>> output = Distillation()(model, images, labels, seed=0, teacher_logits=torch.rand(2, 3), temperature=20.0)
        >>> output.loss.shape, output.images_adv
        (torch.Size([]), None)
    """

    hard_label_weight: float = 0.0
    awp: AWP | None = None

    def __post_init__(self) -> None:
        check_share(self, "hard_label_weight", self.hard_label_weight)

    def distil(
        self, model: Model, images: Tensor, labels: Tensor, perturbed: Perturbed, soft: SoftLabels
    ) -> ObjectiveOutput:
        """(1 - w) · CE(f_T(x), teacher_T(x)) + w · CE(f_T(x), y)."""
        logits = model(images)
        loss = soft_cross_entropy(logits, soft)
        if self.hard_label_weight > 0:
            hard = cross_entropy(soft.tempered(logits), labels)
            loss = (1 - self.hard_label_weight) * loss + self.hard_label_weight * hard
        detached = logits.detach()
        return ObjectiveOutput(loss, logits=detached, clean_logits=detached)

"""Distillation: a teacher, and a student that learns from its soft labels."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from lightning_robust.attacks.acceleration import Accelerated
from lightning_robust.attacks.adaptive import Temperature
from lightning_robust.attacks.randomness import mix_seed
from lightning_robust.batch import Batch, as_batch
from lightning_robust.metrics import ClassificationScore
from lightning_robust.modules.distilled_phases import TaughtClassifier
from lightning_robust.modules.distilled_settings import check_settings
from lightning_robust.modules.teacher import Blueprint
from lightning_robust.objectives import (
    Distillation,
    DistillationObjective,
    Natural,
    Objective,
    ObjectiveOutput,
    from_config,
    to_config,
)

_BROKEN = (
    "defensive distillation is no defense: it hides gradients (arXiv 1607.04311) and falls to every attack on the "
    "logits (arXiv 1608.04644); measure it with DistillationStudy (study/distillation), never with softmax losses alone"
)


class DistilledClassifier(TaughtClassifier):
    """A student trained on a teacher's soft labels. As a defense ("defensive distillation") this is **broken**.

    Papernot et al. (arXiv 1511.04508) train a teacher on hard labels with its logits divided by a temperature T, train
    a student of the same architecture at the same T on softmax(teacher / T), and deploy the student at T = 1. Carlini
    and Wagner showed that nothing is gained: training at T blows the logits up by about T, the softmax saturates at
    T = 1 and its gradient underflows, which stops attacks that follow it and no other (arXiv 1607.04311, 1608.04644).
    It is here to be studied: see :class:`~lightning_robust.callbacks.DistillationStudy`. Distillation of *robustness*
    from an adversarially trained teacher is another thing: set the objective to
    :class:`~lightning_robust.objectives.ARD` or :class:`~lightning_robust.objectives.RSLAD`.

    The teacher comes from a file (``teacher``), or the same run trains it (``teacher_epochs``): the first epochs train
    the teacher alone, the rest the student, each with a learning-rate schedule of its own. Both phases can be resumed.
    What a callback measures is always the student, as is ``val/acc``; the teacher's progress is ``train/teacher_loss``,
    ``train/teacher_acc``, ``val/teacher_loss`` and ``val/teacher_acc`` (losses at T). At the end of its phase the
    teacher is written to ``checkpoints/teacher.ckpt``, a checkpoint of :class:`ImageClassifier`. From then on it is
    frozen, in eval mode, and in no checkpoint: those hold its file's SHA-256, and a resumed run takes it from the file.

    Args:
        network: the student, see :class:`ImageClassifier`.
        num_classes: see there.
        image_shape: see there.
        objective: how the student is trained: Distillation, ARD or RSLAD, of ours or of your own.
        temperature: T > 0, of teacher and student in training; 20 to 100 is "defensive", 1 plain distillation.
        teacher: file of a trained teacher: a checkpoint of a run, or plain weights.
        teacher_epochs: in place of a file: train the teacher for so many of the trainer's epochs.
        teacher_network: the teacher's network; by default what its file says, or else as the student's.
        teacher_args: further arguments of ``teacher_network``; by default the student's where that is the same network.
        teacher_objective: how the same run trains its teacher; the logits it sees are divided by T.
        soft_labels: "cached": the teacher's logits of all training images are computed once; refused where
            augmentation changes the images. "on_the_fly": the teacher is asked in every step. "auto": cached where that
            is right and cheap (images in memory, not augmented).
        **kwargs: as :class:`ImageClassifier`.

    Raises:
        UserError: for settings, files and teachers that do not exist or do not fit.
    """

    def __init__(
        self,
        network: str | nn.Module = "resnet18",
        num_classes: int = 10,
        image_shape: tuple[int, int, int] = (3, 32, 32),
        objective: Objective = Distillation(),  # noqa: B008 - objectives are frozen
        temperature: float = 1.0,
        teacher: str | None = None,
        teacher_epochs: int = 0,
        teacher_network: str | nn.Module | None = None,
        teacher_args: dict[str, Any] | None = None,
        teacher_objective: Objective = Natural(),  # noqa: B008 - frozen
        soft_labels: Literal["auto", "cached", "on_the_fly"] = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(network, num_classes, image_shape, objective=objective, **kwargs)
        self.teacher_objective: Objective = from_config(teacher_objective)
        self.temperature, self.teacher_epochs = float(temperature), int(teacher_epochs)
        self.soft_labels: str = soft_labels
        self.teacher_file = teacher
        check_settings(self)
        same = teacher_network is None or teacher_network == self.hparams["network"]
        blueprint = Blueprint(
            network=teacher_network,
            student=self.network,
            student_name=self.hparams["network"],
            num_classes=self.num_classes,
            image_shape=self.image_shape,
            network_args=dict(self.hparams["network_args"] if teacher_args is None and same else teacher_args or {}),
        )
        self.save_hyperparameters(
            {
                "temperature": self.temperature,
                "teacher": teacher,
                "teacher_epochs": self.teacher_epochs,
                "teacher_network": teacher_network if isinstance(teacher_network, str) else None,
                "teacher_args": teacher_args,
                "teacher_objective": to_config(self.teacher_objective),
                "soft_labels": soft_labels,
            }
        )
        self._expect_teacher(blueprint)
        for stage in ("train", "val"):
            self.scores[f"{stage}_teacher_score"] = ClassificationScore()

    def setup(self, stage: str) -> None:
        """Say what is known of such a training, and get the teacher.

        Raises:
            UserError: if there is none, or it does not fit.
        """
        if stage == "fit" and isinstance(self.objective, Distillation) and self.temperature > 1:
            rank_zero_warn(f"temperature={self.temperature:g}: {_BROKEN}")
        super().setup(stage)

    # -- training ------------------------------------------------------------------------------------------------------

    def training_output(self, images: Tensor, labels: Tensor, batch_idx: int) -> ObjectiveOutput:
        """A step of whichever is trained: on the labels, or on what the teacher says."""
        seed = mix_seed(self.seed, self.current_epoch, batch_idx)
        if self.apprentice is not None:
            objective = self.teacher_objective
            return objective(
                Temperature(self.apprentice, self.temperature),
                images,
                labels,
                seed=seed,
                stand_in=self.attack_model() if objective.attack is not None else None,
                epoch=self.current_epoch,
            )
        assert isinstance(self.objective, DistillationObjective)
        return self.objective(
            self.network,
            images,
            labels,
            seed=seed,
            stand_in=self.attack_model() if self.objective.attack is not None else None,
            epoch=self.current_epoch,
            teacher_logits=self._teacher[0](images),
            temperature=self.temperature,
        )

    def attack_model(self) -> nn.Module:
        """What an attack may run on while it trains: a stand-in of the student, or of the teacher at T."""
        if self.apprentice is None:
            return super().attack_model()
        if self.attack_acceleration == "none":
            return Temperature(self.apprentice, self.temperature)
        if not self._stand_in:
            dtype = torch.bfloat16 if self.attack_acceleration == "bf16" else None
            self._stand_in.append(Accelerated(Temperature(self.apprentice, self.temperature), dtype=dtype))
        else:
            self._stand_in[0].refresh()
        return self._stand_in[0]

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and accuracy on clean images, of a teacher in training, too."""
        super().validation_step(batch, batch_idx)
        if self.apprentice is not None:
            images, labels, _ = as_batch(batch)
            logits = self.apprentice(images) / self.temperature
            self._count("val_teacher", logits, labels, F.cross_entropy(logits, labels, reduction="none"))

    def _score(self, stage: str) -> Metric:
        return super()._score(self._of_whom(stage))

    def _log_score(self, stage: str) -> None:
        whom = self._of_whom(stage)
        if whom == stage:
            super()._log_score(stage)
        if self.apprentice is None or stage == "test":
            return
        score: Any = self._score(f"{stage}_teacher")
        values = score.compute()  # on every rank
        if score.total:
            found = {f"{stage}/teacher_loss": values["loss"], f"{stage}/teacher_acc": values["acc"]}
            self.log_dict(found, prog_bar=True, rank_zero_only=False)
        score.reset()

    def _of_whom(self, stage: str) -> str:
        return "train_teacher" if stage == "train" and self.apprentice is not None else stage

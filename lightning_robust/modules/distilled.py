"""Distillation: a teacher, and a student that learns from its soft labels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from lightning_robust.attacks.acceleration import Accelerated
from lightning_robust.attacks.adaptive import Temperature
from lightning_robust.attacks.randomness import mix_seed
from lightning_robust.batch import Batch, as_batch
from lightning_robust.errors import UserError
from lightning_robust.metrics import ClassificationScore
from lightning_robust.modules.classifier import _CHECKPOINT_KEY, ImageClassifier
from lightning_robust.modules.distilled_settings import check_settings
from lightning_robust.modules.phases import begin_phase, require_phases
from lightning_robust.modules.soft_labels import Teacher, why_not_cached
from lightning_robust.modules.teacher import (
    Blueprint,
    TeacherNote,
    checksum,
    find_teacher,
    load_teacher,
    places_beside,
    run_file,
    save_teacher,
    share_file,
    teacher_settings,
)
from lightning_robust.objectives import (
    Distillation,
    DistillationObjective,
    Natural,
    Objective,
    ObjectiveOutput,
    from_config,
    to_config,
)

_TEACHER_DRAW = 0x7EAC  # tells the teacher's first weights from other draws of the seed
_BROKEN = (
    "defensive distillation is no defense: it hides gradients (arXiv 1607.04311) and falls to every attack on the "
    "logits (arXiv 1608.04644); measure it with DistillationStudy (study/distillation), never with softmax losses alone"
)


class DistilledClassifier(ImageClassifier):
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
        self._blueprint = Blueprint(
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
        for stage in ("train", "val"):
            self.scores[f"{stage}_teacher_score"] = ClassificationScore()
        self.apprentice: nn.Module | None = None  # the teacher while it is trained itself
        self._own_epochs = 0  # of the running fit that trained or train the teacher
        self._waiting: list[nn.Parameter] = []  # of the student, while the teacher is trained
        self._teacher: list[Teacher] = []  # in a list, so that its weights are not saved
        self._note: TeacherNote | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the module (of an evaluation, of weight averaging) needs no teacher."""
        return {**super().__getstate__(), "_teacher": [], "_waiting": []}

    # -- where the teacher comes from ----------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Get the teacher, or make the one that this run is to train, before anything moves to a device.

        Raises:
            UserError: if there is none, or it does not fit.
        """
        if stage != "fit":
            return
        if isinstance(self.objective, Distillation) and self.temperature > 1:
            rank_zero_warn(f"temperature={self.temperature:g}: {_BROKEN}")
        if self._teacher:  # of an earlier fit of this object
            self._own_epochs = 0
        elif self.teacher_file is not None:
            self._take(Path(self.teacher_file))
        elif self.teacher_epochs > 0:
            require_phases(self.trainer, self.teacher_epochs)
            self._own_epochs = self.teacher_epochs
            self._make_apprentice()
        else:
            raise UserError(
                "DistilledClassifier has no teacher: give the file of one as --model.teacher, or let this run train it "
                "with --model.teacher_epochs"
            )

    def _take(self, file: Path, note: TeacherNote | None = None) -> None:
        self._note = note or TeacherNote(str(file), checksum(file) if file.is_file() else "")
        self._teacher = [Teacher(load_teacher(file, self._blueprint))]

    def _make_apprentice(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix_seed(self.seed, _TEACHER_DRAW) % 2**63)
            apprentice = self._blueprint.build()
        self.apprentice = apprentice.requires_grad_(True).train().to(device=self.device)
        # DDP waits for the gradient of everything that asks for one
        self._waiting = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        for parameter in self._waiting:
            parameter.requires_grad_(False)

    def _dismiss_apprentice(self) -> None:
        self.apprentice = None
        for parameter in self._waiting:
            parameter.requires_grad_(True)
        self._waiting = []
        self._stand_in.clear()

    # -- the two phases ------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimizer and schedule of the phase: of what asks for gradients, over the phase's own steps."""
        steps = self._steps() if self._own_epochs else 0  # before the template lets the loader be made again
        configured: Any = super().configure_optimizers()
        if self._own_epochs:
            schedule = self.schedule_settings.build(configured["optimizer"], steps)
            configured["lr_scheduler"]["scheduler"] = schedule
        return configured

    def _steps(self) -> int:
        """Optimizer steps of the phase that runs."""
        total = self.trainer.estimated_stepping_batches
        if total == math.inf:
            return 1  # the schedule is constant
        an_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        teachers = min(an_epoch * self._own_epochs, int(total))
        return max(teachers if self.apprentice is not None else int(total) - teachers, 1)

    def on_train_start(self) -> None:
        """Bring the teacher to the student's device; go on counting an epoch that was resumed inside."""
        super().on_train_start()
        if self._teacher:
            if self._own_epochs and self._note is not None:  # resumed, perhaps into another folder
                self._note = share_file(self.trainer, self._note)
            self._settle()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Let the student begin where the teacher's epochs are over, and tie draws to the batch."""
        # not at the epoch's start, which a run has not that is resumed from the last batch of the one before
        if self.apprentice is not None and self.current_epoch >= self._own_epochs:
            self._begin_student(self.apprentice)
        super().on_train_batch_start(batch, batch_idx)

    def _begin_student(self, teacher: nn.Module) -> None:
        for buffer in teacher.buffers():  # BatchNorm's statistics are each rank's own
            buffer.copy_(self.trainer.strategy.broadcast(buffer))
        file = run_file(self.trainer)
        digest = ""
        if self.trainer.is_global_zero:
            digest = save_teacher(file, teacher, teacher_settings(self.hparams, self._blueprint))
        self._note = self.trainer.strategy.broadcast(TeacherNote(str(file), digest))
        self._dismiss_apprentice()
        self._teacher = [Teacher(teacher)]
        optimizer = self.optimizer_settings.build(self)
        begin_phase(self, optimizer, self.schedule_settings.build(optimizer, self._steps()))
        rank_zero_info(f"The teacher is trained, and written to {file}: the student begins")
        self._settle()

    def _settle(self) -> None:
        """The teacher on the device, and its soft labels in the cache where they may be."""
        (teacher,) = self._teacher
        dtype = next(self.network.parameters()).dtype
        teacher.to(self.device, dtype)
        if self.soft_labels == "on_the_fly":
            return
        datamodule = getattr(self.trainer, "datamodule", None)
        reason = why_not_cached(datamodule, self.num_classes, asked_for=self.soft_labels == "cached")
        if reason is None:
            teacher.remember(datamodule.dataset("train"), self.device, dtype)  # type: ignore[union-attr]
        elif self.soft_labels == "cached":
            raise UserError(
                f"soft_labels=cached: {reason}: set soft_labels to on_the_fly or auto, or augmentation to none"
            )
        else:
            rank_zero_info(f"Soft labels on the fly: {reason}")

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

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the phase, and which file the teacher is in; the teacher itself only while it is trained."""
        super().on_save_checkpoint(checkpoint)
        note = self._note
        checkpoint[_CHECKPOINT_KEY]["distillation"] = {
            "phase": "teacher" if self.apprentice is not None else "student",
            "own_epochs": self._own_epochs,
            "teacher": None if note is None else {"file": note.file, "sha256": note.sha256},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on in the checkpoint's phase, with the teacher of its file.

        Raises:
            UserError: for a checkpoint of another class or network, and a teacher's file that is gone or changed.
        """
        noted = checkpoint.get(_CHECKPOINT_KEY, {}).get("distillation")
        fitting = self._trainer is not None and self.trainer.state.fn == "fit"
        if noted is not None and fitting:
            self._resume(noted)
        weights, mine = checkpoint["state_dict"], "apprentice."
        if self.apprentice is None:  # what is evaluated is the student
            checkpoint["state_dict"] = {name: value for name, value in weights.items() if not name.startswith(mine)}
        elif not any(name.startswith(mine) for name in weights):
            kept = {name: value for name, value in self.state_dict().items() if name.startswith(mine)}
            checkpoint["state_dict"] = {**weights, **kept}
        super().on_load_checkpoint(checkpoint)

    def _resume(self, noted: dict[str, Any]) -> None:
        self._own_epochs = int(noted["own_epochs"])
        if noted["phase"] == "teacher":
            if self.apprentice is None:
                raise UserError(
                    "the checkpoint is of a run that was still training its own teacher: give --model.teacher_epochs "
                    "as it had, and no --model.teacher"
                )
            return
        if self.apprentice is not None:
            self._dismiss_apprentice()
        note = TeacherNote(**noted["teacher"])
        places = places_beside(self.teacher_file, self.trainer.ckpt_path)
        file = find_teacher(note, places)
        self._take(file, TeacherNote(str(file), note.sha256))

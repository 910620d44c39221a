"""Teacher and student in one fit: where the teacher comes from, when the student begins, what a checkpoint says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import nn

from lightning_robust.attacks.randomness import mix_seed
from lightning_robust.batch import Batch
from lightning_robust.errors import UserError
from lightning_robust.modules.classifier import _CHECKPOINT_KEY, ImageClassifier
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

_TEACHER_DRAW = 0x7EAC  # tells the teacher's first weights from other draws of the seed


class TaughtClassifier(ImageClassifier):
    """A student with a teacher: what :class:`~lightning_robust.modules.DistilledClassifier` is besides its loss.

    The teacher is taken from its file, or trained first. While that goes on it is :attr:`apprentice`, a submodule, and
    the student's parameters wait; then it is written to its file, frozen, and no part of any checkpoint any more.

    The constructor of a subclass sets ``teacher_file``, ``teacher_epochs`` and ``soft_labels``, and calls
    :meth:`_expect_teacher`.

    Attributes:
        apprentice: the teacher while it is trained itself, else ``None``.
    """

    teacher_file: str | None
    teacher_epochs: int
    soft_labels: str
    apprentice: nn.Module | None

    def _expect_teacher(self, blueprint: Blueprint) -> None:
        """Nobody is there yet.

        Args:
            blueprint: what the teacher is made of, and must agree with.
        """
        self._blueprint = blueprint
        self.apprentice = None
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

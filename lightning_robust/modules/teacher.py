"""The file of a distillation's teacher: written, found again, and checked before it is believed."""

from __future__ import annotations

import copy
import hashlib
import io
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from lightning_robust.callbacks.measurement import run_folder
from lightning_robust.errors import UserError
from lightning_robust.models import Normalized, create_network, load_weights
from lightning_robust.modules.classifier import _CHECKPOINT_KEY, _mean_and_std
from lightning_robust.report import atomic_file

FILE_NAME = "teacher.ckpt"


@dataclass(frozen=True)
class TeacherNote:
    """What a student's checkpoint says of its teacher, in place of the teacher's weights.

    Attributes:
        file: where it was.
        sha256: of the file's bytes.
    """

    file: str
    sha256: str


@dataclass(frozen=True)
class Blueprint:
    """What a teacher is made of where its file does not say, and what it must agree with.

    Attributes:
        network: name or module; ``None``: what the file says.
        student: the student's network.
        student_name: its name, ``None`` for a network of one's own.
        num_classes: of the student.
        image_shape: of the student.
        network_args: of the teacher's network.
    """

    network: str | nn.Module | None
    student: nn.Module
    student_name: str | None
    num_classes: int
    image_shape: tuple[int, int, int]
    network_args: dict[str, Any] = field(default_factory=dict)

    def build(self, name: str | None = None, arguments: dict[str, Any] | None = None) -> nn.Module:
        """A network with fresh weights and the student's normalisation; one's own is copied.

        Args:
            name: of the network; default :attr:`network`, or else the student's own.
            arguments: of it.
        """
        chosen = self.network if name is None else name
        if isinstance(chosen, nn.Module):
            return copy.deepcopy(chosen)
        chosen = chosen or self.student_name
        if chosen is None:
            return copy.deepcopy(self.student)
        mean, std = self.student.normalization if isinstance(self.student, Normalized) else (None, None)
        arguments = self.network_args if arguments is None else arguments
        return create_network(chosen, self.num_classes, self.image_shape, mean=mean, std=std, **arguments)


def checksum(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def load_teacher(file: Path, blueprint: Blueprint) -> nn.Module:
    """A teacher from its file: frozen, in eval mode, in the precision that it was saved in.

    A checkpoint of one of our runs (and the file of a teacher trained in the same run) says what its network is; of a
    plain file of weights it is the teacher network that was named, or else the student's.

    Args:
        file: the file.
        blueprint: see there.

    Raises:
        UserError: for a file that is missing, broken or holds code, for a teacher of other classes, images or
            normalisation than the student's, and for weights that do not fit.
    """
    if not file.is_file():
        raise UserError(f"teacher {file}: there is no such file; give a checkpoint of a run or a file of weights")
    settings = _settings(file)
    for what, ours in (("num_classes", blueprint.num_classes), ("image_shape", list(blueprint.image_shape))):
        theirs = settings.get(what)
        if theirs is not None and theirs != ours:
            raise UserError(
                f"teacher {file} was trained with {what} {theirs} and the student has {ours}: soft labels are of the "
                "same classes and images; give a teacher trained on this data"
            )
    name = settings.get("network") if blueprint.network is None else None
    teacher = blueprint.build(name, settings.get("network_args") or {} if name is not None else None)
    dtype = settings.get("dtype")
    if dtype is not None:
        teacher.to(dtype)
    try:
        load_weights(teacher, file)
    except UserError as error:
        raise UserError(f"teacher: {error}") from error
    _check_normalization(file, settings, blueprint)
    return teacher.eval().requires_grad_(False)


def save_teacher(file: Path, teacher: nn.Module, settings: dict[str, Any]) -> str:
    """Write a teacher so that it is a checkpoint of :class:`~lightning_robust.modules.ImageClassifier`.

    Args:
        file: where to.
        teacher: its network.
        settings: the hyper-parameters of such a classifier.

    Returns:
        SHA-256 of the file.
    """
    held = io.BytesIO()  # given a path, torch.save writes its name into the file, and a temporary one is random
    weights = {f"network.{name}": value.detach().cpu() for name, value in teacher.state_dict().items()}
    torch.save(
        {
            "state_dict": weights,
            "hyper_parameters": settings,
            _CHECKPOINT_KEY: {"class": "ImageClassifier"},
            "pytorch-lightning_version": pl.__version__,
        },
        held,
    )
    with atomic_file(file) as temporary:
        temporary.write_bytes(held.getvalue())
    return hashlib.sha256(held.getvalue()).hexdigest()


def teacher_settings(student: Mapping[str, Any], blueprint: Blueprint) -> dict[str, Any]:
    """The hyper-parameters of a classifier that is the teacher.

    Args:
        student: those of the student.
        blueprint: of the teacher.
    """
    named = blueprint.network
    network = student["network"] if named is None else named if isinstance(named, str) else None
    own = ("teacher", "temperature", "soft_labels")
    kept = {name: value for name, value in student.items() if not name.startswith(own)}
    changed = {"network": network, "network_args": blueprint.network_args, "objective": student["teacher_objective"]}
    return kept | changed


def places_beside(given: str | None, checkpoint: str | Path | None) -> list[Path]:
    """Where the teacher of a student's checkpoint may lie, the likeliest first.

    Args:
        given: the user's word.
        checkpoint: the student's checkpoint.
    """
    if given is not None:
        return [Path(given)]
    if checkpoint is None:
        return []
    folder = Path(checkpoint).parent  # a requeued job's checkpoint lies above the others
    return [folder / FILE_NAME, folder / "checkpoints" / FILE_NAME]


def find_teacher(note: TeacherNote, places: Iterable[Path]) -> Path:
    """The file that a student's checkpoint was made with.

    Args:
        note: what the checkpoint says.
        places: files to look at, the likeliest first; the one in the note comes last.

    Raises:
        UserError: if there is none, or it changed since.
    """
    found = [file for file in (*places, Path(note.file)) if file.is_file()]
    if not found:
        raise UserError(
            f"the teacher's file {note.file} is gone, and the student's checkpoint does not hold the teacher: put it "
            "back, or give where it is as --model.teacher"
        )
    for file in found:
        if checksum(file) == note.sha256:
            return file
    raise UserError(
        f"the teacher's file {found[0]} changed since the student's checkpoint was written (its SHA-256 was "
        f"{note.sha256[:12]}… and is {checksum(found[0])[:12]}…): put the old one back, or train the student from the "
        "start without --ckpt_path"
    )


def _settings(file: Path) -> dict[str, Any]:
    """What a checkpoint says of its network; nothing for a plain file of weights."""
    if file.suffix == ".safetensors":
        return {}
    try:
        held = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # damaged bytes raise nearly any exception there is, and load_weights says it readably
        return {}
    if not isinstance(held, dict) or "state_dict" not in held:
        return {}
    noted = held.get(_CHECKPOINT_KEY) or {}
    if isinstance(noted, dict) and (noted.get("distillation") or {}).get("phase") == "teacher":
        raise UserError(
            f"teacher {file} is a checkpoint of a run that was still training its own teacher: give the "
            f"{FILE_NAME} that it wrote, or a later checkpoint"
        )
    settings = dict(held.get("hyper_parameters") or {})
    floats = [value.dtype for value in held["state_dict"].values() if value.is_floating_point()]
    return settings | ({"dtype": floats[0]} if floats else {})


def _check_normalization(file: Path, settings: dict[str, Any], blueprint: Blueprint) -> None:
    """Refuse a teacher that says of itself that it was trained with another one."""
    if "normalization" not in settings or not isinstance(blueprint.student, Normalized):
        return
    channels = blueprint.image_shape[0]

    def spread(mean: Any, std: Any) -> list[list[float]]:
        values = ((0.0,) if mean is None else mean, (1.0,) if std is None else std)
        return [[float(number) for number in (list(each) * channels)[:channels]] for each in values]

    theirs = spread(*_mean_and_std(settings["normalization"]))
    ours = spread(*blueprint.student.normalization)
    if theirs != ours:
        raise UserError(
            f"teacher {file} was trained with the normalization {settings['normalization']} and the student has mean "
            f"{ours[0]} and std {ours[1]}: set --model.normalization as the teacher's"
        )


def run_file(trainer: pl.Trainer) -> Path:
    """Where a run keeps the teacher that it trained; ranks other than zero may not know it."""
    return (run_folder(trainer) or Path(trainer.default_root_dir)) / "checkpoints" / FILE_NAME


def share_file(trainer: pl.Trainer, note: TeacherNote) -> TeacherNote:
    """Let a run that was resumed into another folder have the teacher's file there, too; call it on every rank."""
    wanted = run_file(trainer)
    if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        if not wanted.is_file():
            with atomic_file(wanted) as temporary:
                shutil.copyfile(note.file, temporary)
        if checksum(wanted) == note.sha256:  # or else it is that of another teacher, which stays
            note = TeacherNote(str(wanted), note.sha256)
    found: TeacherNote = trainer.strategy.broadcast(note)
    return found

"""What a distillation cannot be set to."""

from __future__ import annotations

import math
from typing import Protocol

from lightning_robust.errors import UserError
from lightning_robust.objectives import DistillationObjective, Objective


class Settings(Protocol):
    """What is looked at of :class:`~lightning_robust.modules.DistilledClassifier`, where each is explained."""

    objective: Objective
    teacher_objective: Objective
    temperature: float
    teacher_epochs: int
    teacher_file: str | None
    soft_labels: str


def check_settings(module: Settings) -> None:
    """Refuse settings that make no distillation.

    Raises:
        UserError: naming the setting and the mend.
    """
    if not isinstance(module.objective, DistillationObjective):
        raise UserError(
            f"DistilledClassifier: the objective {type(module.objective).__name__} has no teacher: choose "
            "Distillation, ARD or RSLAD, or set model.class_path to ImageClassifier"
        )
    if isinstance(module.teacher_objective, DistillationObjective):
        raise UserError(
            f"DistilledClassifier: teacher_objective={type(module.teacher_objective).__name__} would need a teacher "
            "of its own: choose Natural, PGDAdversarial, TRADES or another that trains on labels"
        )
    if not 0 < module.temperature < math.inf:
        raise UserError(
            f"DistilledClassifier: temperature={module.temperature:g}: logits are divided by it: give a positive "
            "number, for example 20"
        )
    if module.teacher_epochs < 0:
        raise UserError(f"DistilledClassifier: teacher_epochs={module.teacher_epochs}: 0 or more epochs")
    if module.soft_labels not in ("auto", "cached", "on_the_fly"):
        raise UserError(f"DistilledClassifier: soft_labels={module.soft_labels!r}: auto, cached or on_the_fly")
    if module.teacher_file is not None and module.teacher_epochs > 0:
        raise UserError(
            "DistilledClassifier: teacher and teacher_epochs are two sources of one teacher: give the file, or "
            "the epochs in which this run trains it"
        )

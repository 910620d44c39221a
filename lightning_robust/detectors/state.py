"""A detector's state as plain values, and its file."""

from __future__ import annotations

import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from lightning_robust.detectors.calibration import Calibration
from lightning_robust.detectors.image_mutation import ImageMutation
from lightning_robust.detectors.model_mutation import ModelMutation
from lightning_robust.detectors.mutation import Mutation
from lightning_robust.errors import UserError

_FORMAT = 1
_MUTATIONS: dict[str, type[Mutation]] = {kind.__name__: kind for kind in (ImageMutation, ModelMutation)}


def to_state(mutation: Mutation, settings: dict[str, Any], found: Calibration, expected: str) -> dict[str, Any]:
    """Everything that a detector is, in types that load with ``weights_only=True``."""
    return {
        "mutation_testing_detector": _FORMAT,
        "mutation": {"class": type(mutation).__name__, **asdict(mutation)},  # type: ignore[call-overload]
        "settings": dict(settings),
        "calibration": {**asdict(found), "chosen": torch.tensor(found.chosen)},
        "model": expected,
    }


def from_state(state: dict[str, Any]) -> tuple[Mutation, dict[str, Any], Calibration, str]:
    """Mutation, settings, calibration and the model's fingerprint.

    Raises:
        UserError: for anything that :func:`to_state` does not give.
    """
    if not isinstance(state, dict) or "mutation_testing_detector" not in state:
        raise UserError("this is no state of a MutationTestingDetector: give a file that its save() has written")
    if state["mutation_testing_detector"] != _FORMAT:
        raise UserError(
            f"this detector was saved in format {state['mutation_testing_detector']}, which is not read any more: "
            "calibrate and save it again"
        )
    try:
        values = dict(state["mutation"])
        mutation = _MUTATIONS[values.pop("class")](**values)
        calibration = {**state["calibration"], "chosen": tuple(state["calibration"]["chosen"].tolist())}
        found = Calibration(**{field.name: calibration[field.name] for field in fields(Calibration)})
        return mutation, dict(state["settings"]), found, str(state["model"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the detector's state is damaged ({error}): calibrate and save it again") from None


def write(path: str | Path, state: dict[str, Any]) -> Path:
    """Write a state: the file is there and whole, or not there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid4().hex}{path.suffix}")
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read(path: str | Path) -> dict[str, Any]:
    """Read a state without running code from the file.

    Raises:
        UserError: if the file is missing, broken, or holds code.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"detector {file}: there is no such file; MutationDetection writes them to <run>/detectors/")
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise nearly any exception there is
        reason = str(error).split("\n", 1)[0][:120]
        raise UserError(f"detector {file} cannot be read (broken, cut short or unsafe): {reason}") from None
    return state

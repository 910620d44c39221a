"""What can be said of a checkpoint before a model is made for it."""

from __future__ import annotations

from pathlib import Path

import torch

from lightning_robust.errors import UserError


def require_checkpoint(path: str | Path) -> None:
    """Refuse a file that is not a checkpoint of a run, without running code from it.

    Raises:
        UserError: if it is missing, broken, cut short, holds code, or is a plain file of weights.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"checkpoint {file}: there is no such file; runs keep theirs in <run folder>/checkpoints/")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged bytes raise nearly any exception there is
        reason = str(error).split("\n", 1)[0][:120]
        raise UserError(f"checkpoint {file} cannot be read (broken, cut short or unsafe): {reason}") from None
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(
            f"{file} is not a checkpoint of a run: give a plain file of weights to the model as weights={str(file)!r}"
        )

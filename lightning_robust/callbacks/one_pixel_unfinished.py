"""Files that a one-pixel study goes on from after it was killed."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import re
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.attacks.evolution_state import EvolutionState
from lightning_robust.callbacks.one_pixel_runs import Runs
from lightning_robust.errors import UserError
from lightning_robust.report import atomic_file

_UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, TypeError, KeyError, UserError, pickle.UnpicklingError)
_FORMAT = 1  # another one where files of before cannot be gone on from


class Unfinished:
    """Files that a killed study goes on from: one for each attack and batch, named by all that decides its result.

    Args:
        folder: where they lie; made when the first is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._used: set[Path] = set()

    def load(self, key: str) -> Runs | EvolutionState | None:
        """The results of a finished batch, the state of one that was under way, or ``None``.

        A file that cannot be read counts as none, with a warning: its batch is attacked anew.
        """
        path = self.folder / f"{key}.pt"
        if not path.is_file():
            return None
        self._used.add(path)
        # Lightning tests in inference mode, whose tensors the attack could not go on with in place
        try:
            with torch.inference_mode(False):
                saved = torch.load(path, map_location="cpu", weights_only=True)
                return Runs(**saved["runs"]) if "runs" in saved else EvolutionState.from_state_dict(saved["state"])
        except _UNREADABLE as error:
            warnings.warn(f"{path} cannot be read, its batch is attacked anew: {error!r:.120}", stacklevel=2)
            return None

    def save(self, key: str, found: Runs | EvolutionState) -> None:
        """Write results or a state, in place of what there was."""
        if isinstance(found, Runs):
            values = {"runs": {field.name: getattr(found, field.name) for field in fields(found)}}
        else:
            values = {"state": found.state_dict()}
        path = self.folder / f"{key}.pt"
        with atomic_file(path) as temporary:
            torch.save(values, temporary)
        self._used.add(path)

    def remove(self) -> None:
        """Remove the files that this study has written or read, and the folder if it is empty then."""
        for path in self._used:
            path.unlink(missing_ok=True)
        self._used.clear()
        with contextlib.suppress(OSError):  # another rank's or another study's files are in it
            self.folder.rmdir()


def fingerprint(*parts: Any) -> str:
    """16 characters for some tensors, modules and values; of a module its structure, parameters and buffers count."""
    digest = hashlib.sha256(f"{_FORMAT}".encode())
    for part in parts:
        if isinstance(part, nn.Module):
            digest.update(re.sub(r" at 0x\w+", "", repr(part)).encode())  # an address is another one in each process
            for name, value in [*part.named_parameters(), *part.named_buffers()]:
                digest.update(name.encode())
                _add(digest, value)
        elif isinstance(part, Tensor):
            _add(digest, part)
        else:
            digest.update(repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _add(digest: Any, values: Tensor) -> None:
    digest.update(f"{tuple(values.shape)} {values.dtype}".encode())
    digest.update(values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())

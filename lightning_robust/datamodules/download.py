"""What torchvision's data sets have in common: fetching them, or saying which files to put where."""

from __future__ import annotations

import http.client
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

from lightning_robust.errors import UserError


def how_to_get(name: str, missing: Sequence[Path], folder: str, form: str = "") -> str:
    """Say how to get missing files.

    Args:
        name: The data set's name.
        missing: The files that are not there, all in one folder.
        folder: The name of the data set's folder in the root.
        form: The form that the files must have, if it is not obvious.
    """
    files = ", ".join(file.name for file in missing)
    return (
        f"{name} was not found: run with --data.download true, or put {files}{form and f' ({form})'} into "
        f"{missing[0].parent}, or point --data.root at the folder that has {folder}."
    )


def download_or_explain(dataset: Any, root: str, files: Sequence[Path]) -> None:
    """Let torchvision fetch a data set.

    Args:
        dataset: The torchvision class.
        root: Folder to put it into.
        files: The files that are wanted in the end.

    Raises:
        UserError: If it cannot be fetched; the message names the files to put there by hand.
    """
    try:
        dataset(root, download=True)
    # torchvision raises RuntimeError for mirrors that fail and for files with a wrong checksum.
    except (RuntimeError, URLError, OSError, http.client.HTTPException) as error:
        names = ", ".join(file.name for file in files)
        reason = " ".join(str(error).split())
        raise UserError(
            f"{dataset.__name__} could not be downloaded ({reason}): put {names} into {files[0].parent} by hand."
        ) from error

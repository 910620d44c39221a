"""Weights & Biases: online where the user is logged in, else offline, never a question."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from urllib.parse import urlparse

from pytorch_lightning.loggers import WandbLogger


def logged_in() -> bool:
    """Whether an account is at hand, by environment or by ``wandb login``; asks nothing of the network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    file = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        entry = netrc.netrc(file).authenticators(host) if file.is_file() else None
        return entry is not None and bool(entry[2])
    except (netrc.NetrcParseError, OSError):
        return False


def wandb_logger(folder: Path, name: str, project: str, mode: str = "auto") -> WandbLogger | None:
    """The logger of a run.

    Args:
        folder: the run's folder; the files go to ``wandb/`` below it.
        name: the run's name as W&B shows it.
        project: W&B project.
        mode: "auto" (online when logged in, else offline), "online", "offline" or "off".
    """
    if mode == "off":
        return None
    # the environment's word counts too, as everywhere with W&B
    given = os.environ.get("WANDB_MODE", "")
    offline = mode == "offline" or (mode == "auto" and (given in ("offline", "dryrun") or not logged_in()))
    return WandbLogger(save_dir=str(folder), name=name, project=project, offline=offline)

"""Weights & Biases: online where the user is logged in, else offline, never a question."""

from __future__ import annotations

import netrc
import os
import secrets
import string
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loggers.logger import rank_zero_experiment
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from lightning_robust.report import atomic_file
from lightning_robust.report.secrets import mask_command, mask_settings

_ID_FILE = Path("wandb") / "run-id.txt"
_LONGEST_TAG = 64  # characters; W&B refuses longer ones


class RunWandbLogger(WandbLogger):
    """Lightning's logger, whose figures and tables stand at the step of the evaluation that made them, without secrets.

    Without a step W&B puts them at that of the number logged last, one evaluation too early. What settings and the
    command line hold of tokens and passwords is hidden (:mod:`lightning_robust.report.secrets`).

    Attributes:
        now: step of what is logged without one; :class:`~lightning_robust.callbacks.WandbRun` sets it.
    """

    now: int | None = None

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log numbers, or whatever W&B takes."""
        super().log_metrics(metrics, self.now if step is None else step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Add settings to the run's config, without their secrets."""
        super().log_hyperparams(mask_settings(vars(params) if isinstance(params, Namespace) else params))

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run, which is begun when it is first asked for."""
        if self._experiment is None:
            with _masked_command():
                return super().experiment
        return super().experiment


@contextmanager
def _masked_command() -> Iterator[None]:
    """W&B keeps the words of the process as they are when a run begins: let it see no secrets."""
    before = sys.argv
    sys.argv = [before[0], *mask_command(before[1:])] if before else before
    try:
        yield
    finally:
        sys.argv = before


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


def wandb_logger(
    folder: Path,
    name: str,
    project: str,
    mode: str = "auto",
    *,
    group: str | None = None,
    tags: Sequence[str] = (),
    job_type: str | None = None,
    run_id: str | None = None,
) -> WandbLogger | None:
    """The logger of a run.

    Args:
        folder: the run's folder; the files go to ``wandb/`` below it.
        name: the run's name as W&B shows it.
        project: W&B project.
        mode: "auto" (online when logged in, else offline), "online", "offline" or "off".
        group: runs of one group are shown and averaged together.
        tags: to filter by.
        job_type: what the run does: train, test, …
        run_id: of a W&B run to go on in. By default a new one; the agent of a sweep names its own.
    """
    if mode == "off":
        return None
    # the environment's word counts too, as everywhere with W&B
    given = os.environ.get("WANDB_MODE", "")
    offline = mode == "offline" or (mode == "auto" and (given in ("offline", "dryrun") or not logged_in()))
    if run_id is None and not os.environ.get("WANDB_RUN_ID"):
        # fit and test of a run whose ranks are forks begin it twice: by its id it is one
        run_id = generate_id()
    return RunWandbLogger(
        save_dir=str(folder.resolve()),  # W&B writes from a process of its own, whose folder may be another one
        name=name,
        project=project,
        offline=offline,
        id=run_id,
        group=group,
        tags=list(tags) or None,
        job_type=job_type,
    )


def generate_id() -> str:
    """A run's id like those that W&B makes."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def kept_id(folder: Path) -> str | None:
    """The id of the W&B run that was logged from a run's folder, if there was one."""
    file = folder / _ID_FILE
    return (file.read_text(encoding="utf-8").strip() or None) if file.is_file() else None


def note_id(folder: Path, run_id: str) -> None:
    """Keep a W&B run's id in the run's folder."""
    if kept_id(folder) != run_id:
        with atomic_file(folder / _ID_FILE) as temporary:
            temporary.write_text(run_id + "\n", encoding="utf-8")


def run_tags(command: str, settings: Mapping[str, str], given: Sequence[str] = ()) -> list[str]:
    """The tags of a run: its command, network, objective and data, and the user's own.

    Args:
        command: train, test, …
        settings: dotted name to value, as :func:`~lightning_robust.report.page.settings.flatten` makes them.
        given: the user's tags.
    """
    names = ("model", "model.network", "model.objective", "data")
    found = [command, *(settings.get(name, "") for name in names), *given]
    return list(dict.fromkeys(tag[:_LONGEST_TAG] for tag in found if tag))

"""A run's folder ``<root>/<name>/<version>/`` and its ``metrics.csv``, one row an epoch."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import Tensor

from lightning_robust.errors import UserError
from lightning_robust.report import write_csv

_ROOM = 50 * 2**20  # bytes: what a small run's checkpoints, figures and logs take


class RunLogger(Logger):
    """Owns a run's folder and writes ``metrics.csv`` there; only rank zero touches the disk.

    Args:
        root: folder of all runs.
        name: name of the run.
        version: folder below the name; by default the next free ``version_<n>``, which two runs started at once never
            share. A version that exists is refused unless ``resume``.
        resume: go on in an existing folder (the newest version that has a checkpoint, unless one is named) and keep the
            rows of its ``metrics.csv``.

    The folder is made when it is first needed. With a strategy that forks ranks (``ddp_fork``, in notebooks) call
    :meth:`prepare` before, or this process will not know the folder that its forked rank zero has made.

    Raises:
        UserError: from :meth:`prepare`, for a folder that cannot be written, is full, or belongs to another run.
    """

    def __init__(self, root: str = "runs", name: str = "run", version: str | None = None, resume: bool = False) -> None:
        super().__init__()
        self._root, self._name, self._version = Path(root), name, version
        self._resume, self._prepared = resume, False
        self._rows: dict[int, dict[str, Any]] = {}

    # -- what Lightning asks of a logger -------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The run's name."""
        return self._name

    @property
    def version(self) -> str:
        """The folder below the name.

        In a new run, ranks other than zero may not know it; Lightning tells them where it matters. In a run that is
        resumed each finds it.
        """
        self.prepare()
        if self._version is None and self._resume:
            self._version = self._newest(self._root / self._name)
        return self._version or "version_0"

    @property
    def save_dir(self) -> str:
        """Folder of all runs."""
        return str(self._root)

    @property
    def root_dir(self) -> str:
        """Folder of the runs of this name."""
        return str(self._root / self._name)

    @property
    def log_dir(self) -> str:
        """The run's folder."""
        return str(self.folder)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self._root / self._name / self.version

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the settings are in ``config.yaml``."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Put numbers into the row of their epoch; test results belong to ``results.json``."""
        values = {k: float(v) if isinstance(v, Tensor) else v for k, v in metrics.items() if not k.startswith("test/")}
        epoch = int(values.pop("epoch", max(self._rows, default=0)))
        if values:
            self._rows.setdefault(epoch, {"epoch": epoch}).update({"step": step, **values})

    @rank_zero_only
    def save(self) -> None:
        """Write ``metrics.csv``."""
        if self._rows:
            write_csv(self.folder / "metrics.csv", [self._rows[epoch] for epoch in sorted(self._rows)])

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what there is, whatever the end."""
        self.save()

    # -- the folder ----------------------------------------------------------------------------------------------------

    @rank_zero_only
    def prepare(self) -> None:
        """Make the folder, once, and prove that it can be written.

        Raises:
            UserError: if it cannot.
        """
        if self._prepared:
            return
        home = self._root / self._name
        try:
            home.mkdir(parents=True, exist_ok=True)
            if self._resume:
                self._version = self._version or self._newest(home)
            elif self._version is None:
                self._version = self._claim_next(home)
            else:
                self._claim(home, self._version)
            folder = home / self._version
            for part in ("figures", "tables", "checkpoints"):
                (folder / part).mkdir(parents=True, exist_ok=True)
            probe = folder / f".probe-{os.getpid()}"
            probe.write_bytes(b"x")
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"the run folder below {home} cannot be written ({error.strerror or error}): choose another one with "
                "--run.root"
            ) from None
        free = shutil.disk_usage(folder).free
        if free < _ROOM:
            raise UserError(
                f"only {free // 2**20} MiB are free where the run folder {folder} is: free some or choose --run.root"
            )
        self._prepared = True
        if self._resume:
            self._read_rows(folder / "metrics.csv")

    @staticmethod
    def _claim(home: Path, version: str) -> None:
        try:
            (home / version).mkdir()
        except FileExistsError:
            raise UserError(
                f"the run folder {home / version} exists: choose another --run.version, leave it out for the next free "
                "one, or go on in it with --ckpt_path last"
            ) from None

    @staticmethod
    def _claim_next(home: Path) -> str:
        number = 1 + max((_number(folder) for folder in home.iterdir()), default=-1)
        while True:  # mkdir is atomic: of two runs started at once each gets its own
            try:
                (home / f"version_{number}").mkdir()
                return f"version_{number}"
            except FileExistsError:
                number += 1

    @staticmethod
    def _newest(home: Path) -> str:
        kept = [file for file in home.glob("*/checkpoints/last.ckpt") if file.is_file()]
        if not kept:
            raise UserError(
                f"--ckpt_path last: no run below {home} has a checkpoint to go on from; leave --ckpt_path out to start"
            )
        return max(kept, key=lambda file: file.stat().st_mtime).parent.parent.name

    def _read_rows(self, file: Path) -> None:
        if not file.is_file():
            return
        with file.open(newline="") as lines:
            for row in csv.DictReader(lines):
                epoch = int(row["epoch"])
                self._rows[epoch] = {
                    key: int(value) if key in ("epoch", "step") else float(value)
                    for key, value in row.items()
                    if value not in ("", None)
                }


def _number(folder: Path) -> int:
    tail = folder.name.removeprefix("version_")
    return int(tail) if tail.isdigit() else -1

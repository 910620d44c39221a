"""The page of a run, and what it was run with."""

from __future__ import annotations

import json
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from rich.console import Console

import lightning_robust
from lightning_robust.callbacks.measurement import run_folder
from lightning_robust.report import write_json
from lightning_robust.report.page import write_page
from lightning_robust.report.secrets import mask_command, mask_text

_PACKAGES = ("lightning-robust", "torch", "torchvision", "pytorch-lightning", "torchmetrics", "timm", "numpy")


_CONFIGS = Path(lightning_robust.__file__).resolve().parent / "configs"


class RunPage(pl.Callback):
    """Writes ``environment.json`` when a run begins, and the page ``report.html`` when it ends, however it ends.

    ``environment.json`` holds the command without its secrets (:mod:`lightning_robust.report.secrets`), versions,
    devices, and the state: "running", "finished", "interrupted" or "failed". Rank zero writes both. A page that cannot
    be made costs a warning and nothing else.

    Args:
        page: make the page, too.
    """

    def __init__(self, page: bool = True) -> None:
        self.page = page
        self._told: dict[str, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Note what is run."""
        folder = self._folder(trainer)
        if folder is None:
            return
        if not self._told:
            self._told = {"version": 1, "command": _command(), "started": _now(), "stages": []}
            before = _read(folder / "environment.json")  # of a run that goes on
            if before:
                self._told |= {"started": before.get("started"), "stages": list(before.get("stages") or [])}
        stage = str(getattr(stage, "value", stage))
        self._told["stages"] = list(dict.fromkeys([*self._told["stages"], stage]))
        self._told |= {"status": "running", "error": None, "ended": None, **_surroundings(trainer)}
        write_json(folder / "environment.json", self._told)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Note the end, make the page, and say where it is."""
        if not self._end(trainer, "finished"):
            return
        folder = self._folder(trainer)
        if folder is not None and trainer.state.fn != "fit" and self._make(folder):
            Console().print(f"Page: {folder / 'report.html'}", soft_wrap=True)
        elif folder is not None:
            self._make(folder)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The same of a run that ended early."""
        interrupted = isinstance(exception, KeyboardInterrupt) or type(exception).__name__ == "SIGTERMException"
        told = " ".join(f"{type(exception).__name__}: {exception}".split())
        reason = "" if interrupted else mask_text(told)[:300]
        if self._end(trainer, "interrupted" if interrupted else "failed", reason):
            folder = self._folder(trainer)
            if folder is not None:
                self._make(folder)

    def _end(self, trainer: pl.Trainer, status: str, error: str = "") -> bool:
        folder = self._folder(trainer)
        if folder is None or not self._told:  # it ended before it had begun
            return False
        self._told |= {"status": status, "error": error or None, "ended": _now()}
        write_json(folder / "environment.json", self._told)
        return True

    def _make(self, folder: Path) -> bool:
        return self.page and make_page(folder)

    @staticmethod
    def _folder(trainer: pl.Trainer) -> Path | None:
        return None if getattr(trainer, "fast_dev_run", False) else run_folder(trainer)


def make_page(folder: Path) -> bool:
    """Make the page ``report.html`` of what a run's folder holds; where that fails, warn.

    Returns:
        Whether it was made.
    """
    try:
        write_page([folder], folder / "report.html")
    except Exception as error:  # whatever it is: the results are worth more than the page
        rank_zero_warn(
            f"the run's page was not made ({type(error).__name__}: {error}); the results are in {folder}, and "
            f"`lightning-robust report {folder}` tries again"
        )
        return False
    return True


def _command() -> list[str]:
    """The command line as it can be typed again, but for secrets: program and shipped configs by their names."""
    name = Path(sys.argv[0]).name
    program = "lightning-robust" if name in ("lightning-robust", "__main__.py") else name
    return [program, *mask_command([_short(word) for word in sys.argv[1:]])]


def _short(word: str) -> str:
    path = Path(word)
    inside = path.suffix == ".yaml" and path.is_relative_to(_CONFIGS)
    return path.relative_to(_CONFIGS).with_suffix("").as_posix() if inside else word


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read(file: Path) -> dict[str, Any]:
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or half of one: the run then begins now
        return {}
    return told if isinstance(told, dict) else {}


def _surroundings(trainer: pl.Trainer) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # run from a source tree that is not installed
            continue
    device = trainer.strategy.root_device
    if device.type == "cuda":
        names = [torch.cuda.get_device_name(device)]
        versions["cuda"] = torch.version.cuda or "none"
    else:
        threads = torch.get_num_threads()
        processor = platform.processor() or platform.machine()
        names = [f"{device.type} ({processor}, {threads} thread{'s' * (threads > 1)})"]
    return {
        "versions": versions,
        "devices": {
            "accelerator": device.type,
            "names": names,
            "count": trainer.world_size,
            "nodes": trainer.num_nodes,
            "strategy": type(trainer.strategy).__name__,
            "precision": str(trainer.precision),
        },
        "system": f"{platform.system()} {platform.release()}",
    }

"""What a run leaves behind: ``results.json``, and the table at its end."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import SIGTERMException
from rich.console import Console
from rich.table import Table

from lightning_robust.callbacks.attack_progress import end_bar
from lightning_robust.callbacks.interruption import Interruption
from lightning_robust.callbacks.measurement import run_folder
from lightning_robust.callbacks.partial_results import partial_results
from lightning_robust.loggers.run_logger import RunLogger
from lightning_robust.report import atomic_file, write_json


class RunResults(pl.Callback):
    """Prepares the run's folder before anything runs, and writes ``results.json`` at the end of every stage.

    ``results.json`` maps each final metric's name to its number; it is written after each validation of a fit, after
    fit, after each evaluation, and when the run ends early. Ctrl-C and SIGTERM let the running batch finish and write
    ``checkpoints/interrupted.ckpt``, also as ``last.ckpt``, from which a run goes on as if nothing had happened. (What
    an epoch's ``train/loss`` and ``train/acc`` had counted is kept on one device; on several they count the batches
    since.) Where an evaluation ends early, what :class:`~lightning_robust.callbacks.AdversarialAccuracy` and
    :class:`~lightning_robust.callbacks.RobustnessCurve` had counted of the images so far is kept under names that say
    so: ``test_partial/…`` (on one device).

    Args:
        table: print the table of results and the figures' names after a test.
    """

    def __init__(self, table: bool = True) -> None:
        self.table = table
        self.results: dict[str, float] = {}
        self._started: float | None = None
        self._fits = False
        self._to_report: str | None = None
        self._interruption: Interruption | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make the folder, or say at once that it cannot be made."""
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.prepare()
        self._started = time.monotonic()
        self._fits = stage == "fit"
        if self._interruption is None:
            self._interruption = Interruption()
            trainer.callbacks.append(self._interruption)  # type: ignore[attr-defined]  # the last of them

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the results: a resumed run may end before it measures some of them again."""
        checkpoint["callbacks"][self.state_key] = {"results": self.results | _metrics(trainer)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the results of a resumed fit; an evaluation has nothing of the run whose checkpoint it takes."""
        if self._fits:
            self.results = {**state_dict["results"], **self.results}

    def _collect(self, trainer: pl.Trainer, seconds: str | None = None) -> None:
        self.results |= _metrics(trainer)
        if seconds is not None and self._started is not None:
            self.results[seconds] = round(time.monotonic() - self._started, 2)
        folder = run_folder(trainer)
        if folder is not None and not getattr(trainer, "fast_dev_run", False):
            write_json(folder / "results.json", dict(sorted(self.results.items())))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what training ended with."""
        self.results["epochs"] = trainer.current_epoch
        self._collect(trainer, "time/fit_seconds")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what validation found."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._collect(trainer)
        elif trainer.state.fn == "validate":
            self._collect(trainer, "time/validate_seconds")
            self._to_report = "val"

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what the test found."""
        self._collect(trainer, "time/test_seconds")
        self._to_report = "test"

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Print what the evaluation found."""
        told, self._to_report = self._to_report, None
        if told is None:
            return
        end_bar(trainer, pl_module, stage)
        self._report(trainer, told)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lose nothing that was computed."""
        if self._started is None:  # there is no folder
            return
        self.results |= partial_results(trainer, pl_module)
        self._collect(trainer)
        if not isinstance(exception, KeyboardInterrupt | SIGTERMException) or self._interruption is None:
            return
        # the folder's name only matters on rank zero
        folder = run_folder(trainer) or Path(trainer.default_root_dir)
        told = "the evaluation ended early"
        if trainer.state.fn == "fit":
            told = self._save(trainer, folder)
        if trainer.is_global_zero:
            Console(stderr=True).print(f"Interrupted: {told}; the results so far are in {folder}", soft_wrap=True)

    def _save(self, trainer: pl.Trainer, folder: Path) -> str:
        """Save a checkpoint to go on from, if there can be one, and say so; on every rank."""
        path = folder / "checkpoints" / "interrupted.ckpt"
        if self._interruption is None or not self._interruption.save(trainer, path):
            return "no checkpoint could be taken at this point"
        if trainer.is_global_zero:
            with atomic_file(path.with_name("last.ckpt")) as temporary:
                shutil.copyfile(path, temporary)
        return f"go on with --ckpt_path last, or elsewhere with --ckpt_path {path}"

    def _report(self, trainer: pl.Trainer, stage: str) -> None:
        folder = run_folder(trainer)
        if not self.table or folder is None:
            return
        console = Console()
        console.print(results_table(self.results, stage))
        console.print(f"Run folder: {folder}", soft_wrap=True)
        for figure in sorted((folder / "figures").glob(f"*_{stage}.png")):
            console.print(f"  {figure}", soft_wrap=True)


def _metrics(trainer: pl.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def results_table(results: dict[str, float], stage: str) -> Table:
    """The numbers that a person looks for, in words.

    Args:
        results: flat map of logged names.
        stage: "test" or "val".
    """
    table = Table(title=f"Results ({stage})")
    table.add_column("measure", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)

    def percent(value: float) -> str:
        return f"{100 * value:.2f} %"

    if f"{stage}/acc" in results:
        table.add_row("clean accuracy", percent(results[f"{stage}/acc"]))
    if f"{stage}/psnr" in results:
        table.add_row("PSNR of the reconstruction", f"{results[f'{stage}/psnr']:.2f} dB")
    for name, value in results.items():
        start, _, attack = name.rpartition("/")
        if start == f"{stage}/robust_acc":
            table.add_row(f"robust accuracy, {attack.replace('_', ' ')}", percent(value))
    for name, value in results.items():
        start, _, attack = name.rpartition("/")
        if start == f"{stage}/mean_norm":
            table.add_row(f"mean norm of what fools, {attack.replace('_', ' ')}", f"{value:.4g}")
    for name, value in results.items():
        if name.startswith(f"{stage}/") and name.endswith("iou"):
            table.add_row(f"gradient IoU ({name.removeprefix(stage + '/')})", f"{value:.4f}")
    if f"{stage}/input_gradient_mean" in results:
        table.add_row("mean |∇x|", f"{results[f'{stage}/input_gradient_mean']:.3e}")
    return table

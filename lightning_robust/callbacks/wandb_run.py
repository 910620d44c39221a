"""What Weights & Biases users look for beyond curves: the best so far, and checkpoints by alias."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from lightning_robust.callbacks.measurement import run_folder
from lightning_robust.loggers.weights_and_biases import RunWandbLogger, note_id
from lightning_robust.report.page.words import measure
from lightning_robust.report.secrets import mask_settings


class WandbRun(pl.Callback):
    """Adds to a run in W&B, from rank zero alone; without a W&B logger it does nothing.

    - ``best/<name>`` for each validation number of which more, or less, is better: its best so far. It is a logged
      number of its own, since a sweep can only look at those; the summary has it beside the last one, ``<name>``.
    - Artifacts: ``model-<run id>`` of type ``model`` with the aliases ``best-robust`` (``best`` where clean accuracy or
      something else decides) and ``last``; ``results-<run id>`` of type ``results`` with numbers, tables and the page.
    - The run's id in its folder, so that a run that goes on with ``--ckpt_path last`` goes on in W&B, too.

    Args:
        artifacts: log artifacts.
    """

    def __init__(self, artifacts: bool = True) -> None:
        self.artifacts = artifacts
        self._best: dict[str, float] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Keep the run's id."""
        folder = run_folder(trainer)
        if folder is None or getattr(trainer, "fast_dev_run", False):
            return
        for logger in _loggers(trainer):
            note_id(folder, str(logger.experiment.id))

    def state_dict(self) -> dict[str, Any]:
        """The best so far."""
        return {"best": dict(self._best)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        self._best = dict(state_dict["best"])

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Figures and tables belong to this step."""
        _set_step(trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same."""
        _set_step(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the best so far."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        for name, tensor in trainer.callback_metrics.items():
            value, better = float(tensor), measure(name).better
            if not name.startswith("val/") or not better or not math.isfinite(value):
                continue
            before = self._best.get(name)
            if before is None or better * value > better * before:
                self._best[name] = value
        if self._best and trainer.is_global_zero:
            for logger in _loggers(trainer):
                values = {f"best/{name}": value for name, value in self._best.items()}
                logger.log_metrics(values, step=_step(trainer))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Log artifacts: checkpoints after a fit, results after every stage."""
        self._log(trainer, checkpoints=trainer.state.fn == "fit")
        self._finish_fork(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Log what there is."""
        self._log(trainer, checkpoints=trainer.state.fn == "fit")
        self._finish_fork(trainer)

    def _log(self, trainer: pl.Trainer, checkpoints: bool) -> None:
        folder = run_folder(trainer)
        if folder is None or not self.artifacts or getattr(trainer, "fast_dev_run", False):
            return
        for logger in _loggers(trainer):
            try:
                if checkpoints:
                    _log_checkpoints(trainer, logger)
                _log_results(folder, logger)
            except Exception as error:  # a full disk, a server that is away: the run and its test go on
                rank_zero_warn(
                    f"W&B: the artifacts were not logged ({type(error).__name__}: {error}); checkpoints and results "
                    f"are in {folder}"
                )

    @staticmethod
    def _finish_fork(trainer: pl.Trainer) -> None:
        """End the run where rank zero is a fork: it leaves without a word, and what it has logged would be lost."""
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _MultiProcessingLauncher) and launcher._start_method == "fork":
            for logger in _loggers(trainer) if trainer.is_global_zero else ():
                logger.experiment.finish()
                logger._experiment = None


def _loggers(trainer: pl.Trainer) -> list[WandbLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def _step(trainer: pl.Trainer) -> int:
    """The step that Lightning logs an evaluation's numbers at: the last one that was made."""
    return max(0, trainer.global_step - 1)


def _set_step(trainer: pl.Trainer) -> None:
    for logger in _loggers(trainer):
        if isinstance(logger, RunWandbLogger):
            logger.now = _step(trainer)


def _log_checkpoints(trainer: pl.Trainer, logger: WandbLogger) -> None:
    callback = trainer.checkpoint_callback
    if not isinstance(callback, ModelCheckpoint):
        return
    robust = str(callback.monitor or "").startswith("val/robust_acc")
    score = callback.best_model_score
    best = {"monitor": callback.monitor, "score": None if score is None else float(score)}
    for file, alias, metadata in (
        (callback.best_model_path, "best-robust" if robust else "best", best),
        (callback.last_model_path, "last", {}),
    ):
        if file and Path(file).exists():
            told = {**metadata, "file": Path(file).name}
            _log_artifact(logger, "model", alias, told, files={"model.ckpt": Path(file)}, texts={})


def _log_results(folder: Path, logger: WandbLogger) -> None:
    files = {name: folder / name for name in ("results.json", "config.yaml", "environment.json", "report.html")}
    files |= {file.name: file for file in sorted(folder.glob("audit*.json"))}
    files |= {f"tables/{file.name}": file for file in sorted((folder / "tables").glob("*.csv"))}
    there = {name: file for name, file in files.items() if file.is_file()}
    hidden = _without_secrets(there.pop("config.yaml")) if "config.yaml" in there else {}
    if there or hidden:
        _log_artifact(logger, "results", "last", {}, files=there, texts=hidden)


def _without_secrets(config: Path) -> dict[str, str]:
    """``config.yaml`` as others may see it; in the run's folder it stays whole, to run the same again."""
    text = config.read_text(encoding="utf-8")
    settings = yaml.safe_load(text)
    masked = mask_settings(settings)
    return {config.name: text if masked == settings else yaml.safe_dump(masked, sort_keys=False, allow_unicode=True)}


def _log_artifact(
    logger: WandbLogger,
    kind: str,
    alias: str,
    metadata: dict[str, Any],
    files: Mapping[str, Path],
    texts: Mapping[str, str],
) -> None:
    import wandb

    run = logger.experiment
    artifact = wandb.Artifact(name=f"{kind}-{run.id}", type=kind, metadata=metadata)
    for name, path in files.items():
        if path.is_dir():  # a sharded checkpoint
            artifact.add_dir(str(path.resolve()), name=name)
        else:
            # no second copy of a checkpoint in the user's cache, where nobody would look for it; the path is kept
            # whole, since an offline run may be uploaded from another folder
            artifact.add_file(str(path.resolve()), name=name, policy="immutable" if kind == "model" else "mutable")
    for name, text in texts.items():
        with artifact.new_file(name, encoding="utf-8") as file:
            file.write(text)
    run.log_artifact(artifact, aliases=[alias])

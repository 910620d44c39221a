"""What a run is called, where it is kept, and the settings that it leaves behind."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Literal

import pytorch_lightning as pl
import yaml
from pytorch_lightning.cli import SaveConfigCallback
from pytorch_lightning.loggers import WandbLogger

import lightning_robust.callbacks as callbacks
from lightning_robust.loggers import RunLogger
from lightning_robust.report.secrets import mask_settings


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where a run is kept: <root>/<name>/<version>/.

    Args:
        root: folder of all runs.
        name: name of the run; by default that of the last config that is not one of ``trainer/``.
        version: folder below the name; by default the next free version_<n>, for training in a SLURM job slurm_<job>.
        wandb: Weights & Biases: "auto" (online when logged in, else offline), "online", "offline" or "off".
        project: W&B project.
        group: W&B group, which shows and averages runs together.
        tags: W&B tags beside the command, network, objective and data.
        wandb_id: id of a W&B run to go on in; with --ckpt_path last it is the one of the run's folder.
        artifacts: log checkpoints and results to W&B as artifacts.
    """

    root: str = "runs"
    name: str | None = None
    version: str | None = None
    wandb: Literal["auto", "online", "offline", "off", False] = "auto"  # YAML's bare off is false
    project: str = "lightning_robust"
    group: str | None = None
    tags: list[str] = dataclasses.field(default_factory=list)
    wandb_id: str | None = None
    artifacts: bool = True


class SaveRunConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run's folder: the merged settings, ready for ``--config``."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write it once; on rank zero."""
        folder = callbacks.measurement.run_folder(trainer)
        if self.already_saved or folder is None or getattr(trainer, "fast_dev_run", False):
            return
        config = self.config.clone()
        for key in ("config", "ckpt_path", "weights_only", "verbose", "return_predictions"):
            config.pop(key, None)
        if config.get("run") is not None:
            config["run"]["version"] = None  # a run that starts from this file gets a folder of its own
            config["run"]["wandb_id"] = None
            config["run"]["name"] = next((own.name for own in trainer.loggers if isinstance(own, RunLogger)), None)
        text = self.parser.dump(config, skip_none=False, skip_validation=True)
        temporary = folder / ".config.yaml.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, folder / "config.yaml")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):  # a run that goes on may go on with other settings
                logger.experiment.config.update(mask_settings(yaml.safe_load(text)), allow_val_change=True)
        self.already_saved = True

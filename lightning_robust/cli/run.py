"""The commands that run a Trainer: LightningCLI with our names, folders and messages."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn

import lightning_robust.callbacks as callbacks
import lightning_robust.objectives  # noqa: F401 - short class names are those of imported classes
from lightning_robust.cli.checkpoints import goes_on_in, read_checkpoint, resolve_last, said, typed, without_sources
from lightning_robust.cli.given_configs import FROM_DATA, check_linked, run_name, with_configs, with_runs_config
from lightning_robust.cli.messages import RUN_KEY, located, users_mistake
from lightning_robust.cli.noise import quiet, quieten_wandb
from lightning_robust.cli.parser import RobustParser
from lightning_robust.cli.progress_lines import ProgressLines
from lightning_robust.cli.run_settings import RunSettings, SaveRunConfig
from lightning_robust.cli.slurm import in_job, job, requeued
from lightning_robust.cli.sources import sources
from lightning_robust.cli.trainer import Trainer
from lightning_robust.datamodules import ImageDataModule
from lightning_robust.errors import UserError
from lightning_robust.loggers import RunLogger, wandb_logger
from lightning_robust.loggers.weights_and_biases import kept_id, run_tags
from lightning_robust.modules import ImageClassifier
from lightning_robust.report.page.settings import flatten


class RobustCLI(LightningCLI):
    """LightningCLI with a run's folder, links from data to model, and the user's word above the checkpoint's."""

    _made: Path | None = None  # the run's folder, where this process has made it

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The stock commands and ``train``."""
        return {"train": {"model", "datamodule"}, **LightningCLI.subcommands()}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in ("validate", "test"):
            parser.set_defaults({"verbose": False})  # our own table is printed; Lightning's lists every number
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--run``, and tell the model what the data knows."""
        parser.add_class_arguments(RunSettings, "run")
        for name in FROM_DATA:
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Do not let a checkpoint's settings overwrite what the user typed (Lightning does since 2.6.4)."""

    def instantiate_classes(self) -> None:
        """Instantiate; what a class refuses is told with the place where the value stands.

        Raises:
            UserError: for a value that a class refuses.
        """
        try:
            super().instantiate_classes()
        except Exception as error:
            mistake = users_mistake(error)
            if mistake is None:
                raise
            raise UserError(located(mistake, sources(sys.argv[1:]))) from None

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make the run's folder and W&B the trainer's loggers, before those that the user adds.

        Raises:
            UserError: for settings that do not go together.
        """
        settings = self._get(self.config_init, "trainer")
        bars = [callback for callback in settings["callbacks"] or () if isinstance(callback, ProgressBar)]
        if settings["enable_progress_bar"] is False or not (bars or sys.stdout.isatty()):
            # a bar in a log file is a page of fragments
            kwargs["enable_progress_bar"] = False
            self.trainer_defaults["callbacks"].append(ProgressLines())
        elif not bars:
            self.trainer_defaults["callbacks"].append(callbacks.AttackProgress())
        given = settings["logger"]
        if given is not False:
            own = [] if given in (None, True) else (given if isinstance(given, list) else [given])
            kwargs["logger"] = [*self._loggers(), *own]
        if settings["accelerator"] == "auto" and not typed(sys.argv[1:], ("trainer", "accelerator")) and _only_mps():
            rank_zero_info("Apple's GPU has no float64, which the metrics count in: this run takes the CPU")
            kwargs["accelerator"] = "cpu"
        if settings["default_root_dir"] is None and job() is not None:
            kwargs["default_root_dir"] = str(self._job_folder())
        try:
            return super().instantiate_trainer(**kwargs)
        except UserError:
            self._remove_empty_folder()
            raise
        except (MisconfigurationException, ValueError) as error:
            self._remove_empty_folder()
            if "No supported gpu backend" in str(error):
                raise UserError(
                    f"accelerator={settings['accelerator']!r}: PyTorch finds no GPU on this machine; "
                    "--trainer.accelerator auto takes what there is"
                ) from error
            raise UserError(" ".join(str(error).split())[:300]) from error

    def _run_subcommand(self, subcommand: str) -> None:
        alone = not any(os.environ.get(key) for key in ("LOCAL_RANK", "RANK", "SLURM_PROCID"))
        if alone and self.trainer.world_size > 1:
            # the processes that Lightning starts for the other devices know by this that they belong together
            os.environ[RUN_KEY] = f"{os.getpid()}-{time.time_ns()}"
        if subcommand in ("validate", "test", "predict"):
            self._say_if_untrained(subcommand)
        failed = True
        try:
            super()._run_subcommand(subcommand)
            failed = False
        finally:
            # left to the end of the process, W&B prints in colours whatever it prints to
            if "wandb" in sys.modules and sys.modules["wandb"].run is not None:
                sys.modules["wandb"].finish(exit_code=int(failed))
            if failed:
                self._remove_empty_folder()

    def _say_if_untrained(self, subcommand: str) -> None:
        config = self.config[subcommand]
        model = config["model"].get("init_args") or {}
        if not (config.get("ckpt_path") or model.get("weights") or model.get("pretrained")):
            rank_zero_warn(
                f"{subcommand} of a network with random weights: give --ckpt_path, --model.weights or "
                "--model.pretrained true"
            )

    def _run_settings(self) -> RunSettings:
        settings = self._get(self.config_init, "run")
        settings = settings if isinstance(settings, RunSettings) else RunSettings(**settings)
        name = settings.name or run_name(sys.argv)
        return dataclasses.replace(settings, name=name, wandb=settings.wandb or "off")

    def _job_folder(self) -> Path:
        """Where Lightning keeps and looks for the checkpoint of a SLURM job that is requeued: in its run alone.

        An evaluation keeps none and must not find the one of a training either.
        """
        settings = self._run_settings()
        home = Path(settings.root) / str(settings.name)
        trains = self.subcommand in ("fit", "train")
        return home / (str(settings.version or job()) if trains else f"{job()}_{self.subcommand}")

    def _remove_empty_folder(self) -> None:
        """Take back the folder of a run that failed before it wrote anything."""
        if self._made is None:
            return
        with contextlib.suppress(OSError):  # something is in it: it stays
            for part in ("figures", "tables", "checkpoints", "wandb", "."):
                folder = self._made / part
                if folder.is_dir():
                    folder.resolve().rmdir()

    def _loggers(self) -> list[Any]:
        settings = self._run_settings()
        name = str(settings.name)
        config = self.config[self.subcommand]
        home = Path(settings.root) / name
        resume = settings.version is not None and (
            goes_on_in(config.get("ckpt_path"), home / settings.version)
            or (requeued() and self.subcommand in ("fit", "train"))
        )
        run_logger = RunLogger(settings.root, name, settings.version, resume=resume)
        loggers: list[Any] = [run_logger]
        trainer = config["trainer"]
        if trainer.get("fast_dev_run"):
            return loggers
        run_logger.prepare()
        zero = not any(os.environ.get(key, "0") != "0" for key in ("LOCAL_RANK", "RANK", "SLURM_PROCID"))
        self._made = run_logger.folder if zero and not resume else None
        if settings.wandb != "off":
            logger = wandb_logger(
                run_logger.folder if zero else Path(settings.root),
                f"{name}/{run_logger.version}",
                settings.project,
                str(settings.wandb),
                group=settings.group,
                tags=run_tags(str(self.subcommand), flatten(config.as_dict()), settings.tags),
                job_type=str(self.subcommand),
                run_id=settings.wandb_id or (kept_id(run_logger.folder) if resume and zero else None),
            )
            loggers.append(logger)
            if logger is not None:
                self.trainer_defaults["callbacks"].append(callbacks.WandbRun(settings.artifacts))
            if logger is not None:
                quieten_wandb(logger)
            if logger is not None and logger._offline and settings.wandb == "auto":
                rank_zero_info(
                    f"W&B: not logged in, so this run is kept offline in {run_logger.folder / 'wandb'} "
                    "(`wandb sync` uploads it, `--run.wandb off` does without)"
                )
        return loggers


def run(words: list[str]) -> None:
    """Run a command that needs a Trainer.

    Args:
        words: the command and its options.

    Raises:
        UserError: for every mistake of the user.
    """
    if os.environ.get(RUN_KEY, "").startswith(f"{os.getpid()}-"):
        del os.environ[RUN_KEY]  # of an earlier run of this process
    words = with_configs(words)
    words = in_job(words, run_name(words))
    words = with_runs_config(resolve_last(words, run_name(words)))
    words = without_sources(words, read_checkpoint(said(words, ("ckpt_path",))))
    check_linked(words)
    before = sys.argv
    # a process that Lightning starts for another device reads the command line again
    sys.argv = [sys.argv[0], *words]
    try:
        with quiet():
            RobustCLI(
                model_class=ImageClassifier,
                subclass_mode_model=True,
                datamodule_class=ImageDataModule,
                subclass_mode_data=True,
                trainer_class=Trainer,
                trainer_defaults={
                    "callbacks": [
                        callbacks.RunResults(),
                        callbacks.NonFiniteGuard(),
                        callbacks.PredictionWriter(),
                        callbacks.RunPage(),
                    ],
                },
                seed_everything_default=0,
                save_config_callback=SaveRunConfig,
                parser_class=RobustParser,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                # --run.nam must not pass for --run.name
                parser_kwargs={
                    "allow_abbrev": False,
                    **{command: {"default_env": False, "allow_abbrev": False} for command in RobustCLI.subcommands()},
                },
            )
    except SIGTERMException:
        raise SystemExit(143) from None  # ended from outside, by a scheduler for example: not a success
    except SystemExit as ended:
        # Lightning catches Ctrl-C, lets the callbacks save, and leaves with status 1
        if isinstance(ended.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        sys.argv = before


def _only_mps() -> bool:
    return torch.backends.mps.is_available() and not torch.cuda.is_available()

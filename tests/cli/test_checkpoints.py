"""Which file ``--ckpt_path`` means, which run goes on, and what a run's config then no longer needs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import yaml

from lightning_robust.cli.checkpoints import resolve_last, without_sources
from lightning_robust.cli.run import RobustCLI
from lightning_robust.errors import UserError
from lightning_robust.loggers import RunLogger

from .conftest import Program

SAVING = ("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true")


def logger_of(cli: RobustCLI) -> RunLogger:
    return next(logger for logger in cli.trainer.loggers if isinstance(logger, RunLogger))


@pytest.fixture
def two_versions(folder: Path) -> Path:
    """Checkpoints of two versions, the older of which has the higher number."""
    home = folder / "runs" / "quick"
    for number in (0, 1):
        (home / f"version_{number}" / "checkpoints").mkdir(parents=True)
        file = home / f"version_{number}" / "checkpoints" / "last.ckpt"
        torch.save({"state_dict": {}}, file)
        os.utime(file, (1000 - number, 1000 - number))
    return home


def test_last_becomes_a_file_that_every_process_reads(two_versions: Path) -> None:
    added = [
        "--run.root=runs",
        "--run.name=quick",
        "--run.version=version_0",
        "--ckpt_path=runs/quick/version_0/checkpoints/last.ckpt",
    ]
    words = ["fit", "--config", "quick.yaml", "--ckpt_path", "last"]
    assert resolve_last(words, "quick") == [*words, *added]
    words = ["test", "--ckpt_path=last", "--run.version", "version_1", "--run.name=quick"]
    assert resolve_last(words, "run")[-2:] == [word.replace("version_0", "version_1") for word in added[-2:]]
    words = ["fit", "--ckpt_path", "runs/quick/version_0/checkpoints/last.ckpt"]
    assert resolve_last(words, "quick") == words
    with pytest.raises(UserError, match="the run runs/quick/mine has no checkpoint to go on from"):
        resolve_last(["fit", "--ckpt_path", "last", "--run.version", "mine"], "quick")


@pytest.mark.parametrize("command", ["fit", "train", "validate", "test", "predict"])
def test_last_goes_on_in_its_version(
    command: str, two_versions: Path, program: Program, made: list[RobustCLI], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert program(command, "--config", "quick.yaml", "--ckpt_path", "last").status == 0
    assert made[0].config[command]["ckpt_path"] == "runs/quick/version_0/checkpoints/last.ckpt"
    # a rank that does not touch the disk says the same
    logger = logger_of(made[0])
    assert (logger._version, logger._resume) == ("version_0", True)
    assert sorted(path.name for path in two_versions.iterdir()) == ["version_0", "version_1"]


def test_last_brings_its_runs_config(program: Program, ran: list[RobustCLI]) -> None:
    assert program("fit", "--config", "quick.yaml", *SAVING).status == 0
    result = program("test", "--run.name", "quick", "--ckpt_path", "last")
    assert result.status == 0, result.err
    assert [path.name for path in Path("runs/quick").iterdir()] == ["version_0"]


def test_a_checkpoint_needs_no_file_of_weights(folder: Path, program: Program, ran: list[RobustCLI]) -> None:
    assert program("fit", "--config", "quick.yaml").status == 0
    torch.save(ran[0].model.network.state_dict(), folder / "w.pth")
    assert program("fit", "--config", "quick.yaml", "--model.weights", "w.pth").status == 0
    (folder / "w.pth").unlink()
    checkpoint = str(next(Path("runs/quick/version_1/checkpoints").glob("*.ckpt")))
    config = yaml.safe_load(Path("runs/quick/version_1/config.yaml").read_text())
    assert config["model"]["init_args"]["weights"] == "w.pth"
    result = program("test", "--ckpt_path", checkpoint)
    assert result.status == 0, result.err
    # what is typed stands
    assert (
        "there is no weights file 'w.pth'"
        in program("test", "--ckpt_path", checkpoint, "--model.weights", "w.pth").error
    )


def test_a_checkpoint_needs_no_hub(folder: Path) -> None:
    config = "model: {class_path: ImageClassifier, init_args: {network: timm/resnet18, pretrained: true}}\n"
    (folder / "hub.yaml").write_text(config, encoding="utf-8")
    words = ["test", "--config", "hub.yaml"]
    kept = {"hyper_parameters": {"normalization": "imagenet"}}
    added = ["--model.normalization=imagenet", "--model.pretrained=false"]
    assert without_sources(words, kept) == [*words, *added]
    given = [*words, "--model.normalization", "none"]
    assert without_sources(given, kept) == [*given, "--model.pretrained=false"]
    given = [*words, "--model.pretrained", "true"]
    assert without_sources(given, kept) == given
    # without its normalization the network would be another one
    assert without_sources(words, {"hyper_parameters": {"normalization": None}}) == words
    assert without_sources(words, None) == words


def test_a_config_of_the_trainer_leaves_the_runs_config(program: Program, made: list[RobustCLI], folder: Path) -> None:
    (folder / "run" / "checkpoints").mkdir(parents=True)
    (folder / "run" / "config.yaml").write_text((folder / "quick.yaml").read_text(), encoding="utf-8")
    torch.save({"state_dict": {}}, folder / "run" / "checkpoints" / "best.ckpt")
    given = ("--ckpt_path", "run/checkpoints/best.ckpt", "--run.name", "mine")
    one = ("--trainer.accelerator", "cpu", "--trainer.devices", "1")
    result = program("test", *given, "--config", "trainer/multi_gpu", *one)
    assert result.status == 0, result.err
    assert made[0].model.hparams["network"] == "digits_cnn"
    (folder / "other.yaml").write_text("model: {class_path: ImageClassifier}\n", encoding="utf-8")
    assert "missing: --data" in program("test", *given, "--config", "other.yaml").error


def test_files_of_old_torch_versions(folder: Path, program: Program) -> None:
    torch.save({"weight": torch.zeros(2)}, folder / "old.th", _use_new_zipfile_serialization=False)
    error = program("test", "--config", "quick.yaml", "--ckpt_path", "old.th").error
    assert "old.th is not a checkpoint of a run: for a plain file of weights use --model.weights" in error


def test_a_checkpoint_needs_no_file_of_a_manipulator(folder: Path) -> None:
    config = "model: {class_path: PRMClassifier, init_args: {prm_weights: gone.ckpt}}\n"
    (folder / "tuned.yaml").write_text(config, encoding="utf-8")
    words = ["test", "--config", "tuned.yaml"]
    kept = {"hyper_parameters": {"prm": {"width": 8, "pattern": {"stride": 2}}}}
    added = ["--model.prm_weights=null", '--model.prm={"width": 8, "pattern": {"stride": 2}}']
    assert without_sources(words, kept) == [*words, *added]
    given = [*words, "--model.prm_weights", "other.ckpt"]
    assert without_sources(given, kept) == given

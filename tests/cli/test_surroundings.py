"""SLURM's jobs, Apple's machines, and what a run that never began leaves behind."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest
import torch

from lightning_robust.cli.run import RobustCLI

from .conftest import Program
from .test_checkpoints import logger_of


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside SLURM's job 4711, in its first start."""
    for name, value in {"JOB_ID": "4711", "JOB_NAME": "robust", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in ("SLURM_NTASKS", "SLURM_RESTART_COUNT", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)


def test_a_job_has_a_folder_of_its_own(
    job: None, program: Program, made: list[RobustCLI], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = ("fit", "--config", "quick.yaml")
    torch.save({"state_dict": {}}, "hpc_ckpt_7.ckpt")  # another run's
    assert program(*fit).status == 0
    assert logger_of(made[0]).version == "slurm_4711"
    assert Path(made[0].trainer.default_root_dir) == Path("runs/quick/slurm_4711")
    assert made[0].trainer._checkpoint_connector._hpc_resume_path is None
    # once more in the same job: as a step of its own or under a name of its own, but not in the same folder
    assert "this job has trained a run of this name already" in program(*fit).error
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    assert program(*fit).status == 0
    assert program(*fit, "--run.version", "mine", "--trainer.default_root_dir", "here").status == 0
    assert [logger_of(cli).version for cli in made[1:]] == ["slurm_4711_1", "mine"]
    assert Path(made[2].trainer.default_root_dir).name == "here"
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert program("test", "--config", "quick.yaml").status == 0
    assert logger_of(made[3]).version == "version_0"
    assert Path(made[3].trainer.default_root_dir) == Path("runs/quick/slurm_4711_test")


@pytest.mark.parametrize("version", [(), ("--run.version", "mine")])
def test_a_requeued_job_goes_on(
    version: tuple[str, ...], job: None, program: Program, made: list[RobustCLI], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = ("fit", "--config", "quick.yaml", *version)
    assert program(*fit).status == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert program(*fit).status == 0  # it was stopped before its first checkpoint
    folder = Path("runs/quick") / (version[1] if version else "slurm_4711")
    torch.save({"state_dict": {}}, folder / "hpc_ckpt_1.ckpt")
    assert program(*fit).status == 0
    torch.save({"state_dict": {}}, folder / "checkpoints" / "last.ckpt")
    os.utime(folder / "hpc_ckpt_1.ckpt", (1000, 1000))
    assert program(*fit).status == 0
    assert {logger_of(cli).folder for cli in made} == {folder}
    kept = [None, None, folder / "hpc_ckpt_1.ckpt", folder / "checkpoints" / "last.ckpt"]
    assert [cli.config["fit"]["ckpt_path"] for cli in made] == [file and str(file) for file in kept]
    assert [path.name for path in Path("runs/quick").iterdir()] == [folder.name]


def test_what_lightning_saves_for_the_requeue_is_gone_on_from(
    job: None, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert program("fit", "--config", "quick.yaml").status == 0
    folder = Path("runs/quick/slurm_4711")
    next((folder / "checkpoints").glob("*.ckpt")).rename(folder / "hpc_ckpt_1.ckpt")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    result = program("fit", "--config", "quick.yaml", "--trainer.max_epochs", "2")
    assert result.status == 0, result.err
    assert "epoch 1/1 " in result.out
    assert "epoch 0/1 " not in result.out
    with (folder / "metrics.csv").open(newline="") as lines:
        assert [row["epoch"] for row in csv.DictReader(lines)] == ["0", "1"]


def test_a_shell_of_a_job_is_none(
    job: None, program: Program, made: list[RobustCLI], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert program("fit", "--config", "quick.yaml").status == 0
    assert logger_of(made[0]).version == "version_0"


def test_auto_is_not_apples_gpu(
    folder: Path,
    program: Program,
    made: list[RobustCLI],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    text = (folder / "quick.yaml").read_text().replace("accelerator: cpu", "accelerator: auto")
    (folder / "auto.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # as on such a machine: what Lightning takes for auto
    asked: list[str] = []

    def instantiate(self: RobustCLI, config: dict, callbacks: list) -> None:
        asked.append(config["accelerator"])

    monkeypatch.setattr("pytorch_lightning.cli.LightningCLI._instantiate_trainer", instantiate)
    assert program("fit", "--config", "auto.yaml").status == 0
    assert [r.getMessage() for r in caplog.records if "no float64" in r.getMessage()]
    assert program("fit", "--config", "auto.yaml", "--trainer.accelerator", "auto").status == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert program("fit", "--config", "auto.yaml").status == 0
    assert asked == ["cpu", "auto", "auto"]


def test_a_refused_run_leaves_no_folder(program: Program, made: list[RobustCLI]) -> None:
    assert "cpuu" in program("fit", "--config", "quick.yaml", "--trainer.accelerator", "cpuu").error
    assert list(Path("runs/quick").iterdir()) == []
    # one with something in it stays
    kept = Path("runs/quick/version_0/figures/mine.png")
    assert program("fit", "--config", "quick.yaml").status == 0
    kept.write_bytes(b"x")
    assert "cpuu" in program("fit", "--config", "quick.yaml", "--trainer.accelerator", "cpuu").error
    assert kept.is_file()
    assert [path.name for path in Path("runs/quick").iterdir()] == ["version_0"]


@pytest.mark.parametrize("off", ["off", "'off'", "no", "false"])
def test_yaml_reads_off_as_false(off: str, folder: Path, program: Program, made: list[RobustCLI]) -> None:
    (folder / "more.yaml").write_text(f"run: {{wandb: {off}}}\n", encoding="utf-8")
    assert program("fit", "--config", "quick.yaml", "--config", "more.yaml").status == 0
    assert len(made[0].trainer.loggers) == 1

"""The program as real processes: several ranks, signals, torchrun and SLURM's environment."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from .test_runs import HELPERS

pytestmark = pytest.mark.slow

TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu")
PROGRAM = (sys.executable, "-m", "lightning_robust")


@pytest.fixture(autouse=True)
def _environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "helpers_of_a_user.py").write_text(HELPERS, encoding="utf-8")
    here = Path(__file__).resolve().parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(folder), str(here))))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def execute(*words: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=False)


def mistakes(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in result.stderr.splitlines() if "lightning-robust: error: " in line]


def test_the_installed_program() -> None:
    program = shutil.which("lightning-robust", path=str(Path(sys.executable).parent))
    assert program is not None
    result = execute(program, "fit", "--config", "quick.yaml")
    assert result.returncode == 0, result.stderr
    assert "epoch 0/0 " in result.stdout
    assert "\x1b" not in result.stdout + result.stderr


def test_two_devices_train_test_and_predict() -> None:
    result = execute(*PROGRAM, "train", "--config", "quick.yaml", *TWO)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Results (test)") == 1
    assert result.stdout.count("epoch 0/0 ") == 1
    checkpoint = str(next(Path("runs/quick/version_0/checkpoints").glob("*.ckpt")))
    result = execute(*PROGRAM, "predict", "--ckpt_path", checkpoint, *TWO, "--data.limit", "{test: 31}")
    assert result.returncode == 0, result.stderr
    with Path("runs/quick/version_1/tables/predictions.csv").open(newline="") as lines:
        assert [int(row["index"]) for row in csv.DictReader(lines)] == list(range(31))
    assert sorted(path.name for path in Path("runs/quick").iterdir()) == ["version_0", "version_1"]


def test_two_devices_go_on_in_the_same_run() -> None:
    saving = ("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true")
    fit = (*PROGRAM, "fit", "--config", "quick.yaml", *saving)
    for seed in ("1", "2"):
        assert execute(*fit, "--seed_everything", seed).returncode == 0
    last = [Path(f"runs/quick/version_{version}/checkpoints/last.ckpt") for version in (0, 1)]
    before = last[0].read_bytes()
    result = execute(*fit, "--ckpt_path", "last", "--trainer.max_epochs", "2", *TWO)
    assert result.returncode == 0, result.stderr
    assert last[0].read_bytes() == before
    assert torch.load(last[1], weights_only=True)["epoch"] == 1
    assert "version_0" not in result.stdout + result.stderr
    assert sorted(path.name for path in Path("runs/quick").iterdir()) == ["version_0", "version_1"]
    with Path("runs/quick/version_1/metrics.csv").open(newline="") as lines:
        assert [row["epoch"] for row in csv.DictReader(lines)] == ["0", "1"]
    result = execute(*PROGRAM, "test", "--run.name", "quick", "--ckpt_path", "last", *TWO)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in Path("runs/quick").iterdir()) == ["version_0", "version_1"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_on_a_rank_is_said_once(rank: int) -> None:
    given = ("--trainer.callbacks+=helpers_of_a_user.Raises", "--trainer.callbacks.kind=mistake")
    result = execute(*PROGRAM, "fit", "--config", "quick.yaml", *TWO, *given, f"--trainer.callbacks.rank={rank}")
    assert mistakes(result) == ["lightning-robust: error: the image x.png is broken"]
    assert "Traceback" not in result.stderr
    # 2, unless rank zero hangs in a collective until Lightning kills it
    assert result.returncode in (2, -signal.SIGKILL)


def test_a_bug_on_a_rank_keeps_its_traceback() -> None:
    given = ("--trainer.callbacks+=helpers_of_a_user.Raises", "--trainer.callbacks.rank=1")
    result = execute(*PROGRAM, "fit", "--config", "quick.yaml", *TWO, *given)
    assert result.returncode not in (0, 2)
    assert "ZeroDivisionError: a bug of ours" in result.stderr


def test_torchrun() -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port())
    fit = ("-m", "lightning_robust", "fit", "--config", "quick.yaml")
    result = execute(*torchrun, *fit, "--config", "trainer/torchrun", "--trainer.num_nodes", "1", *TWO)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("epoch 0/0 ") == 1
    assert [path.name for path in Path("runs/quick").iterdir()] == ["version_0"]
    result = execute(*torchrun, *fit, *TWO, "--trainer.max_epoks", "3")
    assert len(mistakes(result)) == 1
    assert "did you mean max_epochs?" in mistakes(result)[0]


def test_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "JOB_ID": "4711", "NTASKS": "1", "NTASKS_PER_NODE": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0",
        "NNODES": "1", "NODELIST": "localhost", "JOB_NAME": "robust",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("MASTER_PORT", free_port())
    one = ("--trainer.num_nodes", "1", "--trainer.devices", "1", "--trainer.accelerator", "cpu")
    result = execute(*PROGRAM, "fit", "--config", "quick.yaml", "--config", "trainer/slurm", *one)
    assert result.returncode == 0, result.stderr
    assert "SLURM auto-requeueing enabled" in result.stderr


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(sent: signal.Signals, status: int) -> None:
    words = (*PROGRAM, "fit", "--config", "quick.yaml", "--trainer.max_epochs", "100000")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch 2/"):
                break
        process.send_signal(sent)
        started = time.monotonic()
        _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert time.monotonic() - started < 30
    assert "Traceback" not in err
    assert Path("runs/quick/version_0/results.json").is_file()


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])

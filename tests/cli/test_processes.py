"""The program as real processes: several ranks, signals, torchrun and SLURM's environment."""

from __future__ import annotations

import csv
import json
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


@pytest.mark.parametrize(
    ("sent", "status", "devices"), [(signal.SIGINT, 130, ()), (signal.SIGTERM, 143, ()), (signal.SIGTERM, 143, TWO)]
)
def test_signals(sent: signal.Signals, status: int, devices: tuple[str, ...]) -> None:
    """The first process alone is told, as by a scheduler."""
    words = (*PROGRAM, "fit", "--config", "quick.yaml", *devices, "--trainer.max_epochs", "100000")
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
    folder = Path("runs/quick/version_0")
    assert (folder / "results.json").is_file()
    state = torch.load(folder / "checkpoints" / "interrupted.ckpt", weights_only=True)
    assert state["epoch"] > 0
    assert "go on with --ckpt_path last" in err


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_in_the_middle_of_a_batch_of_an_evaluation(sent: signal.Signals, status: int) -> None:
    """The attack on the only batch would run for days; a scheduler waits for seconds."""
    attacks = "{fgsm: {class_path: FGSM}, endless: {class_path: PGD, init_args: {steps: 100000000, eps: 0.001}}}"
    given = ("--trainer.callbacks+=helpers_of_a_user.Tells", "--trainer.callbacks+=AdversarialAccuracy")
    words = (*PROGRAM, "test", "--config", "quick.yaml", *given, f"--trainer.callbacks.attacks={attacks}")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not Path("started").exists():
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(3)
        assert process.poll() is None
        process.send_signal(sent)
        started = time.monotonic()
        out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert time.monotonic() - started < 30
    assert "Traceback" not in err
    assert "Results" not in out
    assert "Interrupted: the evaluation ended early; the results so far are in runs/quick/version_0" in err
    results = json.loads(Path("runs/quick/version_0/results.json").read_text())
    assert "test_partial/robust_acc/fgsm" in results
    assert not any("endless" in name or name.startswith("test/") for name in results)


def test_sigterm_ends_an_evaluation_on_two_devices() -> None:
    attacks = "{endless: {class_path: PGD, init_args: {steps: 100000000, eps: 0.001}}}"
    given = ("--trainer.callbacks+=helpers_of_a_user.Tells", "--trainer.callbacks+=AdversarialAccuracy")
    words = (*PROGRAM, "test", "--config", "quick.yaml", *TWO, *given, f"--trainer.callbacks.attacks={attacks}")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not Path("started").exists():
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(3)
        process.send_signal(signal.SIGTERM)
        # both processes hold its pipes: the end of both is waited for
        _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "Traceback" not in err


STUDY = """
data: {init_args: {limit: {train: 400, val: 20, test: 12}, eval_batch_size: 4}}
trainer:
  callbacks:
    - class_path: OnePixelStudy
      init_args:
        attacks: {pixel: {class_path: OnePixel, init_args: {population: 12, generations: 12}}}
        targeted: false
        checkpoint_every: 3
"""


def test_a_one_pixel_study_that_was_killed_goes_on(folder: Path) -> None:
    """By SIGKILL, which nothing can prepare for, in the middle of a generation."""
    (folder / "study.yaml").write_text(STUDY, encoding="utf-8")
    data = ("--data.limit", "{train: 600, val: 20, test: 12}")
    assert execute(*PROGRAM, "fit", "--config", "quick.yaml", *data, "--trainer.max_epochs", "4").returncode == 0
    checkpoint = str(next(Path("runs/quick/version_0/checkpoints").glob("*.ckpt")))
    study = (*PROGRAM, "test", "--config", "quick.yaml", "--config", "study.yaml", "--ckpt_path", checkpoint)

    def run(name: str, killed_at: int = 0) -> tuple[int, int]:
        given = ("--trainer.callbacks+=helpers_of_a_user.KilledAt", f"--trainer.callbacks.generation={killed_at}")
        result = execute(*study, "--run.name", name, *given)
        assert killed_at or result.returncode == 0, result.stderr
        return result.returncode, int(Path("generations").read_text())

    def ended(folder: str) -> dict[str, float]:
        results = json.loads(Path(folder, "results.json").read_text())
        return {name: value for name, value in results.items() if not name.startswith("time/")}

    _, whole = run("whole")
    assert whole >= 20
    killed_at = whole * 2 // 3
    assert run("killed", killed_at) == (-signal.SIGKILL, killed_at)
    kept = list(Path("runs/killed/unfinished_one_pixel").iterdir())
    assert kept
    assert not any(".tmp" in path.name for path in kept)
    _, again = run("killed")
    # what was finished is not made again, of what was under way at most what came after the last checkpoint
    assert whole - killed_at < again <= whole - killed_at + 3
    assert ended("runs/killed/version_1") == ended("runs/whole/version_0")
    tables = [Path(folder, "tables") for folder in ("runs/killed/version_1", "runs/whole/version_0")]
    names = sorted(path.name for path in tables[0].glob("*.csv"))
    assert len(names) >= 2
    assert [(tables[0] / name).read_text() for name in names] == [(tables[1] / name).read_text() for name in names]
    assert not Path("runs/killed/unfinished_one_pixel").exists()


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])

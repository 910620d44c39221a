"""What a run prints, writes and ends with."""

from __future__ import annotations

import csv
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from lightning_robust.cli.messages import RUN_KEY, report, spoken, users_mistake
from lightning_robust.errors import UserError

from .conftest import Program

HELPERS = """
import signal, os
import pytorch_lightning as pl
from lightning_robust.datamodules import Digits
from lightning_robust.errors import UserError

class Raises(pl.Callback):
    def __init__(self, kind: str = "bug", rank: int = 0):
        self.kind, self.rank = kind, rank

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_rank != self.rank:
            return
        if self.kind == "bug":
            raise ZeroDivisionError("a bug of ours")
        if self.kind == "mistake":
            raise UserError("the image x.png is broken")
        os.kill(os.getpid(), {"interrupt": signal.SIGINT, "terminate": signal.SIGTERM}[self.kind])

class Tells(pl.Callback):
    def on_test_batch_start(self, *args):
        open("started", "w").close()

class KilledAt(pl.Callback):
    # counts the generations of one-pixel attacks in a file, and kills its process in the middle of one
    def __init__(self, generation: int = 0):
        self.generation, self.made = generation, 0

    def on_test_start(self, trainer, module):
        from lightning_robust.attacks.one_pixel_evolution import Evolution
        original = Evolution._generation

        def made(evolution, state):
            self.made += 1
            with open("generations", "w") as file:
                file.write(str(self.made))
            if self.made == self.generation:
                os.kill(os.getpid(), signal.SIGKILL)
            original(evolution, state)

        Evolution._generation = made

class BrokenImages(Digits):
    def read(self, split):
        source = super().read(split)
        return source and Broken(source)

class Broken:
    def __init__(self, source):
        self.source, self.labels = source, source.labels
    def __len__(self):
        return len(self.labels)
    def __getattr__(self, name):
        raise UserError("the image x.png is broken")
"""


@pytest.fixture
def helpers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's own; returns its name."""
    name = f"cli_helpers_{folder.name.replace('-', '_')}"
    (folder / f"{name}.py").write_text(HELPERS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    return name


def test_train_leads_to_the_table(program: Program) -> None:
    result = program("train", "--config", "quick.yaml")
    assert result.status == 0, result.err
    assert "clean accuracy" in result.out
    assert "Run folder: runs/quick/version_0" in result.out
    names = {path.name for path in Path("runs/quick/version_0").iterdir()}
    assert {"config.yaml", "metrics.csv", "results.json", "checkpoints"} <= names


def test_a_run_says_what_matters_and_no_more(
    program: Program, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_SHOW_INFO", "")  # the program sets it
    monkeypatch.delenv("WANDB_SHOW_INFO")
    result = program("train", "--config", "quick.yaml", "--run.wandb", "offline", "--trainer.max_epochs", "2")
    assert result.status == 0, result.err
    logged = [record.getMessage() for record in caplog.records if "lightning" in record.name]
    said = "\n".join((result.out, result.err, *logged))
    for noise in ("Tip", "litlogger", "TPU", "anonymous", "logging interval", "estimate number", "deprecat", "Warning"):
        assert noise not in said
    # not a terminal: no colour codes, no bars, one line an epoch
    assert "\x1b" not in said
    assert "\r" not in said
    assert "it/s" not in said
    epochs = re.findall(r"^epoch (\d)/1  .*val/acc .*train/loss .*s\)$", result.out, re.MULTILINE)
    assert epochs == ["0", "1"]
    assert {"Seed set to 0", "GPU available: False, used: False"} <= set(logged)
    assert len(logged) <= 4
    assert len(result.err.splitlines()) <= 4, result.err


def test_warnings_that_matter_are_kept(program: Program, helpers: str) -> None:
    at_once = (f"--trainer.callbacks+={helpers}.Raises", "--trainer.callbacks.kind=mistake")
    with pytest.warns(UserWarning, match="`max_epochs` was not set"):
        program("fit", "--config", "quick.yaml", "--trainer.max_epochs", "null", *at_once)


def test_progress_bar_can_be_turned_off_on_a_terminal(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    result = program("fit", "--config", "quick.yaml", "--trainer.enable_progress_bar", "false")
    assert result.status == 0, result.err
    assert "epoch 0/0  " in result.out


def test_predictions_stand_in_the_order_of_the_data(program: Program) -> None:
    given = ("--data.eval_batch_size", "7", "--data.limit", "{test: 31}")
    with pytest.warns(UserWarning, match="random weights"):
        result = program("predict", "--config", "quick.yaml", *given)
    assert result.status == 0, result.err
    path = Path("runs/quick/version_0/tables/predictions.csv")
    assert f"Predictions: {path}" in result.out
    with path.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert list(rows[0]) == ["index", "label", "predicted", "confidence"]
    from lightning_robust.datamodules import Digits

    labels = [int(label) for _, label in Digits(limit={"test": 31}).dataset("test")]
    assert [int(row["index"]) for row in rows] == list(range(31))
    assert [int(row["label"]) for row in rows] == labels
    assert all(0.1 <= float(row["confidence"]) <= 1 and 0 <= int(row["predicted"]) < 10 for row in rows)


def test_predictions_do_not_depend_on_the_number_of_devices(program: Program) -> None:
    given = ("--config", "quick.yaml", "--data.limit", "{test: 31}", "--data.eval_batch_size", "5")
    two = ("--trainer.devices", "2", "--trainer.strategy", "ddp_fork")
    for words in (given, (*given, *two)):
        with pytest.warns(UserWarning, match="random weights"):
            assert program("predict", *words).status == 0
    files = [Path(f"runs/quick/version_{run}/tables/predictions.csv") for run in (0, 1)]
    tables = [list(csv.reader(file.read_text().splitlines())) for file in files]
    assert [row[:3] for row in tables[0]] == [row[:3] for row in tables[1]]
    values = [[float(row[3]) for row in table[1:]] for table in tables]
    assert values[0] == pytest.approx(values[1], abs=1e-6)


def test_a_version_that_exists_is_refused(program: Program) -> None:
    assert program("fit", "--config", "quick.yaml", "--run.version", "mine").status == 0
    error = program("fit", "--config", "quick.yaml", "--run.version", "mine").error
    assert "runs/quick/mine exists: choose another --run.version" in error


def test_a_run_goes_on_with_last(program: Program) -> None:
    saving = ("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true")
    assert program("fit", "--config", "quick.yaml", *saving).status == 0
    result = program("fit", "--config", "quick.yaml", *saving, "--ckpt_path", "last", "--trainer.max_epochs", "2")
    assert result.status == 0, result.err
    assert [path.name for path in Path("runs/quick").iterdir()] == ["version_0"]
    with Path("runs/quick/version_0/metrics.csv").open(newline="") as lines:
        assert [row["epoch"] for row in csv.DictReader(lines)] == ["0", "1"]


def test_checkpoints_that_are_none(folder: Path, program: Program) -> None:
    (folder / "noise.ckpt").write_bytes(b"not a checkpoint")
    torch.save({"weight": torch.zeros(2)}, folder / "weights.pt")
    torch.save({"state_dict": {}, "callback": pl.Callback()}, folder / "unsafe.ckpt")
    torch.save({"state_dict": {"a": torch.zeros(1000)}}, folder / "whole.ckpt")
    (folder / "cut.ckpt").write_bytes((folder / "whole.ckpt").read_bytes()[:1500])

    def told(name: str) -> str:
        return program("test", "--config", "quick.yaml", "--ckpt_path", name).error

    assert told("noise.ckpt").endswith("cannot be read as a checkpoint: broken or cut short")
    assert told("cut.ckpt").endswith("cannot be read as a checkpoint: broken or cut short")
    assert "holds more than numbers and plain data" in told("unsafe.ckpt")
    assert "weights.pt is not a checkpoint of a run: for a plain file of weights use --model.weights" in told(
        "weights.pt"
    )


def test_a_checkpoint_that_does_not_fit(program: Program) -> None:
    assert program("fit", "--config", "quick.yaml").status == 0
    checkpoint = next(Path("runs/quick/version_0/checkpoints").glob("*.ckpt"))
    error = program("test", "--config", "quick.yaml", "--data.classes", "[1,2]", "--ckpt_path", str(checkpoint)).error
    assert "does not fit" in error


# -- how a run ends ----------------------------------------------------------------------------------------------------


def test_a_mistake_that_shows_while_training(program: Program, helpers: str) -> None:
    given = (f"--trainer.callbacks+={helpers}.Raises", "--trainer.callbacks.kind=mistake")
    assert program("fit", "--config", "quick.yaml", *given).error == "the image x.png is broken"


def test_a_mistake_in_a_loaders_worker(program: Program, helpers: str) -> None:
    given = ("--data", f"{helpers}.BrokenImages", "--data.num_workers", "1")
    assert program("fit", "--config", "quick.yaml", *given).error == "the image x.png is broken"


# Two processes race for who reports first; on a loaded machine the loser's connection error has won once.
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_on_a_forked_rank(rank: int, program: Program, helpers: str) -> None:
    given = (f"--trainer.callbacks+={helpers}.Raises", "--trainer.callbacks.kind=mistake")
    two = (f"--trainer.callbacks.rank={rank}", "--trainer.devices", "2", "--trainer.strategy", "ddp_fork")
    assert program("fit", "--config", "quick.yaml", *given, *two).error == "the image x.png is broken"


def test_a_bug_of_ours_keeps_its_traceback(program: Program, helpers: str) -> None:
    with pytest.raises(ZeroDivisionError, match="a bug of ours"):
        program("fit", "--config", "quick.yaml", f"--trainer.callbacks+={helpers}.Raises")


@pytest.mark.parametrize("command", ["fit", "train"])
def test_ctrl_c(command: str, program: Program, helpers: str) -> None:
    given = (f"--trainer.callbacks+={helpers}.Raises", "--trainer.callbacks.kind=interrupt")
    result = program(command, "--config", "quick.yaml", *given)
    assert result.status == 130
    assert "Traceback" not in result.err
    assert result.err.splitlines()[-1] == "lightning-robust: error: interrupted"
    assert "Results" not in result.out


def test_an_end_from_outside_is_no_success(program: Program, helpers: str) -> None:
    given = (f"--trainer.callbacks+={helpers}.Raises", "--trainer.callbacks.kind=terminate")
    result = program("fit", "--config", "quick.yaml", *given)
    assert result.status == 143
    assert "Traceback" not in result.err


# -- whose mistake, and who says it ------------------------------------------------------------------------------------


def wrapped(error: Exception) -> Exception:
    try:
        try:
            raise error
        except Exception as inner:
            raise RuntimeError("while doing something") from inner
    except RuntimeError as outer:
        return outer


def test_users_mistakes_are_told_from_ours() -> None:
    assert users_mistake(wrapped(UserError("mend this"))) == "mend this"
    assert users_mistake(wrapped(KeyError("ours"))) is None
    text = "Traceback (most recent call last):\n  ...\nlightning_robust.errors.UserError: mend this\n"
    assert users_mistake(RuntimeError(text)) == "mend this"
    assert users_mistake(UserError(f"Caught UserError in DataLoader worker process 0.\nOriginal {text}")) == "mend this"
    assert users_mistake(None) is None


def test_one_process_speaks_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv(RUN_KEY, "one run")
    assert not spoken()
    report("mend this")
    assert spoken()
    report("mend this")
    monkeypatch.setenv(RUN_KEY, "another run")
    report("mend that")
    lines = [f"lightning-robust: error: {text}" for text in ("mend this", "mend that")]
    assert capsys.readouterr().err.splitlines() == lines
    # what a run said long ago silences nobody, and its marker goes
    long_ago = time.time() - 3600
    markers = list(tmp_path.iterdir())
    for marker in markers:
        os.utime(marker, (long_ago, long_ago))
    assert not spoken()
    report("mend that")
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_alone_it_always_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    environment: dict[str, Any] = dict.fromkeys((RUN_KEY, "WORLD_SIZE", "SLURM_NTASKS"))
    for name in environment:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "0")
    report("mend this")
    report("mend this")
    assert len(capsys.readouterr().err.splitlines()) == 2

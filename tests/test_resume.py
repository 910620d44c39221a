"""A run that is killed or interrupted and then resumed ends as the one that was left alone."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_robust.cli import main

CONFIG = """
seed_everything: 0
model:
  class_path: ImageClassifier
  init_args:
    network: papernot_mnist   # has dropout
    objective:
      class_path: PGDAdversarial
      init_args:
        attack: {class_path: PGD, init_args: {eps: 0.1, steps: 2, random_start: true}}
    optimizer: {name: adamw, lr: 0.003}
    schedule: {name: cyclic}
data:
  class_path: Digits
  init_args:
    {batch_size: 16, eval_batch_size: 11, image_size: 16, augmentation: crop, limit: {train: 80, val: 30, test: 20}}
trainer:
  max_epochs: 4
  accelerator: cpu
  enable_model_summary: false
  callbacks:
    - class_path: AdversarialAccuracy
      init_args:
        attacks: {pgd: {class_path: PGD, init_args: {eps: 0.1, steps: 3}}}
        limit_batches: null
    - class_path: AdversarialAccuracy
      init_args:
        attacks: {rare: {class_path: FGSM, init_args: {eps: 0.1}}}
        every_n_epochs: 3
        name: rare
    - class_path: RobustCheckpoint
      init_args: {attack: pgd}
    - class_path: EMAWeightAveraging
      init_args: {decay: 0.9}
run: {wandb: "off", name: run}
"""

SIGNALS = '''
"""Sends a signal to its own process at a chosen moment."""
import os
import signal

import pytorch_lightning as pl


class SignalAt(pl.Callback):
    def __init__(self, name: str, hook: str, epoch: int, batch: int) -> None:
        self.number = getattr(signal, name)
        self.hook, self.epoch, self.batch = hook, epoch, batch
        self.index = 0

    def send(self, trainer, hook):
        if (hook, trainer.current_epoch, self.index) == (self.hook, self.epoch, self.batch):
            if not trainer.sanity_checking:
                os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, trainer, module, batch, index):
        self.index = index
        self.send(trainer, "on_train_batch_start")

    def on_before_backward(self, trainer, module, loss):
        self.send(trainer, "on_before_backward")

    def on_validation_batch_start(self, trainer, module, batch, index, loader=0):
        self.index = index
        self.send(trainer, "on_validation_batch_start")
'''


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "signals.py").write_text(SIGNALS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-robust"])
    handler = signal.getsignal(signal.SIGINT)
    yield tmp_path
    signal.signal(signal.SIGINT, handler)  # Lightning lets it be ignored after a Ctrl-C
    sys.modules.pop("signals", None)


def fit(root: str, *words: str) -> None:
    main(["fit", "--config", "run.yaml", "--run.root", root, *words])


def send(name: str, hook: str, epoch: int, batch: int) -> list[str]:
    settings = {"name": name, "hook": hook, "epoch": epoch, "batch": batch}
    return [
        "--trainer.callbacks+=signals.SignalAt",
        *(f"--trainer.callbacks.{key}={value}" for key, value in settings.items()),
    ]


def ended(folder: Path) -> dict[str, Any]:
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    results = json.loads((folder / "results.json").read_text())
    return {"checkpoint": checkpoint, "rows": rows, "results": results}


def assert_same_end(found: Path, wanted: Path, rows: bool = True) -> None:
    one, two = ended(found), ended(wanted)
    for key in ("state_dict", "current_model_state"):
        for name, value in two["checkpoint"][key].items():
            assert torch.equal(one["checkpoint"][key][name], value), name
    assert one["checkpoint"]["global_step"] == two["checkpoint"]["global_step"] == 4 * 5
    moments = [c["checkpoint"]["optimizer_states"][0]["state"][0]["exp_avg"] for c in (one, two)]
    assert torch.equal(*moments)

    def timeless(results: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in results.items() if not name.startswith("time/")}

    assert timeless(one["results"]) == timeless(two["results"])
    assert {"val/robust_acc/pgd", "val/robust_acc/rare", "train/loss", "val/acc", "epochs"} <= one["results"].keys()
    if rows:
        assert [int(row["epoch"]) for row in two["rows"]] == [0, 1, 2, 3]
        assert one["rows"] == two["rows"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "run.yaml").write_text(CONFIG)
    before, argv = Path.cwd(), sys.argv
    os.chdir(folder)
    sys.argv = ["lightning-robust"]
    try:
        fit("runs")
    finally:
        os.chdir(before)
        sys.argv = argv
    return folder / "runs" / "run" / "version_0"


def test_killed_inside_an_epoch_and_resumed(workplace: Path, undisturbed: Path) -> None:
    """By SIGKILL, which nothing can prepare for, through the command line, twice."""
    program = [sys.executable, "-m", "lightning_robust", "fit", "--config", "run.yaml", "--run.root", "killed"]
    killed = subprocess.run([*program, *send("SIGKILL", "on_before_backward", 1, 2)], capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    with pytest.raises(SystemExit):  # the second time while it validates
        fit("killed", "--ckpt_path", "last", *send("SIGINT", "on_validation_batch_start", 3, 0))
    folder = workplace / "killed" / "run" / "version_0"
    done = subprocess.run([*program, "--ckpt_path", "last"], capture_output=True, timeout=300, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.parent.iterdir()] == ["version_0"]
    assert_same_end(folder, undisturbed)


@pytest.mark.parametrize(
    ("sent", "hook", "epoch", "batch"),
    [
        ("SIGINT", "on_train_batch_start", 0, 0),
        ("SIGINT", "on_before_backward", 1, 2),
        ("SIGINT", "on_before_backward", 2, 4),  # in the last batch: the epoch's validation is still to come
        ("SIGINT", "on_validation_batch_start", 1, 1),
        ("SIGTERM", "on_before_backward", 1, 2),
        ("SIGTERM", "on_validation_batch_start", 1, 1),
    ],
)
def test_interrupted_and_resumed(
    workplace: Path, undisturbed: Path, capfd: pytest.CaptureFixture[str], sent: str, hook: str, epoch: int, batch: int
) -> None:
    with pytest.raises(SystemExit) as stopped:
        fit("stopped", *send(sent, hook, epoch, batch))
    assert stopped.value.code == {"SIGINT": 130, "SIGTERM": 143}[sent]
    told = capfd.readouterr().err
    assert "Traceback" not in told
    folder = workplace / "stopped" / "run" / "version_0"
    checkpoint = folder / "checkpoints" / "interrupted.ckpt"
    assert f"--ckpt_path {checkpoint.relative_to(workplace)}" in told
    results = json.loads((folder / "results.json").read_text())
    assert ("val/robust_acc/pgd" in results) == (epoch > 0)
    state = torch.load(checkpoint, weights_only=True)
    assert state["global_step"] == (5 * (epoch + 1) if hook.startswith("on_val") else 5 * epoch + batch + 1)

    fit("resumed", "--ckpt_path", str(checkpoint))  # in a folder of its own
    assert_same_end(workplace / "resumed" / "run" / "version_0", undisturbed, rows=False)
    assert ended(workplace / "resumed" / "run" / "version_0")["rows"] == ended(undisturbed)["rows"][epoch:]

    fit("stopped", "--ckpt_path", "last")  # in the same one
    assert_same_end(folder, undisturbed)


def test_a_second_ctrl_c_stops_at_once(workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [*send("SIGINT", "on_train_batch_start", 1, 2), *send("SIGINT", "on_before_backward", 1, 2)]
    with pytest.raises(SystemExit):
        fit("stopped", *words)
    folder = workplace / "stopped" / "run" / "version_0"
    assert not (folder / "checkpoints" / "interrupted.ckpt").exists()
    assert (folder / "checkpoints" / "last.ckpt").exists()
    assert "no checkpoint could be taken" in capfd.readouterr().err
    assert "val/acc" in json.loads((folder / "results.json").read_text())
    assert signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, signal.default_int_handler)  # not ours, left behind


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "hook", "batch"),
    [
        ("SIGINT", "on_before_backward", 2),
        ("SIGINT", "on_validation_batch_start", 0),
        ("SIGTERM", "on_before_backward", 2),
        ("SIGTERM", "on_validation_batch_start", 0),
    ],
)
def test_interrupted_on_two_devices(workplace: Path, sent: str, hook: str, batch: int) -> None:
    """A terminal sends Ctrl-C to all processes; here each sends it to itself, at the same place."""
    program = [sys.executable, "-m", "lightning_robust", "fit", "--config", "run.yaml", "--trainer.devices", "2"]
    program += ["--trainer.strategy", "ddp"]
    whole = subprocess.run([*program, "--run.root", "whole"], capture_output=True, timeout=300, text=True)
    assert whole.returncode == 0, whole.stderr
    words = [*program, "--run.root", "stopped", *send(sent, hook, 1, batch)]
    stopped = subprocess.run(words, capture_output=True, timeout=300, text=True)
    folder = workplace / "stopped" / "run" / "version_0"
    checkpoint = folder / "checkpoints" / "interrupted.ckpt"
    assert stopped.returncode != 0
    assert stopped.stderr.count("go on with --ckpt_path last") == 1, stopped.stderr
    words = [*program, "--run.root", "resumed", "--ckpt_path", str(checkpoint)]
    resumed = subprocess.run(words, capture_output=True, timeout=300, text=True)
    assert resumed.returncode == 0, resumed.stderr
    ends = [ended(workplace / name / "run" / "version_0") for name in ("whole", "resumed")]
    for name, value in ends[0]["checkpoint"]["state_dict"].items():
        assert torch.equal(ends[1]["checkpoint"]["state_dict"][name], value), name

"""What an offline run leaves for W&B, read back record by record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import yaml

from lightning_robust.callbacks import WandbRun
from lightning_robust.cli import main
from lightning_robust.loggers.weights_and_biases import kept_id, note_id, run_tags

CONFIG = """
model:
  class_path: ImageClassifier
  init_args:
    network: digits_cnn
    objective:
      class_path: PGDAdversarial
      init_args: {attack: {class_path: PGD, init_args: {eps: 0.1, steps: 1}}}
    optimizer: {name: adamw, lr: 0.01}
data: {class_path: Digits, init_args: {limit: {train: 100, test: 40}, val_size: 50, batch_size: 20}}
trainer:
  accelerator: cpu
  max_epochs: 3
  callbacks:
    - class_path: AdversarialAccuracy
      init_args:
        attacks:
          pgd: {class_path: PGD, init_args: {eps: 0.1, steps: 2}}
          fgsm: {class_path: FGSM, init_args: {eps: 0.1}}
        examples: 2
    - class_path: RobustnessCurve
      init_args: {eps: [0, 0.1]}
    - class_path: InputGradientMap
    - class_path: RobustCheckpoint
      init_args: {attack: pgd}
run: {wandb: offline, project: tests, tags: [mine]}
"""


@dataclass
class Read:
    """Records of the offline runs below a folder, in the order in which they were begun."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    args: list[str] = field(default_factory=list)

    def steps(self, name: str) -> list[int]:
        """Steps at which a number, figure (``._type``) or table was logged."""
        return [row["trainer/global_step"] for row in self.history if name in row]

    def of_type(self, kind: str) -> list[tuple[str, list[str], list[str]]]:
        """Name, aliases beside ``latest``, and files of each artifact of a type."""
        return [
            (
                one["name"],
                sorted({*one["aliases"]} - {"latest"}),
                sorted(file["path"] for file in one["manifest"]["contents"]),
            )
            for one in self.artifacts
            if one["type"] == kind
        ]


def read(folder: Path) -> Read:
    out = Read()
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        words = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        told = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout
        for record in map(json.loads, told.splitlines()):
            kind = record["type"]
            out.kinds.append(kind)
            if kind == "run":
                out.runs.append(record["run"])
            elif kind == "config":
                out.config |= record["config"]["update"]
            elif kind == "history":
                out.history.append(record["history"]["item"])
            elif kind == "summary":
                out.summary |= record["summary"].get("update", {})
            elif kind == "environment":
                out.args = record["environment"].get("args", out.args)
            elif kind == "artifact":
                out.artifacts.append(record["artifact"])
    return out


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick.yaml").write_text(CONFIG, encoding="utf-8")
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_RUN_GROUP"):
        monkeypatch.delenv(name, raising=False)

    def run(command: str, *words: str) -> None:
        main([command, "--config", "quick.yaml", *words])

    return run


EVALUATED = {"acc", "loss", "input_gradient_mean"} | {
    f"{kind}/{attack}" for kind in ("robust_acc", "success_rate") for attack in ("pgd", "fgsm", "worst_case")
}


def test_everything_promised_is_there_from_rank_zero_of_two(program: Callable[..., None]) -> None:
    program("train", "--trainer.devices", "2", "--trainer.strategy", "ddp_fork", "--run.group", "a group")
    folder = Path("runs/quick/version_0")
    got = read(folder)
    # ranks are forks: training and test are two files of one run, and no other process has written one
    ids = {run["run_id"] for run in got.runs}
    assert len(got.runs) == 2
    assert ids == {kept_id(folder)}
    assert got.kinds.count("exit") == 2
    for run in got.runs:
        assert (run["display_name"], run["project"], run["run_group"]) == ("quick/version_0", "tests", "a group")
        assert run["job_type"] == "train"
        assert run["tags"] == ["train", "ImageClassifier", "digits_cnn", "PGDAdversarial", "Digits", "mine"]
    # the run's config is config.yaml
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert got.config["model"] == saved["model"]
    assert got.config["trainer"]["max_epochs"] == 3
    # charts: every number at the step of its evaluation, once
    wanted = {f"val/{name}" for name in EVALUATED} | {f"test/{name}" for name in EVALUATED}
    logged = {name for row in got.history for name in row}
    assert wanted | {"train/loss", "train/acc"} <= logged
    steps = got.steps("val/acc")
    assert len(steps) == 3
    assert steps == sorted(set(steps))
    # heatmaps over time, at the steps of their evaluations
    assert got.steps("val/input_gradient._type") == steps
    # best so far and last: as numbers, which a sweep can look at, and in the summary
    for name, choose in (("val/acc", max), ("val/robust_acc/pgd", max), ("val/loss", min)):
        values = [row[name] for row in got.history if name in row]
        assert [row[f"best/{name}"] for row in got.history if f"best/{name}" in row] == [
            choose(values[: number + 1]) for number in range(3)
        ]
        assert got.steps(f"best/{name}") == steps
        assert got.summary[f"best/{name}"] == choose(values)
        assert got.summary[name] == values[-1]
    # figures and tables
    figures = {name.removesuffix("._type") for row in got.history for name in row if name.endswith("._type")}
    tables = {"robust_accuracy_per_class", "adversarial_examples_table_pgd", "adversarial_examples_table_fgsm"}
    drawn = {"input_gradient", "adversarial_examples_pgd", "adversarial_examples_fgsm", "robust_accuracy_curve_pgd"}
    assert figures == {f"test/{name}" for name in tables | drawn} | {"val/input_gradient"}
    examples = [files for name, _, files in got.of_type("run_table") if "adversarial_examples_table_pgd" in name]
    assert len(examples) == 1
    assert sum(file.endswith(".png") for file in examples[0]) >= 4
    # artifacts
    run_id = ids.pop()
    assert [(name, aliases) for name, aliases, _ in got.of_type("model")] == [
        (f"model-{run_id}", ["best-robust"]),
        (f"model-{run_id}", ["last"]),
    ]
    for artifact, file in zip([one for one in got.artifacts if one["type"] == "model"], ("best-", "last"), strict=True):
        (content,) = artifact["manifest"]["contents"]
        assert content["path"] == "model.ckpt"
        # in the run's folder, by its whole path: an upload may start anywhere
        assert Path(content["local_path"]).is_absolute()
        assert Path(content["local_path"]).name.startswith(file)
        assert Path(content["local_path"]).is_file()
    name, aliases, files = got.of_type("results")[-1]
    assert (name, aliases) == (f"results-{run_id}", ["last"])
    assert {"results.json", "config.yaml", "environment.json", "report.html"} < set(files)
    assert "tables/robust_accuracy_per_class_test.csv" in files


HUB = """
from lightning_robust.datamodules import Digits


class Hub(Digits):
    def __init__(self, token: str, mirror: str = "", **kwargs) -> None:
        super().__init__(**kwargs)
"""
SECRET = "hf_Abc123xyz"


def test_no_secret_leaves_the_run(
    program: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_hub.py").write_text(HUB, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    given = ("--data.limit", "20", "--data.val_size", "20", "--data.mirror", f"https://me:{SECRET}@example.org")
    program("fit", "--data", "a_hub.Hub", "--data.token", SECRET, *given, "--trainer.max_epochs", "1")
    folder = Path("runs/quick/version_0")
    # what runs the model again is whole
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["init_args"]["token"] == SECRET
    # what is shown, shared and uploaded is not
    records = [file for file in (folder / "wandb").rglob("*") if file.is_file()]
    assert any(file.suffix == ".wandb" for file in records)
    for file in (folder / "environment.json", folder / "report.html", *records):
        assert SECRET.encode() not in file.read_bytes(), file
    got = read(folder)
    assert got.config["data"]["init_args"]["token"] == "***"
    assert got.config["data"]["init_args"]["mirror"] == "https://me:***@example.org"
    assert "--data.token" in got.args
    assert got.args[got.args.index("--data.token") + 1] == "***"
    manifest = next(one for one in got.artifacts if one["type"] == "results")["manifest"]["contents"]
    shared = next(Path(one["local_path"]) for one in manifest if one["path"] == "config.yaml")
    told = yaml.safe_load(shared.read_text(encoding="utf-8"))
    assert told["data"]["init_args"]["token"] == "***"
    assert told["model"] == got.config["model"]


LEAVE = """
import pytorch_lightning as pl


class Leave(pl.Callback):
    def on_fit_end(self, trainer, pl_module) -> None:
        with open(f"{trainer.loggers[0].log_dir}/audit_defended.json", "w") as file:
            file.write("{}")
"""


def test_an_id_that_is_given_the_alias_best_and_a_dry_upload(
    program: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_leave.py").write_text(LEAVE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    best = "{class_path: ModelCheckpoint, init_args: {monitor: val/acc, mode: max, save_last: true}}"
    given = ("--trainer.callbacks", f"[{best}, {{class_path: a_leave.Leave}}]", "--run.wandb_id", "given123")
    program("fit", "--trainer.max_epochs", "1", "--data.limit", "20", "--data.val_size", "20", *given)
    folder = Path("runs/quick/version_0")
    got = read(folder)
    assert [run["run_id"] for run in got.runs] == ["given123"]
    assert kept_id(folder) == "given123"
    # where clean accuracy decides, the best is not called robust
    assert [aliases for _, aliases, _ in got.of_type("model")] == [["best"], ["last"]]
    assert "audit_defended.json" in got.of_type("results")[-1][2]
    # the command of the docs finds it, as far as it goes without an account
    (offline,) = folder.glob("wandb/offline-run-*")
    words = [sys.executable, "-m", "wandb", "sync", "--dry-run", str(offline)]
    told = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    assert "Would sync 1 run(s)" in told.stderr + told.stdout
    assert "run-given123.wandb" in told.stderr + told.stdout


def test_a_run_that_goes_on_is_one_run_in_wandb(program: Callable[..., None]) -> None:
    program("fit", "--trainer.max_epochs", "2")
    folder = Path("runs/quick/version_0")
    first = read(folder)
    program("fit", "--trainer.max_epochs", "3", "--ckpt_path", "last")
    both = read(folder)
    assert [run["run_id"] for run in both.runs] == [kept_id(folder)] * 2
    assert both.config["trainer"]["max_epochs"] == 3
    assert len(both.steps("val/acc")) == 3
    assert min(both.steps("val/acc")[2:]) > max(first.steps("val/acc"))
    # the best so far goes on where it was
    values = [row["val/acc"] for row in both.history if "val/acc" in row]
    assert both.summary["best/val/acc"] == max(values)
    environment = json.loads((folder / "environment.json").read_text())
    assert (environment["status"], environment["stages"]) == ("finished", ["fit"])


@pytest.mark.slow
def test_the_agent_of_a_sweep_names_the_run(program: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "fromagent")  # W&B looks at it once in a process
    words = ["fit", "--config", "quick.yaml", "--trainer.max_epochs", "1", "--run.artifacts", "false"]
    subprocess.run([sys.executable, "-m", "lightning_robust", *words], check=True, capture_output=True, timeout=240)
    got = read(Path("runs/quick/version_0"))
    assert [run["run_id"] for run in got.runs] == ["fromagent"]
    assert [one for one in got.artifacts if one["type"] in ("model", "results")] == []
    assert got.summary["best/val/robust_acc/pgd"] == got.summary["val/robust_acc/pgd"]


def test_ids_are_kept(tmp_path: Path) -> None:
    assert kept_id(tmp_path) is None
    note_id(tmp_path, "abc12345")
    note_id(tmp_path, "abc12345")
    assert kept_id(tmp_path) == "abc12345"
    assert os.listdir(tmp_path / "wandb") == ["run-id.txt"]


def test_tags_are_short_and_single() -> None:
    settings = {"model": "ImageClassifier", "model.network": "x" * 100, "data": "Digits", "model.objective": ""}
    assert run_tags("test", settings, ["Digits", "b"]) == ["test", "ImageClassifier", "x" * 64, "Digits", "b"]


def test_without_wandb_it_does_nothing(tmp_path: Path) -> None:
    trainer = pl.Trainer(default_root_dir=tmp_path, logger=False, enable_progress_bar=False)
    callback, module = WandbRun(), pl.LightningModule()
    callback.setup(trainer, module, "fit")
    callback.on_validation_end(trainer, module)
    callback.teardown(trainer, module, "fit")
    assert list(tmp_path.iterdir()) == []

"""What a run leaves behind: its folder, its table, and what Weights & Biases really holds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from lightning_robust.attacks import FGSM
from lightning_robust.callbacks import (
    AdversarialAccuracy,
    AttackProgress,
    InputGradientMap,
    PixelIoU,
    RobustCheckpoint,
    RobustnessCurve,
    RunResults,
)
from lightning_robust.errors import UserError
from lightning_robust.loggers import RunLogger, wandb_logger
from lightning_robust.objectives import PGDAdversarial

Make = Callable[..., Any]


def everything() -> list[pl.Callback]:
    fgsm = FGSM(eps=0.1)
    return [
        RunResults(),
        AdversarialAccuracy({"fgsm": fgsm}),
        RobustnessCurve([0, 0.1], attack=fgsm),
        InputGradientMap(),
        PixelIoU(),
        RobustCheckpoint("fgsm"),
    ]


def inspect(folder: Path) -> list[dict[str, Any]]:
    (run,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    words = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_wandb_holds_scalars_pictures_and_tables(
    model: Make, trainer: Make, digits: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_logger = RunLogger(str(tmp_path / "runs"), "run")
    run_logger.prepare()
    wandb = wandb_logger(run_logger.folder, "run", "test", "offline")
    assert wandb is not None
    run = trainer(*everything(), logger=[run_logger, wandb])
    module = model(objective=PGDAdversarial(attack=FGSM(eps=0.1, stop_at_success=False)))
    run.fit(module, digits())
    run.test(module, digits(), verbose=False)
    wandb.experiment.finish()

    records = inspect(run_logger.folder)
    text = json.dumps(records)
    for name, value in run.callback_metrics.items():
        assert name in text, name
        assert str(float(value))[:10] in text, name
    assert "val/robust_acc/fgsm" in text
    for name in ("test/input_gradient", "test/input_gradient_iou", "test/adversarial_examples_fgsm"):
        assert name in text
    assert "image-file" in text or "images/separated" in text
    assert "table-file" in text
    for table in ("robust_accuracy_per_class", "robust_accuracy_curve_pgd"):
        assert f"test/{table}" in text
    (media,) = run_logger.folder.glob("wandb/offline-run-*/files/media")
    pictures = list(media.rglob("*.png"))
    assert len(pictures) == 5  # the map after fit and test, IoU, examples, curve
    for picture in pictures:
        pixels = np.asarray(Image.open(picture).convert("L"))
        assert pixels.mean() > 100  # drawn on white: floats in [0, 1] would come out black
        assert pixels.min() < 100
    tables = [json.loads(path.read_text()) for path in media.rglob("*.table.json")]
    curves = [table for table in tables if "eps" in table["columns"]]
    assert [row[0] for row in curves[0]["data"]] == [0, 0.1]

    # W&B keeps a table with pictures as an artifact
    (files,) = [
        {file["path"]: Path(file["local_path"]) for file in record["artifact"]["manifest"]["contents"]}
        for record in records
        if record["type"] == "artifact" and "adversarial_examples_table_fgsm" in record["artifact"]["name"]
    ]
    examples = json.loads(files["test/adversarial_examples_table_fgsm.table.json"].read_text())
    columns = ["clean", "adversarial", "difference", "label", "clean prediction", "adversarial prediction"]
    assert examples["columns"] == columns
    assert len(examples["data"]) == 6
    tested = digits().dataset("test")
    clean = {(tested[index][0] * 255).round().byte().numpy().tobytes() for index in range(len(tested))}
    for row in examples["data"]:
        before, after, difference = (np.asarray(Image.open(files[cell["path"]])) for cell in row[:3])
        assert before.dtype == np.uint8
        assert before.shape == (8, 8)
        assert before.tobytes() in clean
        assert np.abs(after.astype(int) - before).max() <= np.ceil(0.1 * 255)
        change = np.sign(after.astype(int) - before)
        assert (np.sign(np.round((difference.astype(int) - 127.5) / 16)) * change >= 0).all()
        assert row[3] == row[4]  # the model was right


def test_the_folder_of_a_run(
    model: Make, trainer: Make, digits: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trainer(*everything(), logger=True, max_epochs=2)
    module = model(objective=PGDAdversarial(attack=FGSM(eps=0.1)))
    run.fit(module, digits())
    folder = tmp_path / "runs" / "run" / "version_0"
    fitted = json.loads((folder / "results.json").read_text())
    assert {"val/acc", "val/robust_acc/fgsm", "train/loss", "epochs", "time/fit_seconds"} <= fitted.keys()
    assert fitted["epochs"] == 2
    run.test(module, digits(), verbose=False)
    assert {path.name for path in folder.iterdir()} == {
        "metrics.csv",
        "results.json",
        "figures",
        "tables",
        "checkpoints",
    }
    results = json.loads((folder / "results.json").read_text())
    assert fitted.items() <= results.items()  # the test's results join those of fit
    assert list(results) == sorted(results)
    for name, value in run.callback_metrics.items():
        assert results[name] == pytest.approx(float(value)), name
    told = capsys.readouterr().out
    assert f"{100 * results['test/robust_acc/fgsm']:.2f} %" in told
    assert f"{100 * results['test/acc']:.2f} %" in told
    assert f"{results['test/input_gradient_iou']:.4f}" in told
    assert f"Run folder: {folder}" in told
    assert str(folder / "figures" / "input_gradient_test.png") in told
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]  # no temporary file is left


def test_results_of_a_fit_and_its_test(model: Make, trainer: Make, digits: Make, tmp_path: Path) -> None:
    """The checkpoint that is tested holds results of the fit, as they were at its epoch; they take nobody's place."""
    run = trainer(*everything(), logger=True)
    module = model(objective=PGDAdversarial(attack=FGSM(eps=0.1)))
    run.fit(module, digits())
    folder = tmp_path / "runs" / "run" / "version_0"
    fitted = json.loads((folder / "results.json").read_text())
    checkpoint = str(folder / "checkpoints" / "last.ckpt")
    run.test(module, digits(), ckpt_path=checkpoint, verbose=False)
    both = json.loads((folder / "results.json").read_text())
    assert {"epochs", "time/fit_seconds", "time/test_seconds", "test/acc"} <= both.keys()
    assert fitted.items() <= both.items()

    later = trainer(*everything(), logger=True)
    later.test(model(objective=module.objective), digits(), ckpt_path=checkpoint, verbose=False)
    alone = json.loads((folder.with_name("version_1") / "results.json").read_text())
    assert "test/acc" in alone
    assert not [name for name in alone if not name.startswith("test/") and name != "time/test_seconds"]


def test_the_table_stands_below_the_bar(
    model: Make, trainer: Make, digits: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bar = AttackProgress()
    live: list[bool] = []

    def report(self: RunResults, run: pl.Trainer, stage: str) -> None:
        live.append(bar.progress.live.is_started)

    monkeypatch.setattr(RunResults, "_report", report)
    run = trainer(RunResults(), bar, logger=True)
    run.test(model(), digits(), verbose=False)
    run.validate(model(), digits(), verbose=False)
    run.fit(model(), digits())
    assert live == [False, False]  # after each evaluation, with the bar at rest


def test_results_so_far_after_a_failure(model: Make, trainer: Make, digits: Make, tmp_path: Path) -> None:
    class Fail(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.current_epoch == 1:
                raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        trainer(*everything(), Fail(), logger=True, max_epochs=3).fit(
            model(objective=PGDAdversarial(attack=FGSM(eps=0.1))), digits()
        )
    folder = tmp_path / "runs" / "run" / "version_0"
    assert "val/robust_acc/fgsm" in json.loads((folder / "results.json").read_text())
    assert len((folder / "metrics.csv").read_text().splitlines()) == 2
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 0


def test_a_folder_that_cannot_be_made_stops_the_run_before_training(
    model: Make, trainer: Make, digits: Make, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    steps: list[int] = []

    class Count(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            steps.append(1)

    run = trainer(RunResults(), Count(), logger=RunLogger(str(tmp_path / "file"), "run"))
    with pytest.raises(UserError, match=r"cannot be written .*--run\.root"):
        run.fit(model(), digits())
    assert not steps


def test_fast_dev_run_leaves_nothing(model: Make, trainer: Make, digits: Make, tmp_path: Path) -> None:
    run = trainer(*everything(), fast_dev_run=True)
    run.fit(model(objective=PGDAdversarial(attack=FGSM(eps=0.1))), digits())
    run.test(model(), digits(), verbose=False)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]

"""The command ``report``, and the page at the end of every run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import pytorch_lightning as pl

from lightning_robust.callbacks import RunPage
from lightning_robust.cli import main
from lightning_robust.report.page import MARK

from .conftest import Program
from .test_runs import HELPERS

RUN = Path("runs/quick/version_0")


def environment() -> dict[str, object]:
    told = json.loads((RUN / "environment.json").read_text())
    assert isinstance(told, dict)
    return told


@pytest.fixture
def helpers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (folder / "helpers_of_the_page.py").write_text(HELPERS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    return "helpers_of_the_page"


def test_a_run_ends_with_its_page(program: Program) -> None:
    result = program("train", "--config", "quick.yaml")
    assert result.status == 0, result.err
    assert result.out.count(f"Page: {RUN / 'report.html'}") == 1
    text = (RUN / "report.html").read_text()
    accuracy = json.loads((RUN / "results.json").read_text())["test/acc"]
    assert MARK in text
    assert f"{100 * accuracy:.2f} %" in text
    assert "ImageClassifier, digits_cnn" in text
    assert "Nothing that this run should have left behind." in text
    told = environment()
    assert (told["status"], told["stages"]) == ("finished", ["fit", "test"])
    assert told["devices"]["count"] == 1  # type: ignore[index]
    assert {"python", "torch", "lightning-robust"} <= set(told["versions"])  # type: ignore[call-overload]
    assert told["command"][1:] == ["train", "--config", "quick.yaml"]  # type: ignore[index]
    assert told["ended"] >= told["started"]  # type: ignore[operator]


def test_shipped_configs_are_named_as_they_are_typed(program: Program) -> None:
    short = ("--trainer.max_epochs", "1", "--data.limit", "10", "--trainer.callbacks", "[]", "--run.wandb", "off")
    assert program("fit", "--config", "quickstart", *short).status == 0
    told = json.loads(Path("runs/quickstart/version_0/environment.json").read_text())
    assert told["command"][1:] == ["fit", "--config", "quickstart", *short]


def test_of_two_devices_one_writes_the_page(program: Program) -> None:
    two = ("--trainer.devices", "2", "--trainer.strategy", "ddp_fork")
    result = program("train", "--config", "quick.yaml", *two)
    assert result.status == 0, result.err
    assert (RUN / "report.html").is_file()
    assert environment()["devices"]["count"] == 2  # type: ignore[index]
    assert [path.name for path in Path("runs").rglob("report.html")] == ["report.html"]


def test_a_run_that_fails_shows_what_it_had(program: Program, helpers: str) -> None:
    given = (f"--trainer.callbacks+={helpers}.Raises", "--trainer.callbacks.kind=mistake")
    assert program("fit", "--config", "quick.yaml", *given).status == 2
    assert environment()["status"] == "failed"
    assert "the image x.png is broken" in str(environment()["error"])
    assert "The run failed (UserError: the image x.png is broken)" in (RUN / "report.html").read_text()


def test_a_run_that_is_interrupted_shows_what_it_had(program: Program, helpers: str) -> None:
    given = (f"--trainer.callbacks+={helpers}.Raises", "--trainer.callbacks.kind=interrupt")
    assert program("fit", "--config", "quick.yaml", *given).status == 130
    assert environment()["status"] == "interrupted"
    assert "The run was interrupted" in (RUN / "report.html").read_text()


def test_a_page_that_cannot_be_made_costs_a_sentence(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise MemoryError("no room to draw")

    monkeypatch.setattr("lightning_robust.callbacks.run_page.write_page", fail)
    with pytest.warns(
        UserWarning, match="the run's page was not made .MemoryError: no room to draw.; the results are in"
    ):
        result = program("train", "--config", "quick.yaml")
    assert result.status == 0
    assert "clean accuracy" in result.out
    assert "Page:" not in result.out
    assert "test/acc" in json.loads((RUN / "results.json").read_text())


def test_fast_dev_run_leaves_nothing(program: Program) -> None:
    assert program("fit", "--config", "quick.yaml", "--trainer.fast_dev_run", "true").status == 0
    assert not Path("runs").exists()


def test_nothing_without_a_folder(tmp_path: Path) -> None:
    trainer = pl.Trainer(default_root_dir=tmp_path, logger=False, enable_progress_bar=False)
    callback, module = RunPage(), pl.LightningModule()
    callback.setup(trainer, module, "fit")
    callback.teardown(trainer, module, "fit")
    assert list(tmp_path.iterdir()) == []


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        folder = tmp_path / "runs" / "quick" / f"version_{number}"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"test/acc": 0.5 + number / 4}))
    return tmp_path / "runs" / "quick"


def test_one_run_gets_its_page(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(runs / "version_1")])
    assert re.fullmatch(r"Page: .*version_1/report\.html \(1 run, 0\.\d MB\)\n", capsys.readouterr().out)
    assert "75.00 %" in (runs / "version_1" / "report.html").read_text()


def test_several_runs_share_one(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(runs)])
    assert "Page: report.html (2 runs" in capsys.readouterr().out
    assert "+25.00 points better" in Path("report.html").read_text()
    main(["report", str(runs / "version_1"), str(runs / "version_0"), "--out", "sub/other.html"])
    assert "−25.00 points worse" in Path("sub/other.html").read_text()
    main(["report", "--out=third.html", str(runs / "version_0")])
    assert Path("third.html").is_file()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["runs/absent"], "there is no folder runs/absent: give the folder of a run"),
        (["runs/empty"], "runs/empty is no run's folder and holds none"),
        (["runs/quick/version_0", "--ou", "x"], "report has no option --ou"),
        (["--out"], "--out needs a file"),
        (["--out", "x.html"], "report needs the folder of a run"),
        (["runs/quick/version_0", "--out", "notes.txt"], "notes.txt exists and is no page of this program"),
        (["runs/quick/version_0", "--out", "notes.txt/page.html"], "notes.txt/page.html cannot be written"),
    ],
)
def test_mistakes(words: list[str], told: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs.parent / "empty").mkdir()
    Path("notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        main(["report", *words])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert told in err
    assert len(err.splitlines()) == 1
    assert Path("notes.txt").read_text() == "mine"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["report"], ["report", "--help"]):
        main(words)
        assert "usage: lightning-robust report RUN" in capsys.readouterr().out

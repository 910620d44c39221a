"""``train --seeds``: repetitions in folders of their own, mean and deviation above them."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

from lightning_robust.cli import seeds as repeat

from .conftest import Program

GROUP = Path("runs/quick/version_0")


def result_page() -> str:
    return (GROUP / "report.html").read_text(encoding="utf-8")


class Repetitions:
    """Stands for the processes: notes their words, and leaves behind what a run leaves."""

    def __init__(self, *status: int) -> None:
        self.words: list[list[str]] = []
        self._status = status

    def __call__(self, words: list[str]) -> int:
        number = len(self.words)
        self.words.append(words)
        given = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
        folder = Path("runs") / given["run.name"] / given["run.version"]
        status = self._status[number] if number < len(self._status) else 0
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(f"seed_everything: {given['seed_everything']}\n")
        if not status:
            (folder / "results.json").write_text(json.dumps({"test/acc": 0.5 + int(given["seed_everything"]) / 10}))
        return status


@pytest.fixture
def repetitions(monkeypatch: pytest.MonkeyPatch) -> Repetitions:
    found = Repetitions()
    monkeypatch.setattr(repeat, "_run_one", found)
    return found


def test_seeds_are_counted_from_the_configs(program: Program, repetitions: Repetitions) -> None:
    result = program("train", "--config", "quick.yaml", "--seeds", "3", "--trainer.max_epochs", "2")
    assert result.status == 0, result.err
    assert [path.name for path in sorted(GROUP.glob("seed_*"))] == ["seed_0", "seed_1", "seed_2"]
    for seed, words in enumerate(repetitions.words):
        assert "--seeds" not in words
        assert {
            f"--seed_everything={seed}", f"--model.seed={seed}", f"--run.version=version_0/seed_{seed}",
            "--run.group=quick/version_0", "--run.name=quick",
        } <= set(words)  # fmt: skip
    assert json.loads((GROUP / "results.json").read_text()) == {"test/acc": pytest.approx(0.6)}
    assert "60.00 ± 10.00 %" in result.out
    assert "60.00 ± 10.00 %" in (GROUP / "report.html").read_text()
    assert f"Page: {GROUP / 'report.html'}" in result.out
    command = "lightning-robust train --config quick.yaml --seeds 3 --trainer.max_epochs 2"
    assert command in re.sub("</?span>", "", result_page())
    # the next group is the next version
    assert program("train", "--config", "quick.yaml", "--seeds=2", "--seed_everything", "7").status == 0
    assert [path.name for path in sorted(Path("runs/quick/version_1").glob("seed_*"))] == ["seed_7", "seed_8"]


def test_seeds_may_be_named_and_what_is_typed_stays(program: Program, repetitions: Repetitions) -> None:
    typed = ("--model.seed", "5", "--run.group", "mine", "--run.name", "other", "--run.version", "v")
    assert program("train", "--config", "quick.yaml", "--seeds", "[7, 42]", *typed).status == 0
    assert [path.name for path in sorted(Path("runs/other/v").glob("seed_*"))] == ["seed_42", "seed_7"]
    assert not any(word.startswith(("--model.seed=", "--run.group=")) for words in repetitions.words for word in words)


def test_the_group_keeps_no_secret(program: Program, repetitions: Repetitions) -> None:
    words = ("--model.weights", "https://me:hf_Abc@example.org/w.pt")
    assert program("train", "--config", "quick.yaml", "--seeds", "2", *words).status == 0
    assert words[1] in repetitions.words[0]
    told = json.loads((GROUP / "environment.json").read_text())["command"]
    assert told[-2:] == ["--model.weights", "https://me:***@example.org/w.pt"]
    assert "hf_Abc" not in result_page()


def test_a_repetition_that_fails_costs_only_itself(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeat, "_run_one", Repetitions(0, 1))
    result = program("train", "--config", "quick.yaml", "--seeds", "3")
    assert result.status == 1
    assert "1 of 3 repetitions failed" in result.out
    assert "60.00 ± 14.14 %" in result.out  # of seeds 0 and 2
    told = json.loads((GROUP / "seeds.json").read_text())
    assert told["failed"] == {"seed_1": "this repetition ended with status 1 and does not count"}
    assert "seed_1: this repetition ended with status 1" in (GROUP / "report.html").read_text()


def test_a_mistake_in_the_settings_is_made_once(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    once = Repetitions(2)
    monkeypatch.setattr(repeat, "_run_one", once)
    assert program("train", "--config", "quick.yaml", "--seeds", "3").status == 2
    assert len(once.words) == 1


def test_ctrl_c_ends_all_and_keeps_what_is_done(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = Repetitions(0, 130)
    monkeypatch.setattr(repeat, "_run_one", stopped)
    assert program("train", "--config", "quick.yaml", "--seeds", "4").status == 130
    assert len(stopped.words) == 2
    assert json.loads((GROUP / "results.json").read_text()) == {"test/acc": 0.5}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--seeds"], "--seeds : give a number of repetitions"),
        (["--seeds", "three"], "--seeds three: give a number of repetitions"),
        (["--seeds", "0"], "--seeds 0: give 1 to 100 repetitions"),
        (["--seeds", "1,1"], "a seed stands twice"),
        (["--seeds", "2", "--ckpt_path", "x.ckpt"], "each repetition starts anew"),
        (["--seeds", "2", "--trainer.fast_dev_run", "true"], "leave --seeds out"),
    ],
)
def test_mistakes(words: list[str], told: str, program: Program, repetitions: Repetitions) -> None:
    assert told in program("train", "--config", "quick.yaml", *words).error
    assert repetitions.words == []
    assert not Path("runs").exists()


def test_processes_that_others_started(
    program: Program, repetitions: Repetitions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    error = program("train", "--config", "quick.yaml", "--seeds", "2").error
    assert "under torchrun or srun start one run for each seed with --seed_everything" in error


def test_the_settings_can_be_printed(program: Program, repetitions: Repetitions) -> None:
    result = program("train", "--config", "quick.yaml", "--seeds", "2", "--print_config")
    assert result.status == 0
    assert "network: digits_cnn" in result.out
    assert repetitions.words == []


@pytest.mark.slow
def test_real_repetitions_differ_and_one_repeats(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    for _ in range(2):
        assert program("train", "--config", "quick.yaml", "--seeds", "2").status == 0

    def results(group: str, seed: int) -> dict[str, float]:
        told = json.loads(Path(f"runs/quick/{group}/seed_{seed}/results.json").read_text())
        return {name: value for name, value in told.items() if not name.startswith("time/")}

    assert results("version_0", 0) == results("version_1", 0)
    assert results("version_0", 0)["test/loss"] != results("version_0", 1)["test/loss"]
    assert "± " in (GROUP / "report.html").read_text()
    assert (GROUP / "seed_1" / "report.html").is_file()

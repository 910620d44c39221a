"""Runs the program inside the test's process, in a folder of its own."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lightning_robust.cli import main
from lightning_robust.cli.run import RobustCLI

QUICK = """
model:
  class_path: ImageClassifier
  init_args:
    network: digits_cnn
    objective:
      class_path: PGDAdversarial
      init_args:
        attack: {class_path: PGD, init_args: {eps: 0.2, steps: 2}}
data: {class_path: Digits, init_args: {limit: 20, val_size: 20}}
trainer:
  accelerator: cpu
  max_epochs: 1
run: {wandb: "off"}
"""


@dataclass
class Outcome:
    """How a run of the program ended."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The message to the user, which is all that is said of a mistake."""
        assert self.status == 2, f"status {self.status}\n{self.err}"
        assert "Traceback" not in self.err
        told = [line for line in self.err.splitlines() if line.startswith("lightning-robust: error: ")]
        assert len(told) == 1, self.err
        assert len(self.err[self.err.index(told[0]) :].splitlines()) <= 3
        assert "<class" not in told[0]
        assert "typing." not in told[0]
        return told[0].removeprefix("lightning-robust: error: ")


Program = Callable[..., Outcome]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a config ``quick.yaml``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick.yaml").write_text(QUICK, encoding="utf-8")
    return tmp_path


@pytest.fixture
def program(folder: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Program]:
    """``program("fit", "--config", "quick.yaml")``: runs it and tells how it ended."""
    interrupt, terminate = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def run(*words: str) -> Outcome:
        capfd.readouterr()
        try:
            main(list(words))
            status = 0
        except SystemExit as ended:
            status = int(ended.code or 0)
        said = capfd.readouterr()
        return Outcome(status, said.out, said.err)

    yield run
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, terminate)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[RobustCLI]:
    """Collects what the commands make of the settings, and keeps them from running."""
    found: list[RobustCLI] = []
    monkeypatch.setattr(RobustCLI, "_run_subcommand", lambda self, subcommand: found.append(self))
    return found


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[RobustCLI]:
    """Collects what the commands have run with."""
    found: list[RobustCLI] = []
    run: Any = RobustCLI._run_subcommand

    def kept(self: RobustCLI, subcommand: str) -> None:
        found.append(self)
        run(self, subcommand)

    monkeypatch.setattr(RobustCLI, "_run_subcommand", kept)
    return found

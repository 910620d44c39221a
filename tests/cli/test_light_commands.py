"""What must answer at once: help, version and the list of configs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lightning_robust import __version__
from lightning_robust.cli import COMMANDS, main
from lightning_robust.cli.configs import shipped
from lightning_robust.errors import UserError

HEAVY = ("torch", "numpy", "pytorch_lightning", "jsonargparse", "matplotlib", "wandb", "yaml")


@pytest.mark.parametrize(
    "words", [["--help"], ["-h"], [], ["--version"], ["configs"], ["configs", "quickstart"], ["fitt"]], ids=str
)
def test_loads_nothing_heavy(words: list[str]) -> None:
    # fast by construction: what costs the seconds is never imported
    code = (
        "import sys\nfrom lightning_robust.cli import main\n"
        f"try: main({words!r})\nexcept SystemExit: pass\n"
        f"print('LOADED', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "LOADED []"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    out = capsys.readouterr().out
    assert all(f"  {command} " in out for command in COMMANDS)


def test_runs_as_a_module() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "lightning_robust", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout == f"lightning-robust {__version__}\n"


def test_configs_lists_each_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["configs"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped())
    assert lines[0].startswith("quickstart ")
    assert all(len(line.split()) > 5 for line in lines)


def test_configs_prints_the_one_that_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    main(["configs", "cifar10/at"])
    assert capsys.readouterr().out == shipped()["cifar10/at"].read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["fitt"], "did you mean fit?"),
        (["configs", "quikstart"], "did you mean quickstart?"),
        (["--config", "quickstart"], "there is no command '--config'"),
    ],
)
def test_wrong_names(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert told in err
    assert len(err.splitlines()) == 1


def test_a_users_mistake_is_a_value_error_in_python() -> None:
    assert issubclass(UserError, ValueError)

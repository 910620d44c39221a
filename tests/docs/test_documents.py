"""What the documents say can be followed: links, scripts, modules, shipped configs and every command's options."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml

from lightning_robust.cli import COMMANDS, main
from lightning_robust.cli.configs import shipped

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def text(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def commands(document: Path) -> list[str]:
    """Every call of the program in it, one line each."""
    joined = re.sub(r"\\\n\s*", " ", text(document))
    return [found.strip() for found in re.findall(r"(?:lightning-robust|-m lightning_robust) ([^`\n]*)", joined)]


def words(command: str) -> list[str]:
    return shlex.split(command.split("&&")[0], comments=True)


ALL = sorted({command for document in DOCUMENTS for command in commands(document)})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_pictures_exist_and_nothing_is_left_to_fill_in(document: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", text(document))
    links += re.findall(r'<img src="(?!https?://)([^"]+)"', text(document))
    assert [link for link in links if not (document.parent / link).exists()] == []
    assert "@@" not in text(document)
    assert "TODO" not in text(document)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_scripts_that_are_named_exist(document: Path) -> None:
    scripts = re.findall(r"\b((?:benchmarks|docs|tests|\.ci)/[\w/]+\.(?:py|sh))\b", text(document))
    assert [script for script in scripts if not (ROOT / script).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_modules_that_are_run_exist(document: Path) -> None:
    modules = re.findall(r"python3? -m ([\w.]+)", text(document))
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_configs_that_are_named_are_shipped(document: Path) -> None:
    named = re.findall(r"--config[ =]([\w./-]+)", text(document))
    unknown = [name for name in named if name not in shipped() and name != "NAME" and not name.endswith(".yaml")]
    assert unknown == []


def test_commands_are_found() -> None:
    assert len(ALL) >= 20
    named = {words(command)[0] for command in ALL if words(command)}
    assert named >= {"train", "fit", "test"}
    assert named <= {*COMMANDS, "--help"}


@pytest.mark.parametrize("command", [command for command in ALL if "--config" in command])
def test_commands_parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every option that a document gives exists, and its value is one."""
    given = words(command)
    if "--ckpt_path" in given:  # there is no run yet
        place = given.index("--ckpt_path")
        given = given[:place] + given[place + 2 :]
    with pytest.raises(SystemExit) as ended:
        main([*given, "--print_config"])
    said = capsys.readouterr()
    assert not ended.value.code, said.err
    assert yaml.safe_load(said.out)["model"]["class_path"].startswith("lightning_robust.")

"""The shipped configs: where they are, what they are called, and their one line."""

from __future__ import annotations

import difflib
from pathlib import Path

from lightning_robust.errors import UserError

FOLDER = Path(__file__).resolve().parent.parent / "configs"
_SWEEPS = "sweep/"


def sweeps() -> dict[str, Path]:
    """Name to file of every shipped sweep of W&B, which ``wandb sweep`` reads and ``--config`` does not."""
    return {name: file for name, file in sorted(_files().items()) if name.startswith(_SWEEPS)}


def _files() -> dict[str, Path]:
    return {str(file.relative_to(FOLDER).with_suffix("").as_posix()): file for file in FOLDER.rglob("*.yaml")}


def shipped() -> dict[str, Path]:
    """Name to file of every shipped config, ``quickstart`` first."""
    files = {name: file for name, file in _files().items() if not name.startswith(_SWEEPS)}
    return dict(sorted(files.items(), key=lambda item: (item[0] != "quickstart", "/" in item[0], item[0])))


def summary(file: Path) -> str:
    """The first line of the comment that opens a config."""
    return file.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ").rstrip()


def print_configs(words: list[str]) -> None:
    """List the shipped configs with one line each, or print those named.

    Raises:
        UserError: for a name that is not shipped.
    """
    if words and words[0] in ("-h", "--help"):
        print("usage: lightning-robust configs [NAME ...]\n\nList the shipped configs, or print those named.")
        print("\nSweeps for `wandb sweep`, which is given the file that is printed:")
        for name, file in sweeps().items():
            print(f"  {name}  {summary(file)}")
        return
    if words:
        for word in words:
            print((sweeps().get(word.removesuffix(".yaml")) or resolve(word)).read_text(encoding="utf-8"), end="")
        return
    found = shipped()
    width = max(map(len, found))
    for name, file in found.items():
        print(f"{name:<{width}}  {summary(file)}")


def resolve(name: str) -> Path:
    """The file of a config that is given by path or by shipped name.

    Raises:
        UserError: if there is neither, with the nearest shipped name.
    """
    path = Path(name)
    if path.is_file():
        return path
    found = shipped()
    short = name.removesuffix(".yaml")
    if short in found:
        return found[short]
    if short in sweeps():
        raise UserError(
            f"--config {name} is a sweep: `lightning-robust configs {short} > sweep.yaml`, then "
            "`wandb sweep sweep.yaml`"
        )
    if path.is_dir():
        raise UserError(f"--config {name} is a folder: give a YAML file or the name of a shipped config")
    nearest = difflib.get_close_matches(name, found, n=1)
    hint = f": did you mean {nearest[0]}?" if nearest else "."
    raise UserError(
        f"--config {name}: there is no such file and no shipped config of that name{hint} "
        "`lightning-robust configs` lists the shipped ones"
    )

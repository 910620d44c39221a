"""What the commands that sum up several runs share: their arguments, the runs' results, and their messages."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_robust.errors import UserError


def results_of(run: str | Path) -> tuple[Path, dict[str, Any]]:
    """Read the results of a run.

    Args:
        run: its folder, or its ``results.json``.

    Returns:
        The file, and its numbers by name.

    Raises:
        UserError: for what is no run, and a broken file.
    """
    file = Path(run)
    file = file / "results.json" if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"{run} is no run: give folders that hold a results.json")
    try:
        results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{file} is broken: it holds no JSON") from None
    return file, results


def runs_parser(module: str, description: str, *, each: str, out: str, name: str) -> argparse.ArgumentParser:
    """The arguments that such a command has in any case.

    Args:
        module: what ``python -m`` runs.
        description: what it does, in a sentence.
        each: what there is one run for.
        out: where it writes, by default.
        name: of the study, by default.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("runs", nargs="+", metavar="RUN", help=f"folder of a run, one for each {each}")
    parser.add_argument("--out", default=out, help="folder for tables and figures (default: %(default)s)")
    parser.add_argument("--name", default=name, help="the study's name (default: %(default)s)")
    parser.add_argument("--stage", default="test", choices=("test", "val"), help="default: %(default)s")
    return parser


@contextmanager
def said_in_a_line() -> Iterator[None]:
    """A mistake of the user's ends the program with its sentence and status 2."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None

"""Reads the files of a run's folder: one that is missing or broken costs a sentence and nothing else."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")
Rows = list[dict[str, str]]

_MOST_CHARACTERS = 32 * 2**20  # of a text file: above that, it is none of ours
# what reading a file of another form than ours raises
_BROKEN = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, csv.Error, yaml.YAMLError)


def read_file(
    file: Path, parse: Callable[[str], T], say: Callable[[str], None], *, absent: str = "", optional: bool = False
) -> T | None:
    """What a file holds.

    Args:
        file: its path.
        parse: reads its text.
        say: is told in a sentence that it is missing or broken; the result is then ``None``.
        absent: that sentence, for a missing one.
        optional: say nothing of a missing one.
    """
    if not file.is_file():
        if not optional:
            say(absent or f"{file.name} is missing")
        return None
    place = f"{file.parent.name}/{file.name}" if file.parent.name == "tables" else file.name
    try:
        if file.stat().st_size > _MOST_CHARACTERS:
            raise ValueError(f"it has more than {_MOST_CHARACTERS // 2**20} MiB")
        return parse(file.read_text(encoding="utf-8"))
    except OSError as error:
        say(f"{place} cannot be read: {error.strerror}")
    except (*_BROKEN, RecursionError) as error:
        say(f"{place} is broken and left out: {_reason(error)}")
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is no text in UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} in line {error.lineno}"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem or 'it is no YAML'} in line {error.problem_mark.line + 1}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, AttributeError | TypeError | LookupError):
        return "it does not hold what such a file holds"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def mapping(text: str) -> dict[str, Any]:
    """JSON with names and values."""
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError("it holds no names with values")
    return values


def yaml_mapping(text: str) -> dict[str, Any]:
    """YAML with settings."""
    values = yaml.safe_load(text)
    if not isinstance(values, dict):
        raise ValueError("it holds no settings")
    return values


def named_numbers(text: str) -> dict[str, float]:
    """JSON with names and numbers; null is NaN, and what is no number is left out."""
    values = mapping(text)
    return {
        str(name): math.nan if value is None else float(value)
        for name, value in values.items()
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    }


def table_rows(text: str) -> Rows:
    """The rows of a table, column to text."""
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise ValueError(f"row {number + 1} has not as many values as there are columns")
    return rows


def row_numbers(row: dict[str, str]) -> dict[str, float]:
    """The numbers of a row; empty cells and texts are left out."""
    out = {}
    for name, value in row.items():
        try:
            out[name] = float(value)
        except ValueError:
            continue
    return out

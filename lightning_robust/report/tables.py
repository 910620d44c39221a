"""Tables and numbers: as files, and in the terminal."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lightning_robust.report.atomic import atomic_file

Row = Mapping[str, Any]


def write_csv(path: str | Path, rows: Sequence[Row], columns: Sequence[str] | None = None) -> Path:
    """Write a table atomically, UTF-8, with a line of column names.

    Args:
        path: the file; missing folders are made.
        rows: one mapping a row. A value that a row lacks, or ``None``, is left empty; numbers keep all their digits.
        columns: names and order of the columns; default all that occur, in the order of their first occurrence. Values
            of other columns are left out.

    Returns:
        The path written.

    Example:
        >>> import tempfile
        >>> path = write_csv(Path(tempfile.mkdtemp()) / "t.csv", [{"class": "cat", "acc": 0.5}, {"class": "dog"}])
        >>> path.read_text().splitlines()
        ['class,acc', 'cat,0.5', 'dog,']
    """
    path, names = Path(path), _columns(rows, columns)
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        if names:
            writer.writeheader()
        writer.writerows({name: _plain(value) for name, value in row.items()} for row in rows)
    return path


def write_json(path: str | Path, mapping: Mapping[str, Any]) -> Path:
    r"""Write a mapping atomically as JSON that every reader takes: NaN and ±infinity become null.

    Args:
        path: the file; missing folders are made.
        mapping: strings, numbers, bools, ``None``, paths, tensors and arrays, in mappings and sequences.

    Returns:
        The path written.

    Raises:
        TypeError: for a value that JSON has no form for.

    Example:
        >>> import tempfile
        >>> write_json(Path(tempfile.mkdtemp()) / "r.json", {"acc": float("nan")}).read_text()
        '{\n  "acc": null\n}\n'
    """
    text = json.dumps(_json(mapping), indent=2, ensure_ascii=False, allow_nan=False)
    path = Path(path)
    with atomic_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def print_table(
    title: str, rows: Sequence[Row], columns: Sequence[str] | None = None, file: TextIO | None = None
) -> None:
    """Print a table: in colour and folded to the width of a terminal; elsewhere plain and as wide as it needs.

    No name and no number is ever cut.

    Args:
        title: stands above the table.
        rows: one mapping a row; a value that a row lacks, ``None`` and NaN are printed as –.
        columns: names and order of the columns; default all that occur, in the order of their first occurrence.
        file: where to; default the standard output.
    """
    file = sys.stdout if file is None else file
    terminal = file.isatty()
    # no automatic detection: variables such as FORCE_COLOR would put colour codes into a log file
    console = Console(
        file=file,
        force_terminal=terminal,
        color_system="auto" if terminal else None,
        force_jupyter=False,
        highlight=False,
        markup=False,
        emoji=False,
    )
    names = _columns(rows, columns)
    # texts and not strings: rich would read "[0, 1]" or ":+1:" in a name as markup
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    for name in names:
        numbers = [value for value in (_plain(row.get(name)) for row in rows) if value is not None]
        right = bool(numbers) and all(isinstance(value, int | float) for value in numbers)
        table.add_column(Text(str(name)), justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_printed(row.get(name))) for name in names))
    if not terminal:
        needed = Measurement.get(console, console.options.update(max_width=100_000), table).maximum
        console.width = max(needed, len(title), 80)
    console.print(Text(title, style="bold", overflow="fold"))
    console.print(table)


def _columns(rows: Sequence[Row], columns: Sequence[str] | None) -> list[str]:
    return list(columns) if columns is not None else list(dict.fromkeys(name for row in rows for name in row))


def _plain(value: Any) -> Any:
    """A tensor's or array's one number as Python's; other values as they are."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    if isinstance(value, np.ndarray | np.generic):
        return value.item() if value.size == 1 else value.tolist()
    return value


def _printed(value: Any) -> str:
    value = _plain(value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.3e}"


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json(entry) for key, entry in value.items()}
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return _json(value.tolist())
    if isinstance(value, list | tuple):
        return [_json(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

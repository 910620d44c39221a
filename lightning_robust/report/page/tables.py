"""Tables of a run's folder for the page: numbers written short, with all their digits to sort by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_robust.report.page.words import measure, number, words_of

_MOST_ROWS = 300
_FEW_ROWS = 24
_STAGE_WORDS = {"test": "test", "val": "validation"}


@dataclass(frozen=True)
class PageTable:
    """A table as it goes into the page.

    Args:
        title: in words.
        columns: names in words.
        numeric: whether a column holds numbers.
        rows: (text, value to sort by) of each cell.
        long: whether it is folded away at first.
    """

    title: str
    columns: tuple[str, ...]
    numeric: tuple[bool, ...]
    rows: tuple[tuple[tuple[str, str], ...], ...]
    long: bool


def page_table(name: str, rows: Sequence[dict[str, str]]) -> tuple[PageTable, int]:
    """A table, and how many of its rows are left out.

    Args:
        name: the file's, without suffix.
        rows: column to text.
    """
    columns = list(rows[0]) if rows else []
    shown = rows[:_MOST_ROWS]
    numeric = tuple(_numbers([row[column] for row in rows]) for column in columns)
    cells = tuple(
        tuple(_cell(name, row[column], is_number) for column, is_number in zip(columns, numeric, strict=True))
        for row in shown
    )
    words, _, stage = name.rpartition("_")
    title = f"{words_of(words)} ({_STAGE_WORDS[stage]})" if words and stage in _STAGE_WORDS else words_of(name)
    table = PageTable(title, tuple(map(words_of, columns)), numeric, cells, len(shown) > _FEW_ROWS)
    return table, len(rows) - len(shown)


def _numbers(cells: Sequence[str]) -> bool:
    """Whether all cells are numbers or empty, and one at least is none of the latter."""
    try:
        return len([float(cell) for cell in cells if cell != ""]) > 0
    except ValueError:
        return False


def _cell(table: str, text: str, is_number: bool) -> tuple[str, str]:
    if text == "":
        return "–", ""
    if not is_number:
        if table == "seeds" and "/" in text:  # names of numbers
            what = measure(text)
            return f"{what.label} ({what.stage})" if what.stage else what.label, text
        return text, text
    value = float(text)
    whole = value == int(value) if abs(value) < 1e15 else False
    return (f"{int(value)}" if whole and "." not in text and "e" not in text.lower() else number(value)), text

"""Repetitions of a run with other seeds: mean and deviation of numbers and of tables."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_robust.report.tables import write_csv, write_json

SEEDS_FILE = "seeds.json"


@dataclass(frozen=True)
class Spread:
    """A number over repetitions.

    Args:
        mean: of the values.
        deviation: sample standard deviation (divided by n − 1); NaN for one value.
        values: one for each repetition that has it, in the order of the seeds.
    """

    mean: float
    deviation: float
    values: tuple[float, ...]


@dataclass(frozen=True)
class Seeds:
    """What ``seeds.json`` tells of a group of repetitions.

    Args:
        seeds: of each repetition that was asked for.
        runs: folders of the repetitions below the group's.
        spreads: name to mean, deviation and values.
        failed: folder to the reason, of repetitions that did not come to their end.
    """

    seeds: tuple[int, ...]
    runs: tuple[str, ...]
    spreads: dict[str, Spread]
    failed: dict[str, str]


def aggregate(results: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """Mean and sample standard deviation of each number, over the repetitions that have it.

    Args:
        results: name to number, of each repetition.

    Returns:
        Name to spread, in the order of the first occurrence; numbers that are not finite do not count.

    Example:
        >>> found = aggregate([{"test/acc": 0.5}, {"test/acc": 0.75}, {"test/acc": 1.0}])["test/acc"]
        >>> found.mean, found.deviation
        (0.75, 0.25)
    """
    out = {}
    for name in dict.fromkeys(name for one in results for name in one):
        values = tuple(float(one[name]) for one in results if name in one and math.isfinite(one[name]))
        if values:
            deviation = statistics.stdev(values) if len(values) > 1 else math.nan
            out[name] = Spread(statistics.fmean(values), deviation, values)
    return out


def aggregate_table(tables: Sequence[Sequence[Mapping[str, str]]]) -> list[dict[str, Any]] | None:
    """One table of means and deviations from the same table of several repetitions.

    A column that holds the same in all of them (a name, ε, λ) is kept; of another one whose cells are all numbers, the
    mean stands under its name, and the sample standard deviation under ``<name>_std``.

    Args:
        tables: rows of each repetition, cells as text.

    Returns:
        Rows, or ``None`` where the tables do not match: other numbers of rows, other columns, or texts that differ.
    """
    first = tables[0]
    if len(tables) < 2 or any(len(table) != len(first) for table in tables):
        return None
    columns = list(first[0]) if first else []
    if any(list(row) != columns for table in tables for row in table):
        return None
    out: list[dict[str, Any]] = [{} for _ in first]
    for column in columns:
        cells = [[table[number][column] for table in tables] for number in range(len(first))]
        if all(len(set(cell)) == 1 for cell in cells):
            for row, cell in zip(out, cells, strict=True):
                row[column] = cell[0]
            continue
        for row, cell in zip(out, cells, strict=True):
            try:
                numbers = [float(value) for value in cell if value != ""]
            except ValueError:
                return None
            row[column] = statistics.fmean(numbers) if numbers else None
            row[f"{column}_std"] = statistics.stdev(numbers) if len(numbers) > 1 else None
    return out


def write_seeds(
    folder: Path, seeds: Sequence[int], runs: Sequence[str], failed: Mapping[str, str]
) -> dict[str, Spread]:
    """Write a group's ``results.json`` (means), ``seeds.json`` (also deviations and values) and tables.

    ``tables/seeds.csv`` has a row for each number; a table that every repetition has, and that differs in numbers
    alone, is written with means and deviations.

    Args:
        folder: of the group.
        seeds: of each repetition.
        runs: their folders' names below the group's.
        failed: folder's name to reason, of those that failed; what they left behind does not count.

    Returns:
        Name to spread.
    """
    good = [run for run in runs if run not in failed and (folder / run / "results.json").is_file()]
    results = [_results(folder / run / "results.json") for run in good]
    spreads = aggregate(results)
    write_json(folder / "results.json", {name: spread.mean for name, spread in sorted(spreads.items())})
    write_json(
        folder / SEEDS_FILE,
        {
            "version": 1,
            "seeds": list(seeds),
            "runs": list(runs),
            "failed": dict(failed),
            "values": {
                name: {"mean": spread.mean, "std": spread.deviation, "values": list(spread.values)}
                for name, spread in sorted(spreads.items())
            },
        },
    )
    rows = [
        {"measure": name, "mean": spread.mean, "std": spread.deviation, "n": len(spread.values)}
        | {run: one.get(name) for run, one in zip(good, results, strict=True)}
        for name, spread in sorted(spreads.items())
    ]
    if rows:
        write_csv(folder / "tables" / "seeds.csv", rows)
    _write_tables(folder, good)
    return spreads


def _write_tables(folder: Path, runs: Sequence[str]) -> None:
    if len(runs) < 2:
        return
    shared = set.intersection(*({file.name for file in (folder / run / "tables").glob("*.csv")} for run in runs))
    for name in sorted(shared - {"seeds.csv", "predictions.csv"}):
        rows = aggregate_table([_table(folder / run / "tables" / name) for run in runs])
        if rows:
            write_csv(folder / "tables" / name, rows)


def read_seeds(text: str) -> Seeds:
    """Read ``seeds.json``.

    Raises:
        ValueError: for what is no such file.
    """
    told = json.loads(text)
    if not isinstance(told, dict) or told.get("version") != 1:
        raise ValueError("it is no file of seeds of version 1")
    spreads = {
        str(name): Spread(_number(entry["mean"]), _number(entry["std"]), tuple(map(_number, entry["values"])))
        for name, entry in told["values"].items()
    }
    failed = {str(run): str(reason) for run, reason in told.get("failed", {}).items()}
    return Seeds(tuple(map(int, told["seeds"])), tuple(map(str, told["runs"])), spreads, failed)


def _results(file: Path) -> dict[str, float]:
    told = json.loads(file.read_text(encoding="utf-8"))
    return {name: math.nan if value is None else float(value) for name, value in told.items()}


def _table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)

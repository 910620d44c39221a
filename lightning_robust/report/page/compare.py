"""Numbers of one run, or of several side by side with what is better marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_robust.report.page.record import Run
from lightning_robust.report.page.words import STAGES, Measure, measure
from lightning_robust.report.seeds import Spread, aggregate

_HEADLINE = ("acc", "psnr", "input_gradient_iou")
_MOST_ATTACKS = 6


@dataclass(frozen=True)
class Cell:
    """A run's number.

    Args:
        text: as it is written.
        value: to sort by; empty where there is none.
        difference: from the first run, as it is written.
        way: "better", "worse", "other" or empty, for the difference.
        best: whether no run has a better one, where that can be said.
    """

    text: str
    value: str
    difference: str = ""
    way: str = ""
    best: bool = False


@dataclass(frozen=True)
class NumberRow:
    """A measure and its cells, one a run."""

    measure: Measure
    cells: tuple[Cell, ...]
    differs: bool


def rows(runs: Sequence[Run], names: Sequence[str]) -> list[NumberRow]:
    """A row for each logged name."""
    return [_row(runs, measure(name)) for name in names]


def all_names(runs: Sequence[Run]) -> list[str]:
    """Every name that any of the runs has a final number of: test, validation, training, and the rest."""
    names = dict.fromkeys(name for run in runs for name in run.results)
    order = list(STAGES)

    def place(name: str) -> tuple[int, str]:
        stage = name.partition("/")[0]
        return (order.index(stage) if stage in order else len(order), name)

    return sorted(names, key=place)


def headline_names(runs: Sequence[Run]) -> list[str]:
    """The numbers that a reader looks for first: of the test images, or else of the validation images."""
    names = all_names(runs)
    stage = next((stage for stage in ("test", "val") if any(name.startswith(f"{stage}/") for name in names)), None)
    if stage is None:
        return []
    worst = [name for name in names if name.startswith(f"{stage}/robust_acc/worst_case")]
    attacks = [name for name in names if name.startswith(f"{stage}/robust_acc/") and name not in worst]
    attacks.sort(key=lambda name: min((run.results.get(name, math.inf) for run in runs), default=math.inf))
    wanted = [f"{stage}/acc", *worst, *attacks[:_MOST_ATTACKS], *(f"{stage}/{name}" for name in _HEADLINE[1:])]
    return [name for name in wanted if name in names]


def _row(runs: Sequence[Run], what: Measure) -> NumberRow:
    values = [run.results.get(what.name) for run in runs]
    known = [value for value in values if value is not None and math.isfinite(value)]
    texts = [_text(run, what) for run in runs]
    differs = len(set(texts)) > 1
    best = max(known, key=lambda value: what.better * value) if known and what.better and differs else None
    cells = []
    for number, (value, text) in enumerate(zip(values, texts, strict=True)):
        difference = what.difference(value, values[0]) if number else ""
        way = ""
        if difference:
            gain = (value or 0.0) - (values[0] or 0.0)
            way = "other" if not what.better else "better" if gain * what.better > 0 else "worse"
        finite = value is not None and math.isfinite(value)
        cells.append(Cell(text, repr(value) if finite else "", difference, way, best is not None and value == best))
    return NumberRow(what, tuple(cells), differs)


def _text(run: Run, what: Measure) -> str:
    spread = run.spreads.get(what.name)
    text = what.text(run.results.get(what.name), spread.deviation if spread else None)
    counted = len(run.members) or len(spread.values) if spread else 0
    if spread and len(spread.values) != counted and text != "–":
        text += f" (n = {len(spread.values)})"
    return text


def over_seeds(runs: Sequence[Run]) -> list[tuple[Measure, Spread]]:
    """Mean and deviation over single runs that differ in their seed alone."""
    spreads = aggregate([run.results for run in runs])
    names = [name for name in all_names(runs) if name in spreads]
    return [(measure(name), spreads[name]) for name in names]

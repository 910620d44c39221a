"""Curves drawn for the page: what training logged, and tables over λ or ε of several runs in one plot."""

from __future__ import annotations

import base64
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_robust.report.figures import LABEL, SMALL, TITLE, wrap
from lightning_robust.report.page.record import Run
from lightning_robust.report.page.words import measure

# Okabe & Ito: apart for readers who see colours differently; with markers and dashes also in black and white
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES = ("-", "--", "-.", ":")
_SIZE = (7.2, 4.2)  # inches
_MOST_LINES = 24

# beginning of a table's name, column of x, its words; columns of y, their words
_TABLES = (
    ("lambda_sweep_", "lam", "λ", (("acc", "clean accuracy"), ("iou", "gradient IoU"))),
    ("robust_accuracy_curve_", "eps", "ε", (("robust_acc", "robust accuracy"),)),
)


@dataclass(frozen=True)
class Line:
    """One line of a chart; ``low`` and ``high`` are the ends of a band, or empty."""

    name: str
    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class Chart:
    """A plot as it goes into the page."""

    title: str
    alt: str
    uri: str
    note: str


def training_charts(runs: Sequence[Run]) -> list[Chart]:
    """What was logged each epoch: of one run a chart for each quantity, of several one for each logged name."""
    names = list(dict.fromkeys(name for run in runs for row in _rows(run) for name in row))
    groups: dict[str, list[str]] = {}
    for name in names:
        below = name.partition("/")[2]
        if "/" not in name or below.startswith(("success_rate", "mean_norm", "lambda_sweep")):
            continue
        if len(runs) > 1:
            groups.setdefault(f"{measure(name).label} ({_stage(name)})", []).append(name)
        elif below == "acc" or below.startswith("robust_acc/"):
            groups.setdefault("accuracy", []).append(name)
        else:
            groups.setdefault(measure(name).label, []).append(name)
    out = []
    for title, members in groups.items():
        lines = []
        for run in runs:
            for name in members:
                line = _over_epochs(run, name, run.name if len(runs) > 1 else f"{measure(name).label} ({_stage(name)})")
                if line is not None:
                    lines.append(line)
        if lines:
            share = all(measure(name).kind == "share" for name in members)
            out.append(_chart(title, "epoch", lines, whole=True, share=share))
    return out


def table_charts(runs: Sequence[Run]) -> list[Chart]:
    """Accuracy over ε, accuracy and IoU over λ: of all runs that have such a table, where no figure shows it."""
    out = []
    for start, x, x_words, columns in _TABLES:
        for name in dict.fromkeys(name for run in runs for name in run.tables if name.startswith(start)):
            having = [run for run in runs if name in run.tables]
            if len(having) < 2 and not having[0].spreads:
                continue
            for column, words in columns:
                lines = [line for run in having if (line := _of_table(run, name, x, column)) is not None]
                if lines:
                    out.append(
                        _chart(
                            f"{words} against {x_words}, {name.removeprefix(start).replace('_', ' ')}", x_words, lines
                        )
                    )
    return out


def _stage(name: str) -> str:
    return {"val": "validation", "train": "training"}.get(measure(name).stage, measure(name).stage)


def _rows(run: Run) -> list[dict[str, float]]:
    return [row for member in run.members for row in member.epochs] if run.members else run.epochs


def _over_epochs(run: Run, name: str, label: str) -> Line | None:
    """A logged number of each epoch that has it; of seeds the mean, and a band of a deviation to each side."""
    found: dict[float, list[float]] = {}
    for row in _rows(run):
        value = row.get(name, math.nan)
        if math.isfinite(value) and "epoch" in row:
            found.setdefault(row["epoch"], []).append(value)
    if not found:
        return None
    x = sorted(found)
    mean = [statistics.fmean(found[epoch]) for epoch in x]
    if not run.members:
        return Line(label, x, mean, [], [])
    spread = [statistics.stdev(found[epoch]) if len(found[epoch]) > 1 else 0.0 for epoch in x]
    return _banded(label, x, mean, spread)


def _of_table(run: Run, name: str, x: str, column: str) -> Line | None:
    rows = run.tables[name]
    if not rows or x not in rows[0] or column not in rows[0]:
        return None
    try:
        points = [
            (float(row[x]), float(row[column]), float(row.get(f"{column}_std") or 0)) for row in rows if row[column]
        ]
    except ValueError:
        return None
    if not points:
        return None
    positions, values, spread = (list(part) for part in zip(*points, strict=True))
    return _banded(run.name, positions, values, spread) if any(spread) else Line(run.name, positions, values, [], [])


def _banded(name: str, x: list[float], mean: list[float], spread: list[float]) -> Line:
    low = [value - part for value, part in zip(mean, spread, strict=True)]
    high = [value + part for value, part in zip(mean, spread, strict=True)]
    return Line(name, x, mean, low, high)


def _chart(title: str, x_words: str, lines: list[Line], *, whole: bool = False, share: bool = True) -> Chart:
    """Draw lines; ``whole``: x are whole numbers; ``share``: y that lie in [0, 1] are shown on all of it."""
    note = ""
    if len(lines) > _MOST_LINES:
        note = f"The first {_MOST_LINES} of {len(lines)} lines are drawn; the numbers below are complete."
        lines = lines[:_MOST_LINES]
    last = "; ".join(f"{line.name} ends at {line.y[-1]:.4g}" for line in lines[:8])
    # names of runs may be any text: in an SVG that is text, too
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lightning_robust"}):
        figure = _draw(title, x_words, lines, whole, share)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    uri = f"data:image/svg+xml;base64,{base64.b64encode(out.getvalue().encode()).decode()}"
    banded = any(line.low for line in lines)
    note = " ".join(filter(None, (note, "Bands: one standard deviation over the seeds." if banded else "")))
    return Chart(title, f"Line chart, {title} over {x_words}: {last}", uri, note)


def _draw(title: str, x_words: str, lines: list[Line], whole: bool, share: bool) -> Figure:
    figure = Figure(figsize=_SIZE, facecolor="white", layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for number, line in enumerate(lines):
        colour = _COLOURS[number % len(_COLOURS)]
        axes.plot(
            line.x,
            line.y,
            color=colour,
            marker=_MARKERS[number % len(_MARKERS)],
            markevery=max(1, len(line.x) // 12),
            linestyle=_DASHES[number // len(_COLOURS) % len(_DASHES)],
            markersize=5,
            linewidth=1.8,
            clip_on=False,
            # a leading _ would leave the line out of the legend
            label=wrap(line.name.lstrip("_") or "–", 560, LABEL),
        )
        if line.low:
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.18, linewidth=0)
    drawn = [value for line in lines for value in (*line.y, *line.low, *line.high)]
    if share and min(drawn) >= 0 and max(drawn) <= 1:
        axes.set_ylim(0, 1)
    if whole:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(wrap(title, 640, TITLE), fontsize=TITLE, parse_math=False)
    axes.set_xlabel(x_words, fontsize=LABEL, parse_math=False)
    axes.tick_params(labelsize=SMALL)
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    longest = max(len(line.name) for line in lines)
    legend = figure.legend(
        loc="outside lower center", ncols=max(1, min(len(lines), 80 // (longest + 8))), fontsize=SMALL, frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure

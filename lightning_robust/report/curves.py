"""Curves of a measure over a budget or another setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from lightning_robust.errors import UserError
from lightning_robust.report.figures import DPI, LABEL, SMALL, TITLE, as_array, wrap

# Okabe & Ito: apart for readers who see colours differently; with markers and dashes also in black and white
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES = ("-", "--", "-.", ":")
_MOST_TICKS = 11

Values = Sequence[float] | Tensor | np.ndarray


def curve(
    x: Values,
    series: Mapping[str, Values],
    xlabel: str,
    ylabel: str,
    title: str,
    ci: Mapping[str, tuple[Values, Values]] | None = None,
) -> Figure:
    """One line a series, with a band where its confidence interval is given.

    Args:
        x: n positions, such as ε in units of 1/255.
        series: n values for each name; NaN leaves a gap. Where all lie in [0, 1] the axis shows all of [0, 1].
        xlabel: quantity and unit of ``x``.
        ylabel: quantity and unit of the values.
        title: what the curves show.
        ci: (n low, n high) ends of the interval of some of the series, drawn as a band.

    Returns:
        A figure that is not tied to any window.

    Raises:
        UserError: without a series, for another number of values than positions, and an interval of no series.

    Example:
        >>> figure = curve([0, 4, 8], {"PGD": [0.9, 0.5, 0.2]}, "ε (1/255)", "robust accuracy", "Accuracy over ε")
        >>> [line.get_label() for line in figure.axes[0].lines]
        ['PGD']
    """
    positions = as_array(np.asarray(x), "x", 1)
    if not series:
        raise UserError("curve: no series to draw")
    intervals = dict(ci or {})
    unknown = intervals.keys() - series.keys()
    if unknown:
        raise UserError(f"curve: an interval is given for {', '.join(sorted(unknown))}, which is no series")
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)  # inches
    figure = Figure(figsize=(8, 5.2), dpi=DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    drawn = []
    for number, (name, values) in enumerate(series.items()):
        y = _same_length(values, positions, name)
        colour = _COLOURS[number % len(_COLOURS)]
        (line,) = axes.plot(
            positions,
            y,
            color=colour,
            marker=_MARKERS[number % len(_MARKERS)],
            markevery=max(1, len(positions) // 12),
            linestyle=_DASHES[number // len(_COLOURS) % len(_DASHES)],
            markersize=6,
            linewidth=2,
            clip_on=False,
            zorder=3,
        )
        line.set_label(wrap(name, 680, LABEL))
        drawn.append(y)
        if name in intervals:
            low, high = (_same_length(end, positions, f"the interval of {name}") for end in intervals[name])
            axes.fill_between(positions, low, high, color=colour, alpha=0.18, linewidth=0)
            drawn += [low, high]
    everything = np.concatenate(drawn)
    everything = everything[np.isfinite(everything)]
    if everything.size and everything.min() >= 0 and everything.max() <= 1:
        axes.set_ylim(0, 1)
        axes.set_yticks(np.linspace(0, 1, 6))
    if len(positions) <= _MOST_TICKS and _spread(positions):
        axes.set_xticks(positions, [f"{value:g}" for value in positions])
    axes.set_title(wrap(title, 760, TITLE), fontsize=TITLE, pad=12, parse_math=False)
    axes.set_xlabel(xlabel, fontsize=LABEL, parse_math=False)
    axes.set_ylabel(ylabel, fontsize=LABEL, parse_math=False)
    axes.tick_params(labelsize=SMALL)
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    longest = max(len(name) for name in series)
    legend = figure.legend(
        loc="outside lower center", ncols=max(1, min(len(series), 90 // (longest + 8))), fontsize=LABEL, frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _same_length(values: Values, positions: np.ndarray, name: str) -> np.ndarray:
    y = as_array(values if isinstance(values, Tensor) else np.asarray(values), name, 1)
    if len(y) != len(positions):
        raise UserError(f"curve: {name} has {len(y)} values for {len(positions)} positions on the x axis")
    return y


def _spread(positions: np.ndarray) -> bool:
    """Whether ticks at the positions leave room for their numbers."""
    ordered = np.unique(positions)
    return len(ordered) == 1 or float(np.diff(ordered).min()) >= 0.06 * float(ordered[-1] - ordered[0])

"""The scores of the neutralizer as points with their intervals, the paper's beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from lightning_robust.errors import UserError
from lightning_robust.report.figures import DPI, LABEL, SMALL, TITLE, wrap

_SCORES = {
    "clean": ("clean", "#000000", "o"),
    "mod": ("mod: neutralised", "#009e73", "s"),
    "adv": ("adv: attacked", "#d55e00", "v"),
    "write": ("mod-adv: the attacker may write into the blob", "#e69f00", "<"),
    "held": ("mod-adv: what he writes there is blanked (held)", "#56b4e9", ">"),
    "adaptive": ("mod-adv, adaptive: held, and he knows of it", "#0072b2", "D"),
}
_PAPER = {"clean": "paper_clean", "mod": "paper_mod", "adv": "paper_adv", "held": "paper_mod_adv"}


def score_figure(rows: Sequence[Mapping[str, Any]], *, title: str, blob_of: str = "known") -> Figure:
    """One line an attack and direction, six scores on it, hollow where the paper has one.

    Args:
        rows: of NeutralizerStudy's table: ``attack``, ``budget``, ``direction``, ``blob_of``, the scores as shares with
            ``_low`` and ``_high``, and ``paper_…`` where the paper has them.
        title: of what.
        blob_of: which of the rows.

    Raises:
        UserError: where there is no such row.
    """
    shown = [row for row in rows if row["blob_of"] == blob_of]
    if not shown:
        raise UserError(f"score_figure: no row with blob_of={blob_of!r}")
    height = 1.9 + 0.62 * len(shown)
    figure = Figure(
        figsize=(9, height), dpi=DPI, facecolor="white", layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    )
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    paper = False
    for place, row in enumerate(shown):
        for number, (name, (_, colour, marker)) in enumerate(_SCORES.items()):
            if row[name] is None:
                continue
            y = place + 0.11 * (number - 2.5)
            value = 100 * row[name]
            limits = [[max(value - 100 * row[f"{name}_low"], 0)], [max(100 * row[f"{name}_high"] - value, 0)]]
            axes.errorbar(value, y, xerr=limits, color=colour, marker=marker, markersize=6, linewidth=1.4, zorder=3)
            told = row.get(_PAPER.get(name, ""))
            if told is not None:
                paper = True
                axes.plot(
                    100 * told,
                    y,
                    color=colour,
                    marker=marker,
                    markersize=9,
                    fillstyle="none",
                    linestyle="none",
                    zorder=2,
                )
        if place:
            axes.axhline(place - 0.5, color="#dddddd", linewidth=0.8)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(-3, 103)
    axes.set_yticks(
        range(len(shown)), [f"{row['direction']}\n{row['attack'].replace('_', ' ')}, {row['budget']}" for row in shown]
    )
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
    axes.tick_params(labelsize=SMALL)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("accuracy (%) on the images of the source class", fontsize=LABEL)
    axes.set_title(wrap(title, 800, TITLE), fontsize=TITLE, pad=10, parse_math=False)
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", label=label)
        for label, colour, marker in _SCORES.values()
    ]
    if paper:
        handles.append(
            Line2D(
                [],
                [],
                color="#666666",
                marker="o",
                markersize=9,
                fillstyle="none",
                linestyle="none",
                label="hollow: the paper's (FGSM)",
            )
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=SMALL, frameon=False)
    return figure

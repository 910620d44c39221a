"""Figures of the detection study: ROC curves and histograms of κ."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from lightning_robust.errors import UserError
from lightning_robust.report.figures import DPI, LABEL, SMALL, TITLE, as_array, wrap

# Okabe & Ito, as in the curves
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
_DASHES = ("-", "--", ":", "-.")
_BINS = 40
_NATURAL, _ATTACKED, _THRESHOLD = "#0072b2", "#b2182b", "#222222"


def roc_curves(curves: Mapping[str, tuple[Tensor, Tensor, float]], *, title: str) -> Figure:
    """ROC curves of κ, one for each kind of images against the normal ones.

    Args:
        curves: name to (false positive rates ``(P,)``, true positive rates ``(P,)``, area under the curve).
        title: which detector on what.

    Returns:
        A figure that is not tied to any window.

    Raises:
        UserError: without a curve, and for rates of different lengths.
    """
    if not curves:
        raise UserError("roc_curves: no curve to draw")
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)  # inches
    figure = Figure(figsize=(9, 6), dpi=DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1, zorder=1)
    for number, (name, (false, true, area)) in enumerate(curves.items()):
        x, y = as_array(false, f"false positive rates of {name}", 1), as_array(true, f"true rates of {name}", 1)
        if len(x) != len(y):
            raise UserError(f"roc_curves: {name} has {len(x)} false and {len(y)} true positive rates")
        (line,) = axes.plot(
            x,
            y,
            color=_COLOURS[number % len(_COLOURS)],
            linestyle=_DASHES[number // len(_COLOURS) % len(_DASHES)],
            linewidth=2,
            zorder=3,
            clip_on=False,
        )
        line.set_label(f"{wrap(name, 240, LABEL)}  {area:.4f}")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set_title(wrap(title, 700, TITLE), fontsize=TITLE, pad=12, parse_math=False)
    axes.set_xlabel("false alarms on normal images", fontsize=LABEL)
    axes.set_ylabel("images of the kind that raise the alarm", fontsize=LABEL)
    axes.tick_params(labelsize=SMALL)
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    legend = figure.legend(loc="outside right upper", fontsize=LABEL, frameon=False, title="area under the curve")
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def sensitivity_histograms(
    counts: Mapping[str, Tensor], *, threshold: float, natural: tuple[str, ...], title: str
) -> Figure:
    """A histogram of κ for each kind of images, below each other, with the detector's threshold.

    Args:
        counts: kind to ``(M + 1,)`` images by how many of M mutants changed the label; kinds without images are left
            out.
        threshold: κ that the test compares with.
        natural: kinds that are no attacks; they are drawn in blue, the others in red.
        title: which detector on what.

    Returns:
        A figure that is not tied to any window.

    Raises:
        UserError: where no kind has images.
    """
    shown = {kind: as_array(values, f"counts of {kind}", 1) for kind, values in counts.items() if int(values.sum())}
    if not shown:
        raise UserError("sensitivity_histograms: no kind has images")
    wide = wrap(title, 760, TITLE)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.03, hspace=0.02)
    height = 1.25 * len(shown) + 0.9 + 0.25 * wide.count("\n")
    figure = Figure(figsize=(8, height), dpi=DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (kind, values) in zip(panels, shown.items(), strict=True):
        mutants, images = len(values) - 1, values.sum()
        bins = min(_BINS, mutants + 1)
        edges = np.linspace(0, 1, bins + 1)
        shares, _ = np.histogram(np.arange(mutants + 1) / max(mutants, 1), edges, weights=values / images)
        colour = _NATURAL if kind in natural else _ATTACKED
        axes.bar(edges[:-1], shares, np.diff(edges), align="edge", color=colour, linewidth=0)
        axes.axvline(threshold, color=_THRESHOLD, linestyle="--", linewidth=1.2)
        mean = float((values * np.arange(mutants + 1)).sum() / images / max(mutants, 1))
        axes.set_title(
            f"{kind}: {images:g} images, mean κ {mean:.4f}", loc="right", fontsize=LABEL, pad=3, parse_math=False
        )
        axes.set(xlim=(0, 1), ylim=(0, max(float(shares.max()) * 1.15, 1e-9)))
        axes.tick_params(labelsize=SMALL)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel(
        f"κ, share of the mutants that change the label (dashed: threshold {threshold:.4g})", fontsize=LABEL
    )
    figure.supylabel("share of the images", fontsize=LABEL)
    figure.suptitle(wide, fontsize=TITLE, parse_math=False)
    return figure

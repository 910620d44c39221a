"""Figures of the distillation study (arXiv 1511.04508): success with and without rescaling, gradients, temperature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from lightning_robust.errors import UserError
from lightning_robust.metrics.gradient_amplitude import RANGE_NAMES
from lightning_robust.report.figures import DPI, LABEL, SMALL, TITLE, wrap

# Okabe & Ito, as in the curves
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_NAIVE, _RESCALED, _LOGITS = "#7f7f7f", "#d55e00", "#0072b2"


def success_bars(naive: Mapping[str, float], rescaled: Mapping[str, float], *, title: str) -> Figure:
    """Success rates of attacks on a model as it is, and on its logits divided by T.

    Args:
        naive: attack to rate in [0, 1].
        rescaled: the same on logits / T; an attack that follows the logits anyway is missing.
        title: of what model.

    Returns:
        A figure that is not tied to any window.

    Raises:
        UserError: without an attack.
    """
    if not naive:
        raise UserError("success_bars: no attack to draw")
    figure, axes = _page(title)
    alone = {attack: rate for attack, rate in naive.items() if attack not in rescaled}
    for shift, rates, colour, name in (
        (
            -0.2,
            {attack: rate for attack, rate in naive.items() if attack in rescaled},
            _NAIVE,
            "naive: softmax as it is",
        ),
        (0.2, {attack: rate for attack, rate in rescaled.items() if attack in naive}, _RESCALED, "on logits / T"),
        (0.0, alone, _LOGITS, "on the logits"),
    ):
        if rates:
            places = [list(naive).index(attack) + shift for attack in rates]
            bars = axes.bar(places, list(rates.values()), 0.38, color=colour, label=name)
            axes.bar_label(bars, [f"{rate:.0%}" for rate in rates.values()], fontsize=SMALL, padding=2)
    middles = np.arange(len(naive))
    axes.set_xticks(middles, [wrap(attack, 150, LABEL) for attack in naive])
    axes.set_ylim(0, 1.08)
    _shares(axes, "success rate")
    figure.legend(loc="outside lower center", ncols=3, fontsize=LABEL, frameon=False)
    return figure


def gradient_ranges(counts: Mapping[str, Sequence[int]], *, title: str) -> Figure:
    """How many images have adversarial gradients of which size: the paper's figure, a stacked bar a temperature.

    Of a single temperature a histogram.

    Args:
        counts: temperature to the numbers of images in the ten ranges of
            :data:`lightning_robust.metrics.gradient_amplitude.RANGES`.
        title: of what model and data.

    Returns:
        A figure that is not tied to any window.

    Raises:
        UserError: without a bar, and for another number of ranges.
    """
    if not counts or any(len(values) != len(RANGE_NAMES) for values in counts.values()):
        raise UserError(f"gradient_ranges: give {len(RANGE_NAMES)} numbers of images for each temperature")
    figure, axes = _page(title)
    if len(counts) == 1:
        (values,) = counts.values()
        alone = np.asarray(values, float) / max(sum(values), 1)
        bars = axes.bar(range(len(alone)), alone, 0.8, color=_LOGITS)
        axes.bar_label(bars, [f"{share:.0%}" if share else "" for share in alone], fontsize=SMALL, padding=2)
        axes.set_xticks(
            range(len(alone)), [name.replace(" to ", "\nto ").replace(" and", "\nand") for name in RANGE_NAMES]
        )
        axes.set_ylim(0, 1.08)
        axes.set_xlabel("mean |∂F/∂x| of an image", fontsize=LABEL)
        _shares(axes, "share of the images")
        return figure
    colours = colormaps["viridis"](np.linspace(0, 1, len(RANGE_NAMES)))
    shares = np.array([np.asarray(values, float) / max(sum(values), 1) for values in counts.values()])
    bottom = np.zeros(len(counts))
    places = np.arange(len(counts))
    for number, name in enumerate(RANGE_NAMES):
        bars = axes.bar(places, shares[:, number], 0.62, bottom=bottom, color=colours[number], label=name)
        texts = [f"{share:.0%}" if share >= 0.04 else "" for share in shares[:, number]]
        dark = number < 6
        axes.bar_label(bars, texts, label_type="center", fontsize=SMALL, color="white" if dark else "black")
        bottom += shares[:, number]
    axes.set_xticks(places, list(counts))
    axes.set_xlim(-0.7, len(counts) - 0.3)
    axes.set_ylim(0, 1)
    axes.set_xlabel("temperature T of the training", fontsize=LABEL)
    _shares(axes, "share of the images")
    handles, names = axes.get_legend_handles_labels()
    legend = figure.legend(
        handles[::-1], names[::-1], loc="outside right upper", fontsize=SMALL, frameon=False, title="mean |∂F/∂x|"
    )
    legend.get_title().set_fontsize(SMALL)
    return figure


def success_against_temperature(
    temperatures: Sequence[float],
    naive: Mapping[str, Sequence[float]],
    rescaled: Mapping[str, Sequence[float]],
    *,
    title: str,
) -> Figure:
    """Success rate against T, attack by attack: dashed on the softmax as it is, solid on logits / T.

    Args:
        temperatures: n values of T, rising.
        naive: attack to n rates in [0, 1]; NaN leaves a gap.
        rescaled: the same on logits / T; an attack that follows the logits anyway may be missing and is drawn solid.
        title: of what models.

    Returns:
        A figure that is not tied to any window.

    Raises:
        UserError: without an attack or temperature, and for other numbers of rates than temperatures.
    """
    lines = [*naive.values(), *rescaled.values()]
    if not temperatures or not naive or any(len(rates) != len(temperatures) for rates in lines):
        raise UserError("success_against_temperature: give one rate for each temperature")
    figure, axes = _page(title)
    handles = []
    for number, (attack, rates) in enumerate(naive.items()):
        style: dict[str, Any] = {
            "color": _COLOURS[number % len(_COLOURS)],
            "marker": _MARKERS[number % len(_MARKERS)],
            "linewidth": 2,
        }
        if attack in rescaled:
            axes.plot(temperatures, rates, linestyle="--", markerfacecolor="white", clip_on=False, zorder=3, **style)
            rates = rescaled[attack]
        axes.plot(temperatures, rates, linestyle="-", clip_on=False, zorder=3, **style)
        handles.append(Line2D([], [], label=attack, **style))
    handles.append(Line2D([], [], color="#555555", linestyle="--", label="naive: on the softmax as it is"))
    handles.append(Line2D([], [], color="#555555", linestyle="-", label="on logits / T (CW: on the logits)"))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(temperatures)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{value:g}" for value in temperatures])
    axes.set_ylim(0, 1)
    axes.set_xlabel("temperature T of the training", fontsize=LABEL)
    _shares(axes, "success rate")
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=LABEL, frameon=False)
    return figure


def _page(title: str) -> tuple[Figure, Axes]:
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)  # inches
    figure = Figure(figsize=(8, 5.2), dpi=DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(wrap(title, 700, TITLE), fontsize=TITLE, pad=14, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def _shares(axes: Axes, label: str) -> None:
    axes.set_ylabel(label, fontsize=LABEL)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.tick_params(labelsize=SMALL)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)

"""Figures of the one-pixel study (Su, Vargas, Sakurai, arXiv 1710.08864)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Circle, Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lightning_robust.errors import UserError
from lightning_robust.report.figures import (
    DPI,
    LABEL,
    SMALL,
    TITLE,
    PixelFigure,
    as_array,
    text_height,
    text_width,
    wrap,
)

_SIDE = 176  # screen pixels of an image's longer side, about
_MOST_EXAMPLES = 20
_MOST_CLASSES = 40
_MOST_MARKS = 16  # changed pixels that are circled one by one
_NEW = "#b2182b"
_COUNTS = "YlGnBu"  # light is none, dark is many; readable without colour vision
_NAME_WIDTH = 170  # screen pixels that a class name takes before it is broken into lines
# Okabe & Ito, as in the curves
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")


def pixel_examples(
    clean: Tensor | np.ndarray,
    adversarial: Tensor | np.ndarray,
    labels: Sequence[int] | Tensor,
    predictions: Sequence[int] | Tensor,
    class_names: Sequence[str],
    *,
    title: str,
    confidence: Sequence[float] | Tensor | None = None,
) -> Figure:
    """A grid of enlarged adversarial images, the changed pixels circled, as in the paper's Figure 1.

    Above each image stands its true class, below it in red the class that the model takes it for, with the
    probability.

    Args:
        clean: ``(N, C, H, W)`` in [0, 1] with one or three channels; the first 20 images are shown.
        adversarial: ``(N, C, H, W)`` in [0, 1].
        labels: N true classes.
        predictions: N classes predicted for the adversarial images.
        class_names: a name for each class.
        title: what attack on what model.
        confidence: N probabilities in [0, 1] of the predictions.

    Returns:
        A figure that is not tied to any window. Where more than 16 pixels of an image changed, images get one frame
        around them and no circles.

    Raises:
        UserError: for tensors that do not fit each other, other numbers of channels, and classes without a name.
    """
    before, after = as_array(clean, "clean images", 4), as_array(adversarial, "adversarial images", 4)
    if before.shape != after.shape or before.shape[1] not in (1, 3):
        raise UserError(
            f"pixel_examples: clean images of shape {before.shape} and adversarial ones of shape {after.shape}: both "
            "are (N, 1 or 3, H, W)"
        )
    count = len(before)
    truth = _classes(labels, "labels", count, len(class_names))
    new = _classes(predictions, "predictions", count, len(class_names))
    sure = None if confidence is None else as_array(np.asarray(confidence), "confidence", 1)
    if sure is not None and len(sure) != count:
        raise UserError(f"pixel_examples: {len(sure)} confidences for {count} images")

    shown = min(count, _MOST_EXAMPLES)
    columns = min(shown, 5 if shown > 8 else 4)
    rows = -(-shown // columns)
    scale = max(1, round(_SIDE / max(before.shape[2:])))
    panel_h, panel_w = before.shape[2] * scale, before.shape[3] * scale
    cell_w = max(panel_w, 150) + 24
    above = [wrap(f"true: {class_names[truth[i]]}", cell_w - 8, SMALL) for i in range(shown)]
    below = [
        wrap(f"→ {class_names[new[i]]}" + ("" if sure is None else f" ({sure[i]:.0%})"), cell_w - 8, LABEL)
        for i in range(shown)
    ]
    above_h = max(text_height(text, SMALL) for text in above) + 8
    below_h = max(text_height(text, LABEL) for text in below) + 8
    cell_h = above_h + panel_h + below_h + 14

    total = max(columns * cell_w + 40, 420)
    title = wrap(title, total - 40, TITLE)
    changed = (before[:shown] != after[:shown]).any(1)
    many = changed.sum((1, 2)).max() > _MOST_MARKS
    note = wrap(f"{'framed' if many else 'circled'}: the pixels that the attack changed", total - 40, SMALL)
    top = 24 + text_height(title, TITLE)
    page = PixelFigure(total, top + rows * cell_h + text_height(note, SMALL) + 14)
    page.text(total / 2, 14, title, fontsize=TITLE)
    start = (total - columns * cell_w) / 2
    for i in range(shown):
        row, column = divmod(i, columns)
        middle, y = round(start + (column + 0.5) * cell_w), round(top + row * cell_h)
        axes = page.axes(middle - panel_w // 2, y + above_h, panel_w, panel_h)
        axes.set(xticks=[], yticks=[])
        picture = np.broadcast_to(after[i], (3, *after[i].shape[1:])).transpose(1, 2, 0)
        axes.imshow(np.clip(picture, 0, 1), interpolation="nearest")
        _mark(axes, changed[i], many)
        page.text(middle, y + above_h - 5, above[i], fontsize=SMALL, va="bottom")
        page.text(middle, y + above_h + panel_h + 6, below[i], fontsize=LABEL, color=_NEW, fontweight="bold")
    page.text(total / 2, top + rows * cell_h + 2, note, fontsize=SMALL)
    return page.figure


def class_pairs(
    successes: Tensor | np.ndarray,
    class_names: Sequence[str],
    *,
    title: str,
    column_label: str = "class that the attack reached",
) -> Figure:
    """Counts of successes from each original class (row) to each class reached (column), with the numbers written in.

    Args:
        successes: ``(K, K)`` counts, 0 or more. The diagonal is greyed: an image is not driven to its own class.
        class_names: K names.
        title: what attack on what model.
        column_label: what the columns are.

    Returns:
        A figure that is not tied to any window, of the 40 classes with most successes where there are more; the title
        says so.

    Raises:
        UserError: for values of another shape, not finite or below 0, and without one name a class.
    """
    counts = as_array(successes, "the successes", 2)
    if counts.shape[0] != counts.shape[1] or len(class_names) != len(counts):
        raise UserError(
            f"class_pairs: counts of shape {counts.shape} with {len(class_names)} class names: they are (K, K) with K "
            "names"
        )
    if not np.isfinite(counts).all() or counts.min() < 0:
        raise UserError("class_pairs: the counts hold values below 0, NaN or infinity")
    names = [str(name) for name in class_names]
    if len(counts) > _MOST_CLASSES:
        title = f"{title} ({_MOST_CLASSES} of {len(counts)} classes, those with most successes)"
        most = np.argsort(-(counts.sum(0) + counts.sum(1)), kind="stable")[:_MOST_CLASSES]
        most.sort()
        counts, names = counts[np.ix_(most, most)], [names[number] for number in most]

    labels = [wrap(name, _NAME_WIDTH, SMALL) for name in names]
    side = len(counts)
    digits = text_width(f"{counts.max():.0f}", SMALL)
    cell = round(max(36.0, digits + 8, max(text_height(label, SMALL) for label in labels) + 6))
    names_w = max(text_width(label, SMALL) for label in labels) + 12
    left, panel, bar = round(44 + names_w), side * cell, 22
    total = max(left + panel + 24 + bar + 96, 460)
    title = wrap(title, total - 40, TITLE)
    top = round(24 + text_height(title, TITLE))
    page = PixelFigure(total, top + panel + names_w + 46)
    page.text(total / 2, 14, title, fontsize=TITLE)

    axes = page.axes(left, top, panel, panel)
    scale_of = Normalize(0, max(float(counts.max()), 1.0))
    axes.imshow(counts, cmap=_COUNTS, norm=scale_of, interpolation="nearest", aspect="equal")
    axes.set(xticks=[], yticks=[])
    for row in range(side):
        axes.add_patch(Rectangle((row - 0.5, row - 0.5), 1, 1, facecolor="#d9d9d9", edgecolor="none"))
        middle = (row + 0.5) * cell
        page.text(left - 8, top + middle, labels[row], fontsize=SMALL, ha="right", va="center")
        page.text(left + middle, top + panel + 8, labels[row], fontsize=SMALL, rotation=90, va="top")
        for column in range(side):
            if row != column and counts[row, column] > 0:
                dark = scale_of(counts[row, column]) > 0.55
                axes.text(
                    column,
                    row,
                    f"{counts[row, column]:.0f}",
                    fontsize=SMALL,
                    ha="center",
                    va="center",
                    color="white" if dark else "black",
                )
    page.text(14, top + panel / 2, "true class", fontsize=LABEL, rotation=90, ha="left", va="center")
    page.text(left + panel / 2, top + panel + names_w + 16, column_label, fontsize=LABEL)
    bar_axes = page.axes(left + panel + 24, top, bar, panel)
    shown = page.figure.colorbar(ScalarMappable(scale_of, _COUNTS), cax=bar_axes)
    shown.ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    shown.ax.tick_params(labelsize=SMALL)
    shown.set_label("successes", fontsize=LABEL)
    return page.figure


def classes_reached(counts: Mapping[str, Sequence[int] | Tensor | np.ndarray], *, title: str) -> Figure:
    """How many images could be driven to how many classes: a group of bars for 0, 1, …, K - 1 classes.

    Args:
        counts: for each attack K numbers of images, those that reached 0, 1, …, K - 1 classes.
        title: what was attacked.

    Returns:
        A figure that is not tied to any window. With several attacks the bars are shares of the images, so that
        attacks of unequal numbers of images compare; the legend says how many each has.

    Raises:
        UserError: without an attack, and for attacks of unequal numbers of classes.
    """
    if not counts:
        raise UserError("classes_reached: no attack to draw")
    arrays = {name: as_array(np.asarray(values), name, 1) for name, values in counts.items()}
    sizes = {len(values) for values in arrays.values()}
    if len(sizes) > 1:
        raise UserError(f"classes_reached: counts of {' and '.join(map(str, sorted(sizes)))} classes in one figure")
    size = sizes.pop()
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)  # inches
    figure = Figure(figsize=(8, 5.2), dpi=DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / len(arrays)
    for number, (name, values) in enumerate(arrays.items()):
        images = values.sum()
        places = np.arange(size) + (number - (len(arrays) - 1) / 2) * width
        bars = axes.bar(
            places,
            values / max(images, 1),
            width=0.92 * width,
            color=_COLOURS[number % len(_COLOURS)],
            hatch=("", "//", "..", "xx")[number % 4],
            edgecolor="white",
            linewidth=0.5,
        )
        bars.set_label(wrap(f"{name} ({images:.0f} images)", 680, LABEL))
        if len(arrays) == 1 and size <= 12:
            axes.bar_label(bars, [f"{value:.0f}" for value in values], fontsize=SMALL, padding=2)
    axes.margins(x=0.02, y=0.12)
    axes.set_ylim(bottom=0)
    if size <= 20:
        axes.set_xticks(range(size))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    axes.set_title(wrap(title, 760, TITLE), fontsize=TITLE, pad=12, parse_math=False)
    axes.set_xlabel("number of target classes that an image reached (0: it resisted all)", fontsize=LABEL)
    axes.set_ylabel("share of the images", fontsize=LABEL)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.tick_params(labelsize=SMALL)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    longest = max(len(name) for name in arrays) + 16
    legend = figure.legend(
        loc="outside lower center", ncols=max(1, min(len(arrays), 90 // (longest + 6))), fontsize=LABEL, frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _mark(axes: Axes, changed: np.ndarray, framed: bool) -> None:
    """A ring around each changed pixel or a frame around all, black in white so that it shows on any image."""
    rows, columns = np.nonzero(changed)
    height, width = changed.shape
    radius = max(1.2, 0.055 * max(height, width))
    for colour, line in (("white", 3.6), ("black", 1.4)):
        style: dict[str, Any] = {"fill": False, "edgecolor": colour, "linewidth": line}
        if framed and len(rows):
            corner = float(columns.min()) - 0.5, float(rows.min()) - 0.5
            axes.add_patch(Rectangle(corner, float(np.ptp(columns)) + 1, float(np.ptp(rows)) + 1, **style))
        elif not framed:
            for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
                axes.add_patch(Circle((column, row), radius, **style))


def _classes(values: Sequence[int] | Tensor, name: str, count: int, num_classes: int) -> list[int]:
    classes = [int(value) for value in values]
    if len(classes) != count or not all(0 <= value < num_classes for value in classes):
        raise UserError(
            f"pixel_examples: {name} are {count} classes, one an image, each with one of the {num_classes} class names"
        )
    return classes

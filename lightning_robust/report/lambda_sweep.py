"""The two figures of a sweep over λ: accuracy and IoU against it, and the maps of mean |∇x| in rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from lightning_robust.errors import UserError
from lightning_robust.report.curves import Values, curve
from lightning_robust.report.figures import LABEL, SMALL, TITLE, PixelFigure, as_array, text_height, wrap

_COLOURS = "magma"
_MOST_COLUMNS = 7  # maps in a row: 14 are two rows as wide as a page
_SIDE = 128  # screen pixels of a map's longer side, about
_WHOLE = 64  # a map of more rows or columns is shown by the pixels in its middle: finer ones would run together


def lambda_curves(lams: Values, acc: Values, iou: Values, *, chance: float, title: str) -> Figure:
    """Clean accuracy and IoU against λ, with the IoU that chance gives as a dashed line.

    Args:
        lams: n values of λ.
        acc: n accuracies in [0, 1].
        iou: n IoUs in [0, 1].
        chance: IoU of two sets of pixels of these sizes that know nothing of each other.
        title: of what model and data.

    Returns:
        A figure that is not tied to any window.
    """
    by_chance = f"IoU by chance ({chance:.2f})"
    series = {
        "clean accuracy": acc,
        "IoU of the weakest with the connected pixels": iou,
        by_chance: [chance] * len(as_array(np.asarray(lams), "the values of λ", 1)),
    }
    figure = curve(lams, series, "λ (0: the image itself, 1: its reconstruction)", "accuracy, IoU", title)
    for line in (figure.axes[0].lines[2], figure.legends[0].legend_handles[2]):
        line.set(color="#666666", linestyle="--", linewidth=1.5, marker="none", zorder=1)  # type: ignore[union-attr]
    return figure


def lambda_maps(
    maps: Tensor | np.ndarray, lams: Sequence[float], *, title: str, unit_label: str, iou: Sequence[float] | None = None
) -> Figure:
    """The maps for some λ side by side, each in the colours from 0 to its own largest value, which stands below it.

    Each map has its own scale, since what is compared is where a map is large; how large, say the numbers.

    Args:
        maps: ``(n, H, W)`` finite values, 0 or more. Of maps larger than 64 × 64 the pixels in the middle are shown.
        lams: their λ.
        title: what the maps show.
        unit_label: quantity and unit, for the note below.
        iou: n numbers to write below, too.

    Returns:
        A figure that is not tied to any window.

    Raises:
        UserError: for values of another shape, not finite or below 0, and for other numbers of λ.
    """
    values = as_array(maps, "the maps", 3)
    if not np.isfinite(values).all() or values.min() < 0:
        raise UserError("lambda_maps: the maps hold values below 0, NaN or infinity")
    if len(lams) != len(values) or (iou is not None and len(iou) != len(values)):
        raise UserError(f"lambda_maps: {len(lams)} values of λ (and IoUs) for {len(values)} maps")
    height, width = values.shape[1:]
    note = f"{unit_label}; in each map black is 0 and the brightest its own largest value, which stands below it"
    if max(height, width) > _WHOLE:
        top, left = (max(0, (size - _WHOLE) // 2) for size in (height, width))
        values = values[:, top : top + _WHOLE, left : left + _WHOLE]
        note += f"; shown are the {values.shape[1]} × {values.shape[2]} pixels in the middle of {height} × {width}"

    scale = max(1, round(_SIDE / max(values.shape[1:])))
    panel_h, panel_w = values.shape[1] * scale, values.shape[2] * scale
    rows = -(-len(values) // _MOST_COLUMNS)
    columns = -(-len(values) // rows)
    below = [f"largest {part.max():.2e}" for part in values]
    if iou is not None:
        below = [f"IoU {value:.2f}\n{text}" for value, text in zip(iou, below, strict=True)]
    cell_w = max(panel_w, 120) + 14
    above_h, below_h = text_height("λ", LABEL) + 6, text_height(below[0], SMALL) + 8
    cell_h = above_h + panel_h + below_h + 8

    left, bar = 16, 20
    total = max(left + columns * cell_w + bar + 100, 460)
    title, note = wrap(title, total - 40, TITLE), wrap(note, total - 40, SMALL)
    top = 26 + text_height(title, TITLE)
    page = PixelFigure(total, top + rows * cell_h + text_height(note, SMALL) + 16)
    page.text(total / 2, 14, title, fontsize=TITLE)
    for number, part in enumerate(values):
        row, column = divmod(number, columns)
        middle, y = round(left + (column + 0.5) * cell_w), round(top + row * cell_h)
        axes = page.axes(middle - panel_w // 2, y + above_h, panel_w, panel_h)
        axes.set(xticks=[], yticks=[])
        axes.imshow(part, cmap=_COLOURS, vmin=0, vmax=part.max() or 1.0, interpolation="nearest", aspect="equal")
        page.text(middle, y + above_h - 4, f"λ = {lams[number]:g}", fontsize=LABEL, va="bottom")
        page.text(middle, y + above_h + panel_h + 4, below[number], fontsize=SMALL)
    bar_h = rows * cell_h - above_h - below_h - 8
    axes = page.axes(left + columns * cell_w + 8, top + above_h, bar, bar_h)
    shown = page.figure.colorbar(ScalarMappable(Normalize(0, 1), _COLOURS), cax=axes)
    shown.ax.tick_params(labelsize=SMALL)
    shown.set_label(wrap("share of the largest", bar_h, LABEL), fontsize=LABEL)
    page.text(total / 2, top + rows * cell_h + 2, note, fontsize=SMALL)
    return page.figure

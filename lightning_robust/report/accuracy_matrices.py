"""Accuracies as coloured matrices with the numbers written in, several side by side on one scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
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

_COLOURS = "YlGnBu"  # dark is high, in print too
_UNKNOWN, _MARK = "#e6e6e6", "#b2182b"
_NUMBER = 11.0  # points
_CELL_H = 44
_NAME_WIDTH = 170


@dataclass(frozen=True, kw_only=True)
class AccuracyMatrix:
    """One matrix.

    Attributes:
        title: what its numbers are.
        rows: R names.
        columns: C names.
        values: ``(R, C)`` accuracies in [0, 1]; NaN for what was not measured.
        marks: ``(R, C)`` bool: cells that are framed, with ``mark`` written below the number; ``None``: none.
        mark: a short word.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Tensor | np.ndarray
    marks: Tensor | np.ndarray | None = None
    mark: str = "falls"


def accuracy_matrices(matrices: Sequence[AccuracyMatrix], *, title: str, note: str = "") -> Figure:
    """Matrices of accuracies, two side by side, with one colour bar.

    Args:
        matrices: at least one.
        title: what was measured.
        note: stands below.

    Returns:
        A figure that is not tied to any window.

    Raises:
        UserError: without a matrix, for names that do not fit the values, and for values outside [0, 1].
    """
    if not matrices:
        raise UserError("accuracy_matrices: no matrix to draw")
    drawn = [_Drawn(matrix) for matrix in matrices]
    side_by_side = 1 if len(drawn) == 1 else 2
    rows = [drawn[start : start + side_by_side] for start in range(0, len(drawn), side_by_side)]
    gap, margin, bar = 26, 16, 22
    widths = [max(row[column].width for row in rows if column < len(row)) for column in range(side_by_side)]
    total = max(margin + sum(widths) + gap * (side_by_side - 1) + 24 + bar + 84, 460)
    title, note = wrap(title, total - 40, TITLE), wrap(note, total - 40, LABEL) if note else ""
    top = 30 + text_height(title, TITLE)
    heights = [max(each.height for each in row) for row in rows]
    plot_h = sum(heights) + gap * (len(rows) - 1)
    page = PixelFigure(total, top + plot_h + 20 + (text_height(note, LABEL) + 6 if note else 0))
    page.text(total / 2, 14, title, fontsize=TITLE)
    y = float(top)
    for row, height in zip(rows, heights, strict=True):
        x = float(margin)
        for each, width in zip(row, widths, strict=False):
            each.draw(page, x, y)
            x += width + gap
        y += height + gap
    axes = page.axes(total - bar - 76, top, bar, plot_h)
    shown = page.figure.colorbar(ScalarMappable(Normalize(0, 100), _COLOURS), cax=axes)
    shown.ax.tick_params(labelsize=SMALL)
    shown.set_label("accuracy (%)", fontsize=LABEL)
    if note:
        page.text(total / 2, top + plot_h + 12, note, fontsize=LABEL)
    return page.figure


class _Drawn:
    """A matrix and the room it takes."""

    def __init__(self, matrix: AccuracyMatrix) -> None:
        self.values = as_array(matrix.values, f"the accuracies of {matrix.title}", 2)
        shape = len(matrix.rows), len(matrix.columns)
        known = self.values[np.isfinite(self.values)]
        if self.values.shape != shape or (known.size and not (known.min() >= 0 and known.max() <= 1)):
            raise UserError(
                f"accuracy_matrices: {matrix.title}: values of shape {self.values.shape} for {shape[0]} rows and "
                f"{shape[1]} columns: they are shares in [0, 1], one a cell"
            )
        self.marks = np.zeros(shape, bool) if matrix.marks is None else np.asarray(matrix.marks, bool)
        if self.marks.shape != shape:
            raise UserError(f"accuracy_matrices: {matrix.title}: marks of shape {self.marks.shape} for {shape}")
        self.mark = matrix.mark
        self.rows = [wrap(name, _NAME_WIDTH, LABEL) for name in matrix.rows]
        self.cell_w = round(max(62.0, *(min(text_width(name, SMALL), 96) + 12 for name in matrix.columns)))
        self.columns = [wrap(name, self.cell_w - 4, SMALL) for name in matrix.columns]
        self.names_w = max(text_width(name, LABEL) for name in self.rows) + 12
        self.names_h = max(text_height(name, SMALL) for name in self.columns) + 10
        self.panel_w, self.panel_h = shape[1] * self.cell_w, shape[0] * _CELL_H
        self.width = max(self.names_w + self.panel_w, 260.0)
        self.title = wrap(matrix.title, self.width, LABEL)
        self.title_h = text_height(self.title, LABEL) + 8
        self.height = self.title_h + self.names_h + self.panel_h

    def draw(self, page: PixelFigure, x: float, y: float) -> None:
        left, top = round(x + self.names_w), round(y + self.title_h + self.names_h)
        page.text(x, y, self.title, fontsize=LABEL, fontweight="bold", ha="left")
        axes = page.axes(left, top, self.panel_w, self.panel_h)
        axes.set(xticks=[], yticks=[], xlim=(0, len(self.columns)), ylim=(len(self.rows), 0))
        for column, name in enumerate(self.columns):
            page.text(left + (column + 0.5) * self.cell_w, top - 4, name, fontsize=SMALL, va="bottom")
        for row, name in enumerate(self.rows):
            page.text(left - 8, top + (row + 0.5) * _CELL_H, name, fontsize=LABEL, ha="right", va="center")
            for column in range(len(self.columns)):
                self._cell(axes, row, column)

    def _cell(self, axes: Axes, row: int, column: int) -> None:
        value, marked = self.values[row, column], self.marks[row, column]
        known = bool(np.isfinite(value))
        colour = ScalarMappable(Normalize(0, 1), _COLOURS).to_rgba(value) if known else _UNKNOWN
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=colour, edgecolor="white", linewidth=2))
        ink = "white" if known and value > 0.6 else "black"
        style: dict[str, Any] = {"ha": "center", "va": "center", "color": ink}
        number = f"{100 * value:.1f}" if known else "–"
        axes.text(column + 0.5, row + (0.32 if marked else 0.5), number, fontsize=_NUMBER, **style)
        if marked:
            frame = 3 * 72 / DPI  # points of three screen pixels
            inside = 0.06
            axes.add_patch(
                Rectangle(
                    (column + inside / 2, row + inside),
                    1 - inside,
                    1 - 2 * inside,
                    fill=False,
                    edgecolor=_MARK,
                    linewidth=frame,
                    zorder=3,
                )
            )
            style["color"] = "white" if known and value > 0.6 else _MARK
            axes.text(column + 0.5, row + 0.72, self.mark, fontsize=SMALL, fontweight="bold", **style)

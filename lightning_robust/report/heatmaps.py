"""Maps of one value a pixel: one of a data set, or one a class on a shared scale."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from torch import Tensor

from lightning_robust.errors import UserError
from lightning_robust.report.figures import LABEL, SMALL, TITLE, PixelFigure, as_array, text_height, text_width, wrap

_COLOURS = "magma"  # perceptually uniform, readable without colour vision
_MARK = "#00e5ff"  # stands out from all of magma
_SIDE = 640  # screen pixels of a map's longer side, about
_SMALL_SIDE = 150  # the same of a class's map
_OUTLINE_SCALE = 8  # screen pixels that a pixel needs before its outline leaves anything of it to see
_DETAIL = 24  # rows and columns of the enlarged detail
_MOST_CLASSES = 64
_COMMON = 0.99  # share of the pixels whose values the colours resolve where few others are much larger


def heatmap(
    map: Tensor | np.ndarray, *, title: str, unit_label: str, designated: Tensor | np.ndarray | None = None
) -> Figure:
    """One map in colour, with its scale.

    Where the largest 1 % of the values would leave the rest without contrast, the scale ends at the 99th percentile;
    the colour bar then ends in an arrow, and the figure says how large the largest value is.

    Args:
        map: ``(H, W)`` finite values.
        title: what the map shows.
        unit_label: quantity and unit, beside the colour bar.
        designated: ``(H, W)``, not 0 for pixels to outline. Where pixels are too small on the screen for outlines that
            are finely scattered, an enlarged detail of the centre shows them.

    Returns:
        A figure that is not tied to any window.

    Raises:
        UserError: for values of another shape or not finite, and a ``designated`` of another size.
    """
    values = as_array(map, "the map", 2)
    if not np.isfinite(values).all():
        raise UserError("the map holds NaN or infinity: there is no colour for it")
    marks = _marks(designated, values.shape)
    height, width = values.shape
    scale = _scale(values.shape, _SIDE)
    edges = None if marks is None else _edges(marks)
    fine = edges is not None and _too_fine(edges, values.shape, scale)
    scale_of, extend, beyond = _scale_of(values)

    left, gap, bar = 78, 24, 22
    panel_w, panel_h = width * scale, height * scale
    detail_scale = max(panel_h // _DETAIL, _OUTLINE_SCALE)
    detail = min(_DETAIL, height, width)
    detail_w = detail * detail_scale + 96 if fine else 0
    total = max(left + panel_w + detail_w + gap + bar + 104, 420)
    title = wrap(title, total - 40, TITLE)
    top = 22 + text_height(title, TITLE) + (26 if fine else 0)
    outlined = "" if marks is None else f"outlined: designated pixels ({marks.mean():.1%})"
    note = wrap("\n".join(line for line in (outlined, beyond) if line), total - 40, LABEL)
    below = 62 + (text_height(note, LABEL) + 8 if note else 0)
    plot_h = max(panel_h, detail * detail_scale if fine else 0)
    page = PixelFigure(total, top + plot_h + below)
    page.text(total / 2, 14, title, fontsize=TITLE)

    main = page.axes(left, top, panel_w, panel_h)
    _draw(main, values, scale_of, (0, 0))
    if fine and marks is not None:
        row, column = (height - detail) // 2, (width - detail) // 2
        window = np.s_[row : row + detail, column : column + detail]
        main.add_patch(Rectangle((column - 0.5, row - 0.5), detail, detail, fill=False, edgecolor=_MARK, linewidth=1.5))
        main.set_title("whole map", fontsize=LABEL)
        side = page.axes(left + panel_w + 72, top, detail * detail_scale, detail * detail_scale)
        _draw(side, values[window], scale_of, (row, column))
        _outline(side, _edges(marks[window]) + np.array([column, row]))
        side.set_title("detail: the framed pixels", fontsize=LABEL)
    elif edges is not None:
        _outline(main, edges)
    bar_axes = page.axes(left + panel_w + detail_w + gap, top, bar, plot_h)
    _colour_bar(page.figure, bar_axes, scale_of, extend, unit_label)
    if note:
        page.text(total / 2, top + plot_h + 56, note, fontsize=LABEL)
    return page.figure


def class_heatmaps(
    maps: Tensor | np.ndarray,
    class_names: Sequence[str],
    *,
    title: str,
    unit_label: str,
    designated: Tensor | np.ndarray | None = None,
) -> Figure:
    """One map a class, side by side on one scale.

    Args:
        maps: ``(K, H, W)``; a class whose map holds NaN is shown as one without images.
        class_names: K names.
        title: what the maps show.
        unit_label: quantity and unit, beside the colour bar.
        designated: ``(H, W)``, not 0 for pixels to outline in each map. Where pixels are too small on the screen for
            outlines that are finely scattered, a panel of its own shows them.

    Returns:
        A figure of the first 64 classes; the title says so where there are more.

    Raises:
        UserError: for values of another shape, without one name a class, or without any map.
    """
    values = as_array(maps, "the class maps", 3)
    if len(class_names) != len(values):
        raise UserError(f"class_heatmaps: {len(class_names)} class names for {len(values)} maps")
    marks = _marks(designated, values.shape[1:])
    if len(values) > _MOST_CLASSES:
        title = f"{title} (first {_MOST_CLASSES} of {len(values)} classes)"
        values, class_names = values[:_MOST_CLASSES], class_names[:_MOST_CLASSES]
    known = np.isfinite(values).all((1, 2))
    if not known.any():
        raise UserError("class_heatmaps: no class has a map without NaN: give it maps of classes that have images")

    scale = _scale(values.shape[1:], _SMALL_SIDE)
    panel_h, panel_w = values.shape[1] * scale, values.shape[2] * scale
    edges = None if marks is None else _edges(marks)
    extra = edges is not None and _too_fine(edges, values.shape[1:], scale)
    panels = len(values) + extra
    columns = _columns(panels, (panel_w + 18) / (panel_h + 30))
    rows = -(-panels // columns)
    names = [wrap(str(name), panel_w + 8, LABEL) for name in class_names]
    if extra:
        names.append(wrap("(designated)", panel_w + 8, LABEL))
    name_h = max(text_height(name, LABEL) for name in names) + 10
    cell_w, cell_h = panel_w + 18, panel_h + name_h + 12
    scale_of, extend, beyond = _scale_of(values[known])
    outlined = (
        "" if marks is None else f"{'last panel' if extra else 'outlined'}: designated pixels ({marks.mean():.1%})"
    )

    left, bar = 30, 22
    total = max(left + columns * cell_w + bar + 130, 420)
    title = wrap(title, total - 40, TITLE)
    top = 24 + text_height(title, TITLE)
    note = wrap("\n".join(line for line in (outlined, beyond) if line), total - 40, LABEL)
    page = PixelFigure(total, top + rows * cell_h + 14 + text_height(note, LABEL))
    page.text(total / 2, 14, title, fontsize=TITLE)
    for number, name in enumerate(names):
        row, column = divmod(number, columns)
        x, y = left + column * cell_w, top + row * cell_h
        axes = page.axes(x, y + name_h, panel_w, panel_h)
        axes.set(xticks=[], yticks=[])
        page.text(x + panel_w / 2, y + name_h - 5, name, fontsize=LABEL, va="bottom")
        if marks is not None and number == len(values):
            axes.imshow(marks, cmap=ListedColormap(["black", _MARK]), vmin=0, vmax=1, interpolation="nearest")
        elif known[number]:
            axes.imshow(values[number], cmap=_COLOURS, norm=scale_of, interpolation="nearest", aspect="equal")
            if edges is not None and not extra:
                _outline(axes, edges, 1.0)
        else:
            axes.set_facecolor("#dddddd")
            axes.text(0.5, 0.5, "no images", transform=axes.transAxes, ha="center", va="center", fontsize=SMALL)
    bar_h = rows * cell_h - name_h - 12
    bar_axes = page.axes(left + columns * cell_w + 12, top + name_h, bar, bar_h)
    _colour_bar(page.figure, bar_axes, scale_of, extend, unit_label)
    if note:
        page.text(total / 2, top + rows * cell_h + 4, note, fontsize=LABEL)
    return page.figure


def _scale(shape: tuple[int, ...], side: int) -> int:
    """Screen pixels of a map's pixel: a whole number, so that all get the same."""
    return max(1, round(side / max(shape)))


def _columns(count: int, aspect: float) -> int:
    """How many columns make a grid about twice as wide as high, with few places left empty."""

    def cost(columns: int) -> float:
        rows = -(-count // columns)
        return abs(float(np.log(columns * aspect / rows / 2))) + (columns * rows - count) / count

    return min(range(1, count + 1), key=cost)


def _too_fine(edges: np.ndarray, shape: tuple[int, ...], scale: int) -> bool:
    """Whether outlines would hide the map: a contour may be drawn at any size, a fine grid may not."""
    return scale < _OUTLINE_SCALE and len(edges) > 0.25 * shape[0] * shape[1]


def _scale_of(values: np.ndarray) -> tuple[Normalize, str, str]:
    """The colour scale, which of its ends is open ("max" or "neither"), and a sentence on what lies beyond."""
    low, high, common = float(values.min()), float(values.max()), float(np.quantile(values, _COMMON))
    if high == low:
        return Normalize(low, low + (abs(low) or 1.0)), "neither", ""
    if low < common and high - low > 2 * (common - low):
        share = float((values > common).mean())
        return Normalize(low, common), "max", f"{share:.1%} of the values lie above the scale, up to {high:.3g}"
    return Normalize(low, high), "neither", ""


def _marks(designated: Tensor | np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray | None:
    if designated is None:
        return None
    marks = as_array(designated, "designated", 2) != 0
    if marks.shape != tuple(shape):
        raise UserError(f"designated pixels of shape {marks.shape} do not fit a map of shape {tuple(shape)}")
    return marks


def _edges(marks: np.ndarray) -> np.ndarray:
    """The borders between designated pixels and others, ``(edges, 2 ends, 2 (x, y))``, pixel centres on integers."""
    framed = np.pad(marks, 1)
    y, x = np.nonzero(framed[:, 1:] != framed[:, :-1])
    upright = np.stack([np.stack([x, y - 1], 1), np.stack([x, y], 1)], 1)
    y, x = np.nonzero(framed[1:] != framed[:-1])
    level = np.stack([np.stack([x - 1, y], 1), np.stack([x, y], 1)], 1)
    return np.concatenate([upright, level]) - 0.5


def _outline(axes: Axes, edges: np.ndarray, width: float = 1.5) -> None:
    # not clipped, and above the frame: half of a line at the map's border lies outside of it
    axes.add_collection(
        LineCollection(list(edges), colors=_MARK, linewidths=width, capstyle="projecting", clip_on=False, zorder=3)
    )


def _draw(axes: Axes, values: np.ndarray, scale_of: Normalize, origin: tuple[int, int]) -> None:
    height, width = values.shape
    row, column = origin
    extent = (column - 0.5, column + width - 0.5, row + height - 0.5, row - 0.5)
    axes.imshow(values, cmap=_COLOURS, norm=scale_of, interpolation="nearest", aspect="equal", extent=extent)
    box = axes.get_window_extent()
    for axis, name, length in ((axes.xaxis, "column (pixel)", box.width), (axes.yaxis, "row (pixel)", box.height)):
        axis.set_major_locator(MaxNLocator(nbins=min(8, int(length // 40) + 1), integer=True, min_n_ticks=1))
        axis.set_label_text(name, fontsize=LABEL)
    axes.tick_params(labelsize=SMALL)


def _colour_bar(figure: Figure, axes: Axes, scale_of: Normalize, extend: str, unit_label: str) -> None:
    bar = figure.colorbar(ScalarMappable(scale_of, _COLOURS), cax=axes, extend=extend, extendfrac=0.04)
    formatter = ScalarFormatter(useMathText=True)
    formatter.set_powerlimits((-3, 4))
    bar.ax.yaxis.set_major_formatter(formatter)
    bar.ax.tick_params(labelsize=SMALL)
    bar.ax.yaxis.get_offset_text().set(fontsize=SMALL, ha="left")
    bar.ax.yaxis.OFFSETTEXTPAD = 9  # the power of ten stands clear of a number at the upper end
    bar.set_label(unit_label, fontsize=LABEL, parse_math=False)
    height = axes.get_position().height * figure.bbox.height
    if text_width(unit_label, LABEL) > height:
        bar.set_label(wrap(unit_label, height, LABEL), fontsize=SMALL, parse_math=False)

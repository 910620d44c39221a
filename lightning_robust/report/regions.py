"""Figures of regions of importance and of attack: over the image, of classes, and the blob (arXiv 2011.10794)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from lightning_robust.errors import UserError
from lightning_robust.regions import REGION_NAMES, Region
from lightning_robust.report.figures import LABEL, SMALL, TITLE, PixelFigure, as_array, text_height, text_width, wrap

REGION_COLOURS: dict[Region, str] = {
    Region.UV: "#d55e00",
    Region.U_ONLY: "#0072b2",
    Region.V_ONLY: "#f0e442",
    Region.NEITHER: "#bbbbbb",
}
"""Of Okabe and Ito: told apart without colour vision, and by brightness in print."""

_LOOKED, _CHANGED = "viridis", "magma"
_BLOB = (0.90, 0.10, 0.90)  # magenta: few photographs have it
_SIDE = 132  # screen pixels of a panel's longer side, about
_MOST_ROWS = 10

Maps = Tensor | np.ndarray | Sequence[Tensor]


def region_examples(
    images: Sequence[Tensor],
    importance: Maps,
    change: Maps,
    regions: Maps,
    labels: Sequence[str],
    *,
    title: str,
) -> Figure:
    """A row an image: the image, importance and change laid over it, and its four regions.

    Args:
        images: n images ``(C, H, W)`` in [0, 1], C 1 or 3; the first 10 are shown.
        importance: n maps ``(H, W)`` in [0, 1].
        change: n maps ``(H, W)``, 0 or more, in pixel units; on one scale.
        regions: n maps ``(H, W)`` of :class:`~lightning_robust.regions.Region`.
        labels: n texts beside the rows.
        title: of what model and attack.

    Returns:
        A figure that is not tied to any window.

    Raises:
        UserError: for numbers and shapes that do not fit each other.
    """
    pictures = _pictures(images)[:_MOST_ROWS]
    looked, changed, parts = (
        _stack(maps, what, pictures)
        for maps, what in ((importance, "importance maps"), (change, "change maps"), (regions, "region maps"))
    )
    if len(labels) != len(images):
        raise UserError(f"region_examples: {len(labels)} labels for {len(images)} images")
    largest = float(changed.max()) or 1.0
    grid = _Grid(
        pictures.shape[1:3],
        rows=list(labels[: len(pictures)]),
        columns=["image", "importance", "change by the attack", "the four regions"],
        title=title,
        bars=[(_LOOKED, 1.0, "importance"), (_CHANGED, largest, "change (L2, pixel units)")],
        legend=True,
    )
    for row, picture in enumerate(pictures):
        grid.picture(row, 0, picture)
        grid.picture(row, 1, _heat(picture, looked[row], _LOOKED, 1.0))
        grid.picture(row, 2, _heat(picture, changed[row], _CHANGED, largest))
        grid.picture(row, 3, _coloured(parts[row], picture))
    return grid.page.figure


def region_representatives(
    importance: Maps, change: Maps, regions: Maps, labels: Sequence[str], *, title: str
) -> Figure:
    """A row a class or direction: its mean importance, its mean change, and the four regions of the two.

    Args:
        importance: n mean maps ``(H, W)``, each drawn from 0 to the largest of all.
        change: n mean maps ``(H, W)`` in pixel units, likewise.
        regions: n maps ``(H, W)`` of :class:`~lightning_robust.regions.Region`.
        labels: n texts beside the rows.
        title: of what model and attack.

    Raises:
        UserError: for numbers and shapes that do not fit each other.
    """
    looked = as_array(_whole(importance), "the importance maps", 3)[:_MOST_ROWS]
    changed = as_array(_whole(change), "the change maps", 3)[:_MOST_ROWS]
    parts = as_array(_whole(regions), "the region maps", 3)[:_MOST_ROWS]
    if not looked.shape == changed.shape == parts.shape or len(labels) < len(looked):
        raise UserError(
            f"region_representatives: maps of shape {looked.shape}, {changed.shape} and {parts.shape} and "
            f"{len(labels)} labels: give one of each for every direction"
        )
    if len(labels) > _MOST_ROWS:
        title = f"{title} (first {_MOST_ROWS} of {len(labels)})"
    tops = [float(maps.max()) or 1.0 for maps in (looked, changed)]
    grid = _Grid(
        looked.shape[1:],
        rows=list(labels[: len(looked)]),
        columns=["mean importance", "mean change", "the four regions"],
        title=title,
        bars=[(_LOOKED, tops[0], "mean importance"), (_CHANGED, tops[1], "mean change (L2, pixel units)")],
        legend=True,
    )
    for row in range(len(looked)):
        for column, (maps, colours) in enumerate(((looked, _LOOKED), (changed, _CHANGED))):
            grid.axes(row, column).imshow(maps[row], cmap=colours, vmin=0, vmax=tops[column], interpolation="nearest")
        grid.picture(row, 2, _coloured(parts[row], None))
    return grid.page.figure


def blob_figure(
    frequency: Maps,
    blobs: Maps,
    examples: Sequence[Tensor],
    blanked: Sequence[Tensor],
    labels: Sequence[str],
    *,
    title: str,
) -> Figure:
    """A row a direction: how often a pixel is attacked and unimportant, the blob over an image, the image blanked.

    Args:
        frequency: n maps ``(H, W)`` in [0, 1].
        blobs: n bool maps ``(H, W)``.
        examples: n images ``(C, H, W)``.
        blanked: the same images with their blobs blank.
        labels: n texts beside the rows.
        title: of what model and attack.

    Raises:
        UserError: for numbers and shapes that do not fit each other.
    """
    pictures, after = _pictures(examples)[:_MOST_ROWS], _pictures(blanked)[:_MOST_ROWS]
    often, inside = (_stack(m, w, pictures) for m, w in ((frequency, "frequencies"), (blobs, "blobs")))
    if pictures.shape != after.shape or len(labels) != len(examples):
        raise UserError(f"blob_figure: {len(labels)} labels, {len(examples)} images and {len(blanked)} blanked ones")
    top = float(often.max()) or 1.0
    grid = _Grid(
        pictures.shape[1:3],
        rows=list(labels[: len(pictures)]),
        columns=["how often in ŪV", "blob over an image", "the image blanked"],
        title=title,
        bars=[(_LOOKED, top, "share of the images with the pixel in ŪV")],
        legend=False,
        note="magenta: the blob",
    )
    for row, picture in enumerate(pictures):
        grid.axes(row, 0).imshow(often[row], cmap=_LOOKED, vmin=0, vmax=top, interpolation="nearest")
        mixed = 0.45 * _grey(picture) + 0.55 * np.array(_BLOB)
        grid.picture(row, 1, np.where(inside[row][..., None] > 0, mixed, picture))
        grid.picture(row, 2, after[row])
    return grid.page.figure


class _Grid:
    """Panels in rows with texts beside them and columns with headings, colour bars, and the legend of the regions."""

    def __init__(
        self,
        shape: Sequence[int],
        *,
        rows: list[str],
        columns: list[str],
        title: str,
        bars: list[tuple[str, float, str]],
        legend: bool,
        note: str = "",
    ) -> None:
        scale = max(1, round(_SIDE / max(shape)))
        self.panel_h, self.panel_w = shape[0] * scale, shape[1] * scale
        if scale == 1 and max(shape) > 2 * _SIDE:  # large photographs: fewer screen pixels than the image has
            shrink = _SIDE * 1.5 / max(shape)
            self.panel_h, self.panel_w = round(shape[0] * shrink), round(shape[1] * shrink)
        gap = 16
        side_texts = [wrap(text, 130, LABEL) for text in rows]
        self.left = round(max(text_width(text, LABEL) for text in side_texts)) + 30
        headings = [wrap(text, self.panel_w + gap - 4, LABEL) for text in columns]
        heading_h = max(text_height(text, LABEL) for text in headings) + 8
        bars_w = 96 * len(bars)
        width = max(self.left + len(columns) * (self.panel_w + gap) + bars_w + 24, 560 if legend else 460)
        title = wrap(title, width - 40, TITLE)
        self.top = 26 + text_height(title, TITLE) + heading_h
        self.cell_w, self.cell_h = self.panel_w + gap, self.panel_h + 14
        names = [REGION_NAMES[region] for region in Region] if legend else []
        below = (2 * 24 + 20) if legend else (30 if note else 8)
        height = self.top + len(rows) * self.cell_h + below
        self.page = PixelFigure(width, height)
        self.page.text(width / 2, 14, title, fontsize=TITLE)
        for number, text in enumerate(headings):
            middle = self.left + number * self.cell_w + self.panel_w / 2
            self.page.text(middle, self.top - 6, text, fontsize=LABEL, va="bottom")
        for number, text in enumerate(side_texts):
            self.page.text(
                self.left - 12,
                self.top + number * self.cell_h + self.panel_h / 2,
                text,
                fontsize=LABEL,
                ha="right",
                va="center",
            )
        bar_h = min(len(rows) * self.cell_h - 14, 2.5 * self.cell_h)
        for number, (colours, largest, text) in enumerate(bars):
            axes = self.page.axes(self.left + len(columns) * self.cell_w + number * 96, self.top, 18, bar_h)
            bar = self.page.figure.colorbar(ScalarMappable(Normalize(0, largest), colours), cax=axes)
            bar.ax.tick_params(labelsize=SMALL)
            bar.set_label(wrap(text, bar_h, SMALL), fontsize=SMALL)
        if legend:
            patches = [
                Patch(facecolor=REGION_COLOURS[region], edgecolor="#444444", label=name)
                for region, name in zip(Region, names, strict=True)
            ]
            shown = self.page.figure.legend(
                handles=patches, loc="lower center", ncols=2, fontsize=LABEL, frameon=False, handlelength=1.4
            )
            for entry in shown.get_texts():
                entry.set_parse_math(False)
        elif note:
            self.page.text(width / 2, height - 24, note, fontsize=LABEL)

    def axes(self, row: int, column: int) -> Axes:
        axes = self.page.axes(
            self.left + column * self.cell_w, self.top + row * self.cell_h, self.panel_w, self.panel_h
        )
        axes.set(xticks=[], yticks=[])
        return axes

    def picture(self, row: int, column: int, picture: np.ndarray) -> None:
        self.axes(row, column).imshow(np.clip(picture, 0, 1), interpolation="nearest", aspect="equal")


def _pictures(images: Sequence[Tensor]) -> np.ndarray:
    """``(n, H, W, 3)``."""
    values = as_array(_whole(images), "images", 4)
    if values.shape[1] not in (1, 3):
        raise UserError(f"images of shape {values.shape}: they have one or three channels")
    return np.broadcast_to(values, (len(values), 3, *values.shape[2:])).transpose(0, 2, 3, 1)


def _whole(maps: Maps | Sequence[Tensor]) -> Tensor | np.ndarray:
    if isinstance(maps, Tensor | np.ndarray):
        return maps
    return np.stack([np.asarray(each.detach().cpu(), dtype=np.float64) for each in maps]) if len(maps) else np.zeros(0)


def _stack(maps: Maps, what: str, pictures: np.ndarray) -> np.ndarray:
    values = as_array(_whole(maps), what, 3)[:_MOST_ROWS]
    if values.shape != pictures.shape[:3]:
        raise UserError(f"{what} of shape {values.shape} for images of shape {pictures.shape[:3]}: give one an image")
    return values


def _grey(picture: np.ndarray) -> np.ndarray:
    return np.repeat(picture.mean(-1, keepdims=True), 3, axis=-1)


def _heat(picture: np.ndarray, values: np.ndarray, colours: str, largest: float) -> np.ndarray:
    """A map in colour over the grey image, of which a third shows through."""
    coloured = ScalarMappable(Normalize(0, largest), colours).to_rgba(values)[..., :3]
    return 0.35 * _grey(picture) + 0.65 * coloured


def _coloured(regions: np.ndarray, picture: np.ndarray | None) -> np.ndarray:
    """The four regions in their colours, over the grey image where there is one."""
    rgb = np.ones((*regions.shape, 3))
    for region in Region:
        colour = np.array([int(REGION_COLOURS[region][place : place + 2], 16) / 255 for place in (1, 3, 5)])
        rgb[regions == region] = colour
    return rgb if picture is None else rgb * (0.65 + 0.35 * _grey(picture))

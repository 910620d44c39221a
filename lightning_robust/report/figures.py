"""What all figures share: fonts, a canvas that needs no window, and the ways out (file, uint8 image)."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from lightning_robust.errors import UserError
from lightning_robust.report.atomic import atomic_file

DPI = 100
TITLE, LABEL, SMALL = 14.0, 11.0, 9.5  # font sizes in points
_CHARACTER = 0.56  # mean width of a character, in font sizes; on the wide side


class PixelFigure:
    """A figure laid out in screen pixels from the top left, so that each image pixel gets a whole number of them.

    Layout engines stretch axes to fractions of a pixel: a striped 224×224 map then shows stripes of uneven width.

    Args:
        width: pixels.
        height: pixels.
    """

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
        FigureCanvasAgg(self.figure)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes whose upper left corner is ``left``, ``top`` pixels from that of the figure."""
        return self.figure.add_axes(
            (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        )

    def text(self, left: float, top: float, text: str, **style: Any) -> None:
        """Text at a pixel; ``$`` is a dollar."""
        style = {"ha": "center", "va": "top", "parse_math": False, **style}
        self.figure.text(left / self.width, 1 - top / self.height, text, **style)


def text_width(text: str, size: float) -> float:
    """About how many pixels the longest line of a text takes."""
    return max((len(line) for line in text.splitlines()), default=0) * size * _CHARACTER * DPI / 72


def text_height(text: str, size: float) -> float:
    """How many pixels the lines of a text take."""
    return len(text.splitlines()) * size * 1.25 * DPI / 72


def wrap(text: str, width: float, size: float) -> str:
    """Break a text into lines of at most ``width`` pixels; nothing is cut off."""
    characters = max(int(width / (size * _CHARACTER * DPI / 72)), 4)
    return "\n".join(
        "\n".join(textwrap.wrap(line, characters, break_on_hyphens=True)) for line in str(text).splitlines()
    )


def as_array(values: Tensor | np.ndarray, what: str, *dimensions: int) -> np.ndarray:
    """Numbers as a float64 array on the CPU.

    Raises:
        UserError: unless they have one of the given numbers of dimensions and are not empty.
    """
    if isinstance(values, Tensor):
        values = values.detach().to(device="cpu", dtype=torch.float64).numpy()
    array = np.asarray(values, dtype=np.float64)
    if array.ndim not in dimensions or array.size == 0:
        expected = " or ".join(str(number) for number in dimensions)
        raise UserError(f"{what} of shape {array.shape}: {expected} dimensions and at least one value are needed")
    return array


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure atomically; the suffix (.png, .pdf, .svg) says how.

    Args:
        figure: any matplotlib figure.
        path: the file; missing folders are made.

    Returns:
        The path written.

    Raises:
        UserError: for a suffix that matplotlib cannot write.
    """
    path, known = Path(path), figure.canvas.get_supported_filetypes()
    kind = path.suffix.lower().removeprefix(".")
    if kind not in known:
        raise UserError(f"the figure {path} cannot be written as {path.suffix!r}: name it .png, .pdf or .svg")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=figure.dpi)
    return path


def to_uint8_image(figure: Figure) -> np.ndarray:
    """Draw a figure as an image for a logger.

    Returns:
        ``(H, W, 3)`` uint8. Weights & Biases shows float images in [0, 1] as black: always give it these.
    """
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()

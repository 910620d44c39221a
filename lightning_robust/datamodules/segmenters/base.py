"""What finds an object in an image, and what all such methods share."""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from lightning_robust.errors import UserError

Pixels = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]


class Box(NamedTuple):
    """A region of interest: columns left to right and rows top to bottom, in pixels, the last ones included."""

    left: float
    top: float
    right: float
    bottom: float

    def scaled(self, scale: float) -> Box:
        """The box with the same centre and sides ``scale`` times as long."""
        down = (scale - 1) * (self.bottom - self.top + 1) / 2
        across = (scale - 1) * (self.right - self.left + 1) / 2
        return Box(self.left - across, self.top - down, self.right + across, self.bottom + down)


class Segmenter(Protocol):
    """Finds one object in the middle of an image.

    A segmenter is a frozen dataclass: its settings and :attr:`version` make up the key of a cache of masks.
    """

    @property
    def name(self) -> str:
        """What it is called on the command line."""
        ...

    @property
    def version(self) -> int:
        """Raised whenever the same settings give other masks than before."""
        ...

    def check(self) -> None:
        """Say early that a library is missing.

        Raises:
            UserError: naming the extra that brings it.
        """
        ...

    def __call__(self, image: Pixels, box: Box, key: int) -> BoolArray:
        """Find the object.

        Args:
            image: (H, W, 3) RGB.
            box: The annotated region of interest; a segmenter need not use it.
            key: Of the image's own randomness.

        Returns:
            (H, W), empty where it fails.
        """
        ...


def require(module: str, purpose: str, extra: str = "masks") -> None:
    """Say early, and without importing it, that a library is missing.

    Raises:
        UserError: naming the extra that brings it.
    """
    try:
        found = importlib.util.find_spec(module) is not None
    except ValueError:  # a module that was set to None
        found = False
    if not found:
        raise UserError(f"{purpose} needs {module}, which is not installed: pip install 'lightning-robust[{extra}]'")


def checked_range(owner: Any, name: str, low: float, high: float) -> None:
    """Check a setting.

    Raises:
        UserError: unless low ≤ value ≤ high.
    """
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f"{type(owner).__name__}: {name}={value!r}: give a number from {low:g} to {high:g}.")


def ellipse(size: tuple[int, int], box: Box) -> BoolArray:
    """The pixels whose centres lie in the ellipse that a box holds; (H, W)."""
    rows, columns = np.arange(size[0])[:, None], np.arange(size[1])[None]
    vertical = (rows - (box.top + box.bottom) / 2) / max((box.bottom - box.top + 1) / 2, 0.5)
    horizontal = (columns - (box.left + box.right) / 2) / max((box.right - box.left + 1) / 2, 0.5)
    inside: BoolArray = vertical**2 + horizontal**2 <= 1
    return inside

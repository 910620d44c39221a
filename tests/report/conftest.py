"""What can be said of a figure without eyes."""

from __future__ import annotations

import itertools

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from lightning_robust.report import to_uint8_image


def texts(figure: Figure) -> list[Text]:
    """All texts that are really drawn (an axis also keeps ticks that it does not show)."""
    drawn: list[Text] = []

    def draw(self: Text, *args: object) -> None:
        if self.get_visible() and self.get_text().strip():
            drawn.append(self)
        original(self, *args)

    original = Text.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", draw)
        to_uint8_image(figure)
    return drawn


def written(figure: Figure) -> str:
    """All that a figure says, without the line ends."""
    return " ".join(text.get_text().replace("\n", " ") for text in texts(figure))


def assert_legible(figure: Figure) -> None:
    """No text overlaps another, leaves the figure or is too small to read."""
    seen = []
    for text in texts(figure):
        box = text.get_window_extent()
        assert text.get_fontsize() >= 9
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= figure.bbox.width, text
        assert box.y1 <= figure.bbox.height, text
        seen.append((text.get_text(), box))
    assert seen
    for (one, a), (other, b) in itertools.combinations(seen, 2):
        overlap = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert overlap[0] <= 1 or overlap[1] <= 1, f"{one!r} overlaps {other!r}"

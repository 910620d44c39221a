"""What can be said of a figure without eyes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from lightning_robust.report import to_uint8_image


def _drawn(figure: Figure) -> list[Text]:
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


@pytest.fixture
def assert_legible() -> Callable[[Figure], None]:
    """No text overlaps another, leaves the figure or is too small to read."""

    def check(figure: Figure) -> None:
        texts = _drawn(figure)
        assert texts
        seen = [(text.get_text(), text.get_window_extent()) for text in texts]
        assert min(text.get_fontsize() for text in texts) >= 9
        for said, box in seen:
            inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
            assert inside, said
        for (one, a), (other, b) in itertools.combinations(seen, 2):
            overlap = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
            assert overlap[0] <= 1 or overlap[1] <= 1, f"{one!r} overlaps {other!r}"

    return check

from __future__ import annotations

import numpy as np
import pytest

from lightning_robust.errors import UserError
from lightning_robust.report import contact_sheet, to_uint8_image


def test_shows_the_outline_and_the_foreground() -> None:
    image = np.full((8, 8, 3), 100, dtype=np.uint8)
    mask = np.zeros((8, 8), dtype=bool)
    mask[2:6, 2:6] = True
    drawn = to_uint8_image(contact_sheet([image] * 3, [mask] * 3, ["a", "b", "c"], title="t", side=64, columns=2))
    magenta = (drawn == (255, 0, 255)).all(-1)
    green = (drawn == (0, 255, 0)).all(-1)
    assert magenta.sum() == 3 * 64 * 64 * 3 // 4
    assert green.sum() == 3 * (32 * 32 - 30 * 30)
    # the first pair's left picture is as wide as its side
    top, left = np.argwhere(green)[0]
    assert (drawn[top + 1 : top + 31, left + 1 : left + 31] == 100).all()


def test_images_of_any_size_and_gray_ones() -> None:
    images = [np.zeros((300, 20), dtype=np.uint8), np.zeros((4, 7, 1), dtype=np.uint8)]
    masks = [np.ones((300, 20), dtype=bool), np.ones((4, 7), dtype=bool)]
    drawn = to_uint8_image(contact_sheet(images, masks, ["a long caption of many words", ""], title="t"))
    assert (drawn == 0).all(-1).sum() > 1000


def test_what_does_not_fit() -> None:
    image, mask = np.zeros((4, 4, 3), dtype=np.uint8), np.zeros((4, 5), dtype=bool)
    with pytest.raises(UserError, match=r"a mask of shape \(4, 5\) for an image of shape \(4, 4\)"):
        contact_sheet([image], [mask], ["a"], title="t")
    for lists in (([], [], []), ([image], [], ["a"])):
        with pytest.raises(UserError, match="give one of each"):
            contact_sheet(*lists, title="t")

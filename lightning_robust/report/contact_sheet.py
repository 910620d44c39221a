"""Many small images with their masks on one page, for a person to judge."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image

from lightning_robust.errors import UserError
from lightning_robust.report.figures import SMALL, TITLE, PixelFigure, text_height, wrap

_GAP = 10
_OUTLINE, _BACKGROUND = (0, 255, 0), (255, 0, 255)  # green and magenta: colours that few photographs have


def contact_sheet(
    images: Sequence[npt.NDArray[np.uint8]],
    masks: Sequence[npt.NDArray[np.bool_]],
    captions: Sequence[str],
    *,
    title: str,
    side: int = 96,
    columns: int = 7,
) -> Figure:
    """Each image with the outline of its mask in green, and beside it the foreground alone, on magenta.

    Args:
        images: (H, W, 3) or (H, W) each, of any size.
        masks: (H, W) each, True on the foreground.
        captions: A text under each.
        title: Stands above.
        side: Screen pixels of an image's longer side.
        columns: Pairs in a row.

    Raises:
        UserError: for no image, or numbers or sizes that differ.
    """
    if not len(images) or not len(images) == len(masks) == len(captions):
        raise UserError(
            f"contact_sheet: {len(images)} images, {len(masks)} masks and {len(captions)} captions: give one of each "
            "for every image"
        )
    columns = min(columns, len(images))
    width = 2 * side + 2
    texts = [wrap(caption, width, SMALL) for caption in captions]
    below = max(text_height(text, SMALL) for text in texts) + 4
    total = _GAP + columns * (width + _GAP)
    head = wrap(title, total - 2 * _GAP, TITLE)
    top = text_height(head, TITLE) + 2 * _GAP
    rows = -(-len(images) // columns)
    page = PixelFigure(total, top + rows * (side + below + _GAP))
    page.text(total / 2, _GAP, head, fontsize=TITLE)
    canvas = np.full((round(page.height), total, 3), 255, dtype=np.uint8)
    for number, (image, mask, text) in enumerate(zip(images, masks, texts, strict=True)):
        left = _GAP + number % columns * (width + _GAP)
        upper = round(top + number // columns * (side + below + _GAP))
        for place, picture in enumerate(_pair(image, mask, side)):
            start = left + place * (side + 2)
            canvas[upper : upper + picture.shape[0], start : start + picture.shape[1]] = picture
        page.text(left + width / 2, upper + side + 2, text, fontsize=SMALL)
    axes = page.axes(0, 0, total, page.height)
    axes.imshow(canvas, interpolation="nearest", aspect="auto")
    axes.axis("off")
    axes.set_zorder(-1)
    return page.figure


def _pair(
    image: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_], side: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """The image with the mask's outline, and the foreground alone; both enlarged."""
    if image.ndim == 2 or image.shape[2] == 1:
        image = np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    if mask.shape != image.shape[:2]:
        raise UserError(f"contact_sheet: a mask of shape {mask.shape} for an image of shape {image.shape[:2]}")
    height, width = mask.shape
    scale = side / max(height, width)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    large = np.array(Image.fromarray(image).resize(size, Image.Resampling.NEAREST if scale > 1 else None))
    inside = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    padded = np.pad(inside, 1)
    core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    outlined, alone = large.copy(), large.copy()
    outlined[inside & ~core] = _OUTLINE
    alone[~inside] = _BACKGROUND
    return outlined, alone

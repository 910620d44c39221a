"""From an annotated photograph to square crops of its single objects (Vaishnavi et al., arXiv 1911.11946)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from lightning_robust.datamodules.coco_annotations import decode
from lightning_robust.datamodules.masks import BoolArray

Overlap = Literal["front", "keep"]
Pixels = npt.NDArray[np.uint8]


class Square(NamedTuple):
    """A crop: rows ``top`` to ``top + side`` and columns ``left`` to ``left + side``, the last ones not included."""

    top: int
    left: int
    side: int

    def of(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Cut it out of an array (H, W, …)."""
        return array[self.top : self.top + self.side, self.left : self.left + self.side]


class Crop(NamedTuple):
    """One object.

    Attributes:
        annotation: Its annotation's number.
        category: Its category's number.
        square: Where it was cut out.
        image: (side, side, 3), black on the pixels of other objects.
        mask: (side, side), its pixels.
        cut: Share of its pixels that the square has no room for.
        hidden: Share of its pixels that went to objects in front of it.
    """

    annotation: int
    category: int
    square: Square
    image: Pixels
    mask: BoolArray
    cut: float
    hidden: float


def square_around(box: Sequence[float], size: tuple[int, int], context: float = 0.0) -> Square:
    """Widen a box to a square inside the image.

    The square has the box's longer side and its centre; where it would leave the image it is moved inside, and where
    the box is longer than the image's shorter side, it is the largest square that the image has room for.

    Args:
        box: ``(left, top, width, height)``, COCO's.
        size: (height, width) of the image.
        context: What is added on each side, as a share of the longer side.

    Example:
        >>> square_around((90, 10, 8, 20), (60, 100))
        Square(top=10, left=80, side=20)
    """
    left, top, width, height = box
    rows, columns = size
    side = min(max(int(np.ceil(max(width, height) * (1 + 2 * context))), 1), rows, columns)
    first_row = int(np.floor(top + height / 2 - side / 2 + 0.5))
    first_column = int(np.floor(left + width / 2 - side / 2 + 0.5))
    return Square(min(max(first_row, 0), rows - side), min(max(first_column, 0), columns - side), side)


def crops(
    image: Pixels,
    annotations: Sequence[dict[str, Any]],
    wanted: Sequence[int],
    *,
    least_area: float,
    context: float,
    overlap: Overlap,
    name: str,
) -> tuple[list[Crop], dict[str, int]]:
    """Cut the wanted objects out of a photograph.

    Each crop shows one object: pixels of all other annotated objects, people and crowds included, are black. A crowd
    region is no object of its own. Where masks overlap (a bowl on a table whose mask goes on below it), ``front`` gives
    the pixel to the smaller object, which is the one in front, and ``keep`` leaves it to both.

    Args:
        image: (H, W, 3).
        annotations: All annotations of the image.
        wanted: Category numbers.
        least_area: Smaller objects, by their annotated area in square pixels, are left out.
        context: As of :func:`square_around`.
        overlap: Who gets a shared pixel.
        name: What the image is called in an error.

    Returns:
        The crops in the order of the annotations, and how many objects were left out: ``small``, ``hidden`` (nothing
        of them is left), ``outside`` (nothing of them lies in their square) and ``crowd``.

    Raises:
        UserError: For a mask that cannot be decoded.
    """
    left_out = dict.fromkeys(("small", "hidden", "outside", "crowd"), 0)
    chosen = []
    for place, annotation in enumerate(annotations):
        if annotation["category_id"] not in wanted:
            continue
        if annotation.get("iscrowd"):
            left_out["crowd"] += 1
        elif annotation["area"] < least_area:
            left_out["small"] += 1
        else:
            chosen.append(place)
    if not chosen:
        return [], left_out
    size = image.shape[0], image.shape[1]
    masks = [decode(each, size, f"annotation {each['id']} of {name}") for each in annotations]
    areas = [int(mask.sum()) for mask in masks]
    found = []
    for place in chosen:
        annotation, own = annotations[place], masks[place]
        square = square_around(annotation["bbox"], size, context)
        inside, others = square.of(own), np.zeros((square.side, square.side), dtype=bool)
        mask = inside.copy()
        for other, (each, region) in enumerate(zip(annotations, masks, strict=True)):
            if other == place:
                continue
            window = square.of(region)
            others |= window
            smaller = (areas[other], other) < (areas[place], place)
            if overlap == "front" and smaller and not each.get("iscrowd"):
                mask &= ~window
        if not mask.any():
            left_out["outside" if not inside.any() else "hidden"] += 1
            continue
        pixels = square.of(image).copy()
        pixels[others & ~mask] = 0
        cut, hidden = 1 - inside.sum() / areas[place], 1 - mask.sum() / inside.sum()
        found.append(Crop(annotation["id"], annotation["category_id"], square, pixels, mask, float(cut), float(hidden)))
    return found, left_out

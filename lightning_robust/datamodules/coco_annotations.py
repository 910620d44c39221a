"""An index of a COCO annotation file, and masks decoded by pycocotools."""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_robust.datamodules.coco_stream import records
from lightning_robust.datamodules.masks import BoolArray
from lightning_robust.errors import UserError


@dataclass(frozen=True)
class CocoIndex:
    """Where in an annotation file the annotations of an image are; some 40 bytes for each of them.

    Attributes:
        path: The annotation file.
        categories: Names by category number.
        images: ``(file name, height, width)`` by image number, in ascending order of the numbers.
        starts: First byte of each annotation, sorted by image number and, within one, by annotation number; int64 (A,).
        lengths: Bytes of each annotation; int64 (A,).
        bounds: ``starts[a:b]`` are the annotations of an image, by image number.
        counts: Single objects (no crowds) by category number.
    """

    path: Path
    categories: dict[int, str]
    images: dict[int, tuple[str, int, int]]
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    bounds: dict[int, tuple[int, int]]
    counts: Counter[int]

    def annotations(self, image: int) -> list[bytes]:
        """Read the annotations of an image from the file, as JSON."""
        first, end = self.bounds.get(image, (0, 0))
        found = []
        with self.path.open("rb") as file:
            for place in range(first, end):
                file.seek(int(self.starts[place]))
                found.append(file.read(int(self.lengths[place])))
        return found


def read_index(path: Path, least_area: float = 0) -> CocoIndex:
    """Go through an annotation file once.

    Args:
        path: ``instances_*.json``.
        least_area: Smaller objects (square pixels) are not counted in ``counts``.

    Raises:
        UserError: If the file is missing or damaged, lacks one of its three lists, an annotation is of an image or a
            category that the file does not have, or has no box, or two annotations have one number.
    """
    categories: dict[int, str] = {}
    images: dict[int, tuple[str, int, int]] = {}
    rows = array("q")  # image, annotation, first byte, length; a list of tuples would take six times the memory
    used: Counter[int] = Counter()
    counts: Counter[int] = Counter()
    for section, value, start, length in records(path):
        try:
            if section == "categories":
                categories[int(value["id"])] = str(value["name"])
            elif section == "images":
                images[int(value["id"])] = str(value["file_name"]), int(value["height"]), int(value["width"])
            else:
                rows.extend((int(value["image_id"]), int(value["id"]), start, length))
                category = int(value["category_id"])
                used[category] += 1
                if not value.get("iscrowd"):
                    counts[category] += float(value["area"]) >= least_area
                    if not _is_box(value.get("bbox")):
                        raise UserError(
                            f"{path}: annotation {value['id']} has the box {value.get('bbox')}: a box is four finite "
                            "numbers, left, top, width and height."
                        )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}: an entry of {section} at byte {start} lacks {error}: it is no COCO file."
            ) from error
    for name, found in (("categories", categories), ("images", images), ("annotations", rows)):
        if not found:
            raise UserError(f"{path} has no {name}: give a COCO file of instances, such as instances_train2017.json.")
    strange = sorted(set(used) - set(categories))
    if strange:
        raise UserError(f"{path} has annotations of category {strange[0]}, which it does not define.")
    table = np.frombuffer(rows, dtype=np.int64).reshape(-1, 4)
    table = table[np.lexsort((table[:, 1], table[:, 0]))]
    numbers, firsts = np.unique(table[:, 0], return_index=True)
    lost = [number for number in numbers.tolist() if number not in images]
    if lost:
        raise UserError(f"{path} has annotations of {len(lost)} images that it does not list, the first is {lost[0]}.")
    numbered, times = np.unique(table[:, 1], return_counts=True)
    if (times > 1).any():
        raise UserError(f"{path} has {times.max()} annotations of number {numbered[times.argmax()]}: number them anew.")
    ends = [*firsts[1:].tolist(), len(table)]
    bounds = {number: (first, end) for number, first, end in zip(numbers.tolist(), firsts.tolist(), ends, strict=True)}
    return CocoIndex(
        path, categories, dict(sorted(images.items())), table[:, 2].copy(), table[:, 3].copy(), bounds, counts
    )


def _is_box(box: Any) -> bool:
    numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(edge, int | float) for edge in box)
    return numbers and all(math.isfinite(edge) for edge in box) and min(box[2:]) >= 0


def parse(annotations: Sequence[bytes]) -> list[dict[str, Any]]:
    """Parse annotations as :meth:`CocoIndex.annotations` gives them."""
    return [json.loads(text) for text in annotations]


def decode(annotation: dict[str, Any], size: tuple[int, int], name: str) -> BoolArray:
    """Decode a polygon, an uncompressed or a compressed run-length mask by pycocotools.

    Args:
        annotation: A COCO annotation.
        size: (height, width) of its image.
        name: What the annotation is called in an error.

    Returns:
        (H, W).

    Raises:
        UserError: If it cannot be decoded, or is of another size.
    """
    from pycocotools import mask as tools

    shape = annotation.get("segmentation")
    try:
        if isinstance(shape, list):
            encoded = tools.merge(tools.frPyObjects(shape, *size))
        elif isinstance(shape, dict) and isinstance(shape.get("counts"), list):
            encoded = tools.frPyObjects(shape, *shape["size"])
        elif isinstance(shape, dict):
            encoded = {"size": list(shape["size"]), "counts": shape["counts"]}
        else:
            raise TypeError(f"a segmentation of type {type(shape).__name__}")
        if tuple(encoded["size"]) != tuple(size):
            raise ValueError(f"its mask is of size {tuple(encoded['size'])} and its image of {size}")
        covered = None if isinstance(shape, list) else sum(_runs(shape["counts"]))
        if covered not in (None, size[0] * size[1]):  # pycocotools would leave the rest to chance
            raise ValueError(f"its runs are of {covered} pixels and its image is of {size[0] * size[1]}")
        return np.asarray(tools.decode(encoded), dtype=bool)
    except Exception as error:  # pycocotools raises bare Exceptions
        raise UserError(f"{name} cannot be decoded ({error}): mend or remove it.") from error


def _runs(counts: list[int] | str | bytes) -> list[int]:
    """The lengths of the runs; of a compressed mask read as COCO writes them, five bits a character."""
    if isinstance(counts, list):
        return counts
    found: list[int] = []
    value = shift = 0
    for character in counts.encode() if isinstance(counts, str) else counts:
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the last of this number
            value -= (bits & 16) << (shift - 4)  # its sign
            found.append(value + (found[-2] if len(found) > 2 else 0))
            value = shift = 0
    return found

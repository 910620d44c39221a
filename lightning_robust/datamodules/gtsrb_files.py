"""The German Traffic Sign Recognition Benchmark in torchvision's file layout (Stallkamp et al. 2012)."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np
from PIL import Image

from lightning_robust.datamodules.dataset import UNREADABLE, corrupt_message
from lightning_robust.datamodules.masks_cache import Scene
from lightning_robust.datamodules.segmenters import Box, Pixels
from lightning_robust.errors import UserError

GtsrbSplit = Literal["train", "test"]

# fmt: off
CLASS_NAMES: Final = [
    "speed limit 20", "speed limit 30", "speed limit 50", "speed limit 60", "speed limit 70", "speed limit 80",
    "end of speed limit 80", "speed limit 100", "speed limit 120", "no passing", "no passing for trucks",
    "right of way at next crossing", "priority road", "yield", "stop", "no vehicles", "no trucks", "no entry",
    "danger", "curve left", "curve right", "double curve", "bumpy road", "slippery road", "road narrows right",
    "road work", "traffic signals", "pedestrians", "children", "bicycles", "snow or ice", "wild animals",
    "end of all limits", "turn right", "turn left", "ahead only", "ahead or right", "ahead or left", "keep right",
    "keep left", "roundabout", "end of no passing", "end of no passing for trucks",
]
# fmt: on
_COLUMNS: Final = ("Filename", "Width", "Height", "Roi.X1", "Roi.Y1", "Roi.X2", "Roi.Y2", "ClassId")


class Entry(NamedTuple):
    """A line of the benchmark's tables.

    Attributes:
        path: The image.
        label: Its class number.
        size: (height, width) that the region of interest is measured in.
        box: The region of interest.
        track: Which shots are of one sign: the number before the underscore in a training image's name; no test image
            has one.
    """

    path: Path
    label: int
    size: tuple[int, int]
    box: Box
    track: str


def entries(root: Path, split: GtsrbSplit) -> list[Entry]:
    """List the images of a split, in the order of the classes and files.

    Args:
        root: Folder that has ``GTSRB/Training`` and ``GTSRB/Final_Test/Images``, and the test labels
            ``GT-final_test.csv``, as torchvision puts them there, or the latter in ``GTSRB/Final_Test/Images``.
        split: Which.

    Raises:
        UserError: If a folder or table is missing, or a table is of another kind.
    """
    base = root / "GTSRB"
    if not base.is_dir():
        raise UserError(
            f"GTSRB was not found: run with --data.download true, or point --data.root at the folder that has "
            f"gtsrb/GTSRB/Training and gtsrb/GTSRB/Final_Test/Images (it is {root.parent} now)."
        )
    if split == "test":
        images = base / "Final_Test" / "Images"
        tables = [file for file in (root / "GT-final_test.csv", images / "GT-final_test.csv") if file.is_file()]
        if not tables:
            raise UserError(f"{root / 'GT-final_test.csv'} is missing: it has the labels of the test images.")
        return _read(tables[0], images, tracks=False)
    folder = base / "Training"
    found: list[Entry] = []
    for images in sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []:
        table = images / f"GT-{images.name}.csv"
        if not table.is_file():
            raise UserError(f"{table} is missing: it has the labels and regions of the images beside it.")
        found += _read(table, images, tracks=True)
    if not found:
        raise UserError(f"{folder} has no class folder: put the benchmark's training images there.")
    return found


def load(entry: Entry) -> Scene:
    """Read an image and bring its region of interest to its size.

    Raises:
        UserError: If the file is missing or damaged.
    """
    try:
        with Image.open(entry.path) as image:
            pixels: Pixels = np.array(image.convert("RGB"))
    except UNREADABLE as error:
        raise UserError(corrupt_message(entry.path, error)) from error
    # a pack of resized images keeps the table of the original ones
    down, across = pixels.shape[0] / entry.size[0], pixels.shape[1] / entry.size[1]
    left, top, right, bottom = entry.box
    # edges of pixels are scaled, and the last pixel is inside
    box = Box(left * across, top * down, (right + 1) * across - 1, (bottom + 1) * down - 1)
    return Scene(pixels, box)


def _read(table: Path, images: Path, tracks: bool) -> list[Entry]:
    with table.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, delimiter=";")
        if not set(_COLUMNS) <= set(reader.fieldnames or ()):
            raise UserError(f"{table} is no table of GTSRB: its first line must name {';'.join(_COLUMNS)}.")
        found = []
        for line, row in enumerate(reader, start=2):
            try:
                width, height, left, top, right, bottom, label = (int(row[name]) for name in _COLUMNS[1:])
            except (TypeError, ValueError) as error:
                raise UserError(f"{table}, line {line}: {error}; its columns are whole numbers.") from error
            if not 0 <= label < len(CLASS_NAMES) or width < 1 or height < 1:
                raise UserError(
                    f"{table}, line {line}: class {label} of an image of {width} × {height}: classes go from 0 to "
                    f"{len(CLASS_NAMES) - 1}, and an image has pixels."
                )
            track = f"{label}/{row['Filename'].split('_')[0]}" if tracks else ""
            found.append(Entry(images / row["Filename"], label, (height, width), Box(left, top, right, bottom), track))
    return found

"""What MS-COCO-IC is cut out of, and by which rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lightning_robust.datamodules.coco_annotations import CocoIndex
from lightning_robust.datamodules.coco_crops import Overlap
from lightning_robust.errors import UserError

#: The classes of the source, the most frequent ones of its own count first.
PUBLISHED: Final = (
    "chair", "car", "book", "bottle", "dining table", "umbrella", "boat", "motorcycle", "sheep", "cow",
)  # fmt: skip
_DROPPED: Final = "person"


@dataclass(frozen=True, kw_only=True)
class CocoRules:
    """What is cut out of COCO and how.

    The source (arXiv 1911.11946) publishes its ten classes and says: one label per image, pixels of other objects in
    the crop black, crops widened to squares, resized, no ``person``. Size, least area, context and what happens where
    masks overlap are not published; these are ours.

    Args:
        categories: Names of the classes; a number: so many most frequent ones of the first split, without ``person``;
            by default the source's ten.
        size: Height and width of the crops; ``None`` leaves them as they are.
        least_area: Smaller objects, in square pixels of the photograph, are left out.
        context: Share of a square's longer side that is added on each side.
        overlap: ``front``: a pixel of several masks belongs to the smallest object alone; ``keep``: masks are just
            those of the annotations.

    Raises:
        UserError: For a value out of range.
    """

    categories: tuple[str, ...] | int | None = None
    size: int | None = 64
    least_area: float = 256.0
    context: float = 0.0
    overlap: Overlap = "front"

    def __post_init__(self) -> None:
        if isinstance(self.categories, int) and self.categories < 1:
            raise UserError(f"categories={self.categories}: give at least one, or names.")
        if not isinstance(self.categories, int) and self.categories is not None:
            if not self.categories or len(set(self.categories)) < len(self.categories):
                raise UserError(f"categories={list(self.categories)}: give each name once, and at least one.")
            if _DROPPED in self.categories:
                raise UserError(f"categories: the source drops {_DROPPED!r}; name other classes.")
        if self.size is not None and self.size < 1:
            raise UserError(f"size={self.size}: give a positive number of pixels, or null.")
        if not self.least_area >= 0 or not 0 <= self.context <= 10:
            raise UserError(
                f"least_area={self.least_area}, context={self.context}: both are numbers from 0 on (context up to 10)."
            )
        if self.overlap not in ("front", "keep"):
            raise UserError(f"overlap={self.overlap!r}: give front or keep.")

    def chosen(self, index: CocoIndex) -> list[str]:
        """The names of the classes.

        Raises:
            UserError: If the annotation file lacks one of them.
        """
        by_name = {name: number for number, name in index.categories.items()}
        if isinstance(self.categories, int):
            ranked = sorted(by_name, key=lambda name: (-index.counts[by_name[name]], name))
            found = [name for name in ranked if name != _DROPPED and index.counts[by_name[name]]][: self.categories]
            if len(found) < self.categories:
                raise UserError(
                    f"categories={self.categories}: {index.path} has only {len(found)} classes with objects."
                )
            return found
        names = list(PUBLISHED if self.categories is None else self.categories)
        unknown = [name for name in names if name not in by_name]
        if unknown:
            raise UserError(
                f"{index.path} has no category {unknown[0]!r}: choose from {', '.join(sorted(by_name))} with "
                "--data.rules.categories."
            )
        return names


@dataclass(frozen=True)
class CocoSplit:
    """Photographs and their annotations.

    Args:
        images: Folder of the photographs.
        annotations: ``instances_*.json``.
    """

    images: str
    annotations: str


def folder_name(category: str) -> str:
    """A class's folder: ``dining table`` is ``dining_table``."""
    return category.replace(" ", "_").replace("/", "_")

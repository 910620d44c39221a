"""Methods that find the one object in the middle of an image, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from lightning_robust.datamodules.segmenters.base import BoolArray, Box, Pixels, Segmenter, ellipse
from lightning_robust.datamodules.segmenters.grab_cut import GrabCut
from lightning_robust.datamodules.segmenters.graph_cut import GraphCut
from lightning_robust.datamodules.segmenters.roi_ellipse import RoiEllipse
from lightning_robust.errors import UserError

__all__ = [
    "SEGMENTERS",
    "BoolArray",
    "Box",
    "GrabCut",
    "GraphCut",
    "Pixels",
    "RoiEllipse",
    "Segmenter",
    "create_segmenter",
    "ellipse",
]

#: Names on the command line.
SEGMENTERS: Final[dict[str, type[Any]]] = {kind.name: kind for kind in (GraphCut, GrabCut, RoiEllipse)}


def create_segmenter(name: str, settings: Mapping[str, Any] | None = None) -> Segmenter:
    """Make a segmenter.

    Args:
        name: ``graph_cut``, ``grab_cut`` or ``ellipse``.
        settings: Its settings that differ from the defaults.

    Raises:
        UserError: For an unknown name or setting, a wrong value, or a missing library.

    Example:
        >>> create_segmenter("ellipse", {"scale": 0.9})
        RoiEllipse(scale=0.9)
    """
    if name not in SEGMENTERS:
        raise UserError(f"segmenter {name!r} is unknown: choose from {', '.join(SEGMENTERS)}.")
    kind, given = SEGMENTERS[name], dict(settings or {})
    known = [field.name for field in dataclasses.fields(kind)]
    unknown = [setting for setting in given if setting not in known]
    if unknown:
        raise UserError(f"the segmenter {name} has no setting {unknown[0]!r}: it has {', '.join(known)}.")
    made: Segmenter = kind(**given)
    made.check()
    return made

"""Accuracies of many named conditions at once, counted exactly: the cells of a table."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_robust.errors import UserError


class CellAccuracy(Metric):
    """For each cell of a table the share of images that were classified rightly; integer counts, summed over ranks.

    Cells are counted one by one, so a table that was interrupted has cells of unequal numbers of images:
    :meth:`counts` says how many.

    Args:
        cells: their names, each once.

    Raises:
        UserError: without a cell and for a name that stands twice; from ``update`` for a cell that does not exist and
            for anything but one bool an image.

    Example:
        >>> accuracy = CellAccuracy(["clean", "attacked"])
        >>> accuracy.update("clean", torch.tensor([True, True, False, True]))
        >>> {name: float(value) for name, value in accuracy.compute().items()}
        {'clean': 0.75, 'attacked': nan}
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    right: Tensor
    images: Tensor

    def __init__(self, cells: Sequence[str]) -> None:
        super().__init__()
        self.cells = {name: place for place, name in enumerate(cells)}
        if not self.cells or len(self.cells) < len(cells):
            raise UserError("CellAccuracy: give at least one cell, and each name once")
        for state in ("right", "images"):
            self.add_state(state, torch.zeros(len(self.cells), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, cell: str, right: Tensor) -> None:
        """Count a batch in one cell.

        Args:
            cell: its name.
            right: ``(N,)`` bool, whether each image was classified rightly.
        """
        if cell not in self.cells:
            raise UserError(f"CellAccuracy: there is no cell {cell!r}: the cells are {', '.join(self.cells)}")
        if right.dim() != 1 or right.dtype != torch.bool:
            raise UserError(
                f"CellAccuracy: shape {tuple(right.shape)} and type {right.dtype}: one bool an image is needed"
            )
        place = torch.tensor([self.cells[cell]], device=self.right.device)
        # not in place: a state that was reset in inference mode may not be changed in place outside of it
        self.right = self.right.index_add(0, place, right.sum()[None].to(self.right))
        self.images = self.images.index_add(0, place, torch.full_like(place, len(right)))

    def compute(self) -> dict[str, Tensor]:
        """The accuracy of each cell, a float64 scalar in [0, 1]; NaN for a cell without images."""
        return dict(zip(self.cells, (self.right.double() / self.images).unbind(), strict=True))

    def counts(self) -> dict[str, tuple[int, int]]:
        """Of each cell (right, images), summed over all ranks: call it on every rank, as ``compute``."""
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        ):
            return self.own_counts()

    def own_counts(self) -> dict[str, tuple[int, int]]:
        """Of each cell (right, images), of this rank alone; asks no other rank, so it can be called at any time."""
        pairs = zip(self.right.tolist(), self.images.tolist(), strict=True)
        return dict(zip(self.cells, pairs, strict=True))

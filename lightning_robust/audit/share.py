"""Which of the audited images this process holds, and how the processes put together what they found of theirs."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_robust.errors import UserError


class Share:
    """One process's part of the images; decisions are made on what all processes have gathered, alike on each.

    Args:
        places: ``(n,)`` int64: the numbers of this process's images among all of them.
        together: whether other processes hold the rest; else this one holds all.
    """

    def __init__(self, places: Tensor, together: bool = False) -> None:
        self.places = places.cpu()
        self.together = together
        self.total = len(self.places)
        if together:
            self.total = sum(len(part) for part in self._all(self.places))

    @classmethod
    def of_all(cls, count: int) -> Share:
        """That of a process which is alone."""
        return cls(torch.arange(count))

    def gather(self, values: Tensor) -> Tensor:
        """What each process found of its images, in the order of all images, on the CPU.

        Args:
            values: ``(n, …)``, one entry for each of this process's images.

        Returns:
            ``(total, …)``; the same on every process.
        """
        values = values.detach().cpu()
        if not self.together:
            return values
        parts = self._all((self.places, values))
        found = torch.empty(self.total, *values.shape[1:], dtype=values.dtype)
        for places, theirs in parts:
            found[places] = theirs
        return found

    def mine(self, wanted: Tensor) -> Tensor:
        """Rows of this process's images that are wanted.

        Args:
            wanted: ``(total,)`` bool.
        """
        return wanted[self.places].nonzero()[:, 0]

    def agree(self, mistake: UserError | None) -> None:
        """Raise on every process what one of them met; alone, it would leave the others waiting for it.

        Args:
            mistake: what this process met.

        Raises:
            UserError: the first that any process met.
        """
        if mistake is not None and not self.together:
            raise mistake
        met = self._all(None if mistake is None else (str(mistake), mistake.non_finite)) if self.together else []
        for found in met:
            if found is not None:
                raise UserError(found[0], non_finite=found[1]) from mistake

    def sum(self, value: float) -> float:
        """The sum of the processes' numbers."""
        return float(sum(self._all(value))) if self.together else value

    @staticmethod
    def _all(value: object) -> list:
        found: list = [None] * dist.get_world_size()
        dist.all_gather_object(found, value)
        return found

"""An evolution of many populations under way, as tensors that can be saved and gone on from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from lightning_robust.errors import UserError

REMEMBERED = 4
"""Candidates met before that are remembered for each image, in populations."""


@dataclass
class EvolutionState:
    """All that an evolution under way needs to go on, as tensors that can be saved.

    Attributes:
        settings: the settings that decide its course; going on with others is refused.
        generation: generations made by those that are still evolving.
        keys: ``(N,)`` keys of the random numbers, which also tell the images, targets and seed apart.
        rows: ``(A,)`` the images that still evolve.
        vectors: ``(A, P, D)`` their populations.
        fitness: ``(A, P)``, higher is better.
        codes: ``(A, P)`` fingerprints of what the candidates describe.
        met: ``(A, M)`` fingerprints of candidates that were met before, and may have died; 0: none.
        met_fitness: ``(A, M)`` theirs.
        best: ``(N, D)`` the candidate of each image that counts: the fittest, or the one that it stopped with.
        best_fitness: ``(N,)``; of the clean image where there is no candidate.
        best_class: ``(N,)`` what the model takes the image with this candidate for.
        changed: ``(N,)`` bool, whether there is a candidate.
        confirmed: ``(N,)`` bool, whether its fitness and class are the model's own and not a stand-in's.
        generations: ``(N,)`` int64 made for each image.
        queries: ``(N,)`` int64 points at which the model was asked.

    Example:
        >>> state = EvolutionState("rand1", 0, *[torch.zeros(2, dtype=torch.int64) for _ in range(14)])
        >>> again = EvolutionState.from_state_dict(state.state_dict())
        >>> again.settings, bool((again.keys == state.keys).all())
        ('rand1', True)
    """

    settings: str
    generation: int
    keys: Tensor
    rows: Tensor
    vectors: Tensor
    fitness: Tensor
    codes: Tensor
    met: Tensor
    met_fitness: Tensor
    best: Tensor
    best_fitness: Tensor
    best_class: Tensor
    changed: Tensor
    confirmed: Tensor
    generations: Tensor
    queries: Tensor

    def state_dict(self) -> dict[str, Any]:
        """What ``torch.save`` writes and ``torch.load(..., weights_only=True)`` reads; a copy on the CPU."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: value.to("cpu", copy=True) if isinstance(value, Tensor) else value for name, value in values.items()
        }

    @classmethod
    def from_state_dict(cls, values: Mapping[str, Any]) -> Self:
        """The state that :meth:`state_dict` was taken of.

        Raises:
            UserError: where something is missing or superfluous.
        """
        wanted = {field.name for field in dataclasses.fields(cls)}
        if set(values) != wanted:
            wrong = ", ".join(sorted(set(values) ^ wanted))
            raise UserError(f"this is no saved evolution: it lacks, or should not have, {wrong}")
        copied: dict[str, Any] = {
            name: value.clone() if isinstance(value, Tensor) else value for name, value in values.items()
        }
        return cls(**copied)

    def to(self, device: torch.device) -> Self:
        """The same state on another device."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                setattr(self, field.name, value.to(device))
        return self

    def leave(self, places: Tensor) -> None:
        """Let go the populations at ``places`` ``(A,)`` bool of those that evolve."""
        keep = ~places
        self.rows, self.vectors = self.rows[keep], self.vectors[keep]
        self.fitness, self.codes = self.fitness[keep], self.codes[keep]
        self.met, self.met_fitness = self.met[keep], self.met_fitness[keep]

    def known(self, part: slice) -> tuple[Tensor, Tensor]:
        """Fingerprints and fitness ``(R, Q)`` of what need not be evaluated again."""
        return (
            torch.cat([self.codes[part], self.met[part]], 1),
            torch.cat([self.fitness[part], self.met_fitness[part]], 1),
        )

    def remember(self, part: slice, codes: Tensor, fitness: Tensor) -> None:
        """Keep candidates ``(R, P)``, each at the one place that its fingerprint leads to, over what was there."""
        met = self.met[part]
        place = torch.arange(codes.shape[1], device=codes.device).expand_as(codes)
        # the last of those that meet at a place, on every device
        last = torch.full_like(met, -1).scatter_reduce_(1, (codes >> 32) % met.shape[1], place, "amax")
        there, last = last >= 0, last.clamp_min(0)
        self.met[part] = torch.where(there, codes.gather(1, last), met)
        self.met_fitness[part] = torch.where(there, fitness.gather(1, last), self.met_fitness[part])

"""Which images make a representative: those of a class, or those of a source class attacked towards a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_robust.errors import UserError


@dataclass(frozen=True)
class Direction:
    """A group of images.

    Attributes:
        source: their class.
        target: the class that they are attacked towards; ``None``: any other.
        label: as it stands in tables and figures, "0 → 1".
        key: as it stands in logged names, "0_to_1".
    """

    source: int
    target: int | None
    label: str
    key: str


def directions(
    names: Sequence[str], pairs: Sequence[Sequence[int]] | None = None, who: str = "RegionMaps"
) -> list[Direction]:
    """The groups of a problem: both directions of two classes, the pairs asked for, or else each class.

    Args:
        names: of the classes.
        pairs: (source, target) class numbers.
        who: asks, for messages.

    Raises:
        UserError: for pairs that are not two different classes of the problem, or stand twice.

    Example:
        >>> [direction.label for direction in directions(["cat", "dog"])]
        ['cat → dog', 'dog → cat']
    """
    if pairs is None:
        if len(names) != 2:
            return [Direction(number, None, str(name), _key(name)) for number, name in enumerate(names)]
        pairs = [(0, 1), (1, 0)]
    check_pairs(pairs, who)
    found = []
    for source, target in pairs:
        if not (0 <= source < len(names) and 0 <= target < len(names)):
            raise UserError(f"{who}: the pair [{source}, {target}]: the classes are 0 to {len(names) - 1}")
        label = f"{names[source]} → {names[target]}"
        found.append(Direction(source, target, label, f"{_key(names[source])}_to_{_key(names[target])}"))
    return found


def check_pairs(pairs: Sequence[Sequence[int]], who: str) -> None:
    """Refuse pairs that no problem has.

    Raises:
        UserError: unless each is two different class numbers, and stands once.
    """
    for pair in pairs:
        if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(number, int) for number in pair):
            raise UserError(f"{who}: pairs={pairs}: each is [source, target], two class numbers")
        if pair[0] == pair[1]:
            raise UserError(
                f"{who}: the pair [{pair[0]}, {pair[1]}] has one class as source and target: an attack leads from one "
                "class to another"
            )
    if not pairs or len({tuple(pair) for pair in pairs}) < len(pairs):
        raise UserError(f"{who}: pairs={pairs}: give at least one pair, and each once")


@dataclass(frozen=True)
class Round:
    """Directions that are measured at once: no source stands twice among them.

    Attributes:
        group: ``(K,)`` int64, the number of each class's direction, or -1.
        target: ``(K,)`` int64, where each class is attacked towards; ``None`` for an attack without a target.
    """

    group: Tensor
    target: Tensor | None

    def groups(self, labels: Tensor) -> Tensor:
        """``(N,)`` the direction of each image, or -1."""
        return self.group.to(labels.device)[labels]

    def targets(self, labels: Tensor) -> Tensor | None:
        """``(N,)`` the target of each image, or ``None``."""
        return None if self.target is None else self.target.to(labels.device)[labels]


def rounds(wanted: Sequence[Direction], classes: int) -> list[Round]:
    """Divide directions into as few rounds as their sources allow.

    Of two classes there is no other way than to the other one, so these are attacked without a target.
    """
    left = list(enumerate(wanted))
    found = []
    while left:
        group = torch.full((classes,), -1)
        target = torch.zeros(classes, dtype=torch.int64)
        later = []
        for number, direction in left:
            if group[direction.source] >= 0:
                later.append((number, direction))
                continue
            group[direction.source] = number
            target[direction.source] = -1 if direction.target is None else direction.target
        aimed = classes > 2 and all(direction.target is not None for direction in wanted)
        found.append(Round(group, target if aimed else None))
        left = later
    return found


def _key(name: object) -> str:
    """A class's name as a part of a logged name."""
    return "".join(character if character.isalnum() or character in "-." else "_" for character in str(name)).strip("_")

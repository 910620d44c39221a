"""Which images belong to a split: seeded, class-balanced choices as pure functions of labels.

Nothing here touches an image or a global random state: the same labels, numbers and seed give the same rows on every
rank, in every process and after a resume.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lightning_robust.errors import UserError

Rows = npt.NDArray[np.int64]

# Each choice draws from its own stream of one seed, so that two choices are never the same permutation.
_HOLD_OUT, _LIMIT = 1, 2


def _rank_in_class(labels: Rows, seed: int, stream: int) -> Rows:
    """Number the images of each class 0, 1, 2, … in an order shuffled by the seed."""
    shuffled = np.random.default_rng([seed, stream]).permutation(len(labels))
    grouped = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.bincount(labels)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    rank = np.empty(len(labels), dtype=np.int64)
    rank[grouped] = np.arange(len(labels)) - starts[labels[grouped]]
    return rank


def hold_out(labels: Rows, size: float, seed: int, *, name: str = "val_size") -> tuple[Rows, Rows]:
    """Divide images into kept and held-out ones, each class in proportion to its share (stratified).

    Args:
        labels: Class numbers, int64 (N,).
        size: A share in (0, 1), or a number of images from 1 on.
        seed: Seed of the choice.
        name: What the setting is called in an error.

    Returns:
        The rows kept and the rows held out, each in ascending order.

    Raises:
        UserError: If nothing would be held out or kept, or a class would keep no image.
    """
    total = len(labels)
    wanted = round(size * total) if size < 1 else int(size)
    if wanted < 1 or wanted >= total:
        raise UserError(
            f"{name}={size} holds out {wanted} of {total} images and leaves {max(total - wanted, 0)}: "
            "both parts need at least one image, so choose another value."
        )
    counts = np.bincount(labels)
    exact = counts * wanted / total
    quota = np.floor(exact).astype(np.int64)
    # Largest remainder; among equal remainders the lower class number, so that the result is unique.
    extra = np.argsort(-(exact - quota), kind="stable")[: wanted - int(quota.sum())]
    quota[extra] += 1
    emptied = np.flatnonzero((quota == counts) & (counts > 0))
    if len(emptied):
        raise UserError(
            f"{name}={size} takes all {counts[emptied[0]]} images of class number {emptied[0]} "
            f"({len(emptied)} such classes): choose a smaller value or add images."
        )
    held = _rank_in_class(labels, seed, _HOLD_OUT) < quota[labels]
    return np.flatnonzero(~held), np.flatnonzero(held)


def keep_classes(labels: Rows, classes: Sequence[int]) -> tuple[Rows, Rows]:
    """Find the images of some classes and renumber these 0…k-1 in the order given.

    Args:
        labels: Class numbers, int64 (N,).
        classes: The class numbers to keep, without repeats.

    Returns:
        The rows kept in ascending order, and their new labels.
    """
    renumbered = np.full(max(int(labels.max(initial=0)), *classes) + 1, -1, dtype=np.int64)
    renumbered[list(classes)] = np.arange(len(classes))
    new = renumbered[labels]
    rows = np.flatnonzero(new >= 0)
    return rows, new[rows]


def balanced_limit(labels: Rows, limit: int, seed: int) -> Rows:
    """Choose at most ``limit`` images with as equal a number per class as there is.

    Classes are dealt from in turn, in an order that the seed decides, so that a smaller limit chooses a subset of what
    a larger one chooses (one below the number of classes: some classes of all), and a class with too few images leaves
    its places to the others.

    Args:
        labels: Class numbers, int64 (N,).
        limit: The largest number of images.
        seed: Seed of the choice.

    Returns:
        The rows chosen in ascending order.
    """
    turn = np.random.default_rng([seed, _LIMIT]).permutation(int(labels.max(initial=0)) + 1)
    dealt = np.lexsort((turn[labels], _rank_in_class(labels, seed, _LIMIT)))
    return np.sort(dealt[:limit])

"""The exact best pair of a saliency map (Papernot et al., arXiv 1511.07528, algorithm 3) without a look at all pairs.

A pair of features p, q is worth (rise_p + rise_q) · (fall_p + fall_q), both sums positive: what it adds to the target's
output, times what it takes off the others' sum. Both factors grow with the features' own numbers, so a feature that two
others beat in both numbers is in no best pair: one of the two could take its place. What is left when these are struck
out are some tens of features (of images of 224 × 224, too), and of those all pairs are looked at. Memory is O(F); time
is O(F log F), and grows to that of a search over all pairs only where no feature beats another.
"""

from __future__ import annotations

import torch
from torch import Tensor

_REFERENCES = 4  # features that all others are held against first, to spare most of them the sorting
_SORTED_FROM = 1 << 14  # so few pairs, over all images, are looked at as they are: sorting candidates out costs more
_ENTRIES = 1 << 22  # of a block of the matrix of pairs, over all images


def best_pairs(rise: Tensor, fall: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """The pair of features of largest (rise_p + rise_q) · (fall_p + fall_q) with both sums positive, for each image.

    Exact in the arithmetic of the input: no pair has a larger product. Of pairs that tie the one with the lowest first
    feature is taken, and of these the one with the lowest second.

    Args:
        rise: ``(n, F)`` finite: what each feature adds to the target's output.
        fall: ``(n, F)`` finite: what each feature takes off the sum of the others.
        allowed: ``(n, F)`` bool: features that may be taken.

    Returns:
        features ``(n, 2)`` int64, the lower first, and ``(n,)`` bool whether there is a pair at all (if not, the
        features mean nothing).

    Example:
        >>> rise, fall = torch.tensor([[3.0, 1.0, 2.0, 0.0]]), torch.tensor([[-1.0, 2.0, 1.0, 4.0]])
        >>> best_pairs(rise, fall, torch.ones(1, 4, dtype=torch.bool))
        (tensor([[2, 3]]), tensor([True]))
    """
    # in one tensor: on small images the calls take longer than what they do
    both = torch.stack([rise, fall]).masked_fill_(~allowed, -torch.inf)
    candidates, both = _gather(_undominated_by_references(both) & allowed, both)
    if len(rise) * candidates.shape[1] ** 2 > _SORTED_FROM:
        places, both = _gather(_worth_pairing(both), both)
        candidates = candidates.gather(1, places)
    if candidates.shape[1] < 2:
        return rise.new_zeros(len(rise), 2, dtype=torch.int64), rise.new_zeros(len(rise), dtype=torch.bool)
    places, found = _best_of_all_pairs(_scaled(both))
    return candidates.gather(1, places), found


def best_sums(rise: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """The pair of largest sum, where it is positive: :func:`best_pairs` of ``fall`` equal to ``rise``.

    That is the best pair where the outputs have a constant sum, as probabilities do.

    Args:
        rise: ``(n, F)`` finite.
        allowed: ``(n, F)`` bool: features that may be taken.

    Returns:
        features ``(n, 2)`` int64 (of equal ones the lowest), and ``(n,)`` bool whether there is a pair at all.
    """
    left = rise.masked_fill(~allowed, -torch.inf)
    if rise.shape[1] < 2:
        return rise.new_zeros(len(rise), 2, dtype=torch.int64), rise.new_zeros(len(rise), dtype=torch.bool)
    # not topk, which does not say which of equal values it takes
    high, first = left.max(1, keepdim=True)
    low, second = left.scatter(1, first, -torch.inf).max(1, keepdim=True)
    features = torch.cat([first, second], 1).sort(1).values
    return features, (high + low > 0)[:, 0]


def _undominated_by_references(both: Tensor) -> Tensor:
    """Strikes out what two of a few good features beat: nearly everything, in one pass over the features.

    Args:
        both: ``(2, n, F)`` rise and fall; -∞ where a feature may not be taken.

    Returns:
        ``(n, F)`` bool: the features that are left.
    """
    # good in both: either number in parts of the largest there is
    score = (both / both.amax(2, keepdim=True).clamp_min(torch.finfo(both.dtype).tiny)).sum(0)
    best = score.topk(min(_REFERENCES, both.shape[2]), dim=1).indices
    references = both.gather(2, best.expand(2, -1, -1))
    # strictly in both, so that of equal features none is lost: that is for the sorting to tell apart
    less = both[:, :, None, :] < references[:, :, :, None]
    return (less[0] & less[1]).sum(1, dtype=torch.uint8) < 2


def _worth_pairing(both: Tensor) -> Tensor:
    """Which features at most one other dominates, and have a partner with which both sums are positive.

    One dominates another if it is at least as good in both numbers, and better in one or, of equal ones, further left.
    Sorted by rise (then fall, then place), those that dominate a feature are those before it whose fall is at least as
    large. They are two or more exactly if the second largest fall before it is.

    Args:
        both: ``(2, n, m)`` rise and fall, m at least 2.

    Returns:
        ``(n, m)`` bool.
    """
    by_fall = both[1].argsort(dim=1, descending=True, stable=True)
    order = by_fall.gather(1, both[0].gather(1, by_fall).argsort(dim=1, descending=True, stable=True))
    rise, fall = both.gather(2, order.expand(2, -1, -1))
    largest = fall.cummax(1).values
    # a new value below the largest so far may become the second largest, and else the largest so far becomes it
    second = torch.minimum(largest[:, :-1], fall[:, 1:]).cummax(1).values
    keep = torch.ones_like(fall, dtype=torch.bool)
    keep[:, 2:] = fall[:, 2:] > second[:, :-1]
    # Those with which its rise sums up to something positive come first. Where all outputs go up and down together, no
    # feature dominates another, and it is this that strikes out all of them.
    partners = torch.searchsorted(-rise, rise)
    keep &= (partners > 0) & (largest.gather(1, (partners - 1).clamp_min(0)) > -fall)
    return torch.empty_like(keep).scatter_(1, order, keep)


def _gather(keep: Tensor, both: Tensor) -> tuple[Tensor, Tensor]:
    """What is kept, in its order and moved to the left; rows with fewer are filled up with -∞, which is in no pair.

    Args:
        keep: ``(n, m)`` bool.
        both: ``(2, n, m)``.

    Returns:
        places ``(n, k)`` int64 in 0..m-1, and the values ``(2, n, k)`` there; k is the most that any row keeps.
    """
    counts = keep.sum(1)
    width = int(counts.max())
    row, column = keep.nonzero(as_tuple=True)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    places = torch.zeros(len(keep), width, dtype=torch.int64, device=keep.device)
    places[row, place] = column
    empty = torch.arange(width, device=row.device) >= counts[:, None]
    return places, both.gather(2, places.expand(2, -1, -1)).masked_fill_(empty, -torch.inf)


def _scaled(both: Tensor) -> Tensor:
    """Times the power of two that brings each row's largest value near one: no product underflows, and no bit changes.

    The gradients of a saturated network are so small that their products would be zero, all pairs tied.
    """
    return torch.ldexp(both, -both.amax(2, keepdim=True).frexp().exponent.clamp_(-120, 120))


def _best_of_all_pairs(both: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`best_pairs` by looking at all of them, in blocks of bounded size."""
    _, count, width = both.shape
    best = both.new_full((count,), -1.0)
    first, second = (torch.zeros(count, dtype=torch.int64, device=both.device) for _ in range(2))
    none = both.new_full((), -1.0)
    height = max(1, _ENTRIES // (count * width))
    for start in range(0, width, height):
        sums = both[:, :, start : start + height, None] + both[:, :, None, :]
        worth = torch.where(torch.minimum(sums[0], sums[1]) > 0, sums[0] * sums[1], none)
        worth.diagonal(start, 1, 2).fill_(-1)  # a feature with itself
        value, place = worth.flatten(1).max(1)  # of equal ones the first
        better = value > best
        best = torch.where(better, value, best)
        first = torch.where(better, place // width + start, first)
        second = torch.where(better, place % width, second)
    return torch.stack([first, second], 1), best >= 0

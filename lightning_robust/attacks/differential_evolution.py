"""Differential evolution (Storn & Price 1997) of many populations at once, one for each image.

A population is ``(P, D)``: P candidates of D numbers each, which live in the unit box. In a generation each candidate
gets one child, made of other candidates' differences (:func:`children`), and gives way to it where the child is as fit
(:func:`survivors`). All functions work on ``(R, P, D)``, R populations that know nothing of each other; what is random
comes from :mod:`lightning_robust.attacks.randomness`.

Two candidates that describe the same image share one evaluation (:func:`novel`): saturated colours and pixels found
again make a good part of a late generation. That two such candidates then tie exactly also makes the course of an
evolution independent of how a batch rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_robust.attacks.randomness import mix_seed, uniform
from lightning_robust.errors import UserError

STREAMS = 8
"""Streams of random numbers that belong to one generation; those of generation 0 are the starting population's."""


class Strategy(NamedTuple):
    """How a mutant is made.

    Attributes:
        partners: other candidates that it takes, all different, none of them the parent.
        mutant: from parents ``(R, P, D)``, the best of each population ``(R, 1, D)``, the partners (a list of
            ``(R, P, D)``) and F to mutants ``(R, P, D)``.
    """

    partners: int
    mutant: Callable[[Tensor, Tensor, Sequence[Tensor], float], Tensor]


STRATEGIES: dict[str, Strategy] = {
    "rand1": Strategy(3, lambda x, best, r, f: r[0] + f * (r[1] - r[2])),
    "rand2": Strategy(5, lambda x, best, r, f: r[0] + f * (r[1] + r[2] - r[3] - r[4])),
    "best1": Strategy(2, lambda x, best, r, f: best + f * (r[0] - r[1])),
    "best2": Strategy(4, lambda x, best, r, f: best + f * (r[0] + r[1] - r[2] - r[3])),
    "current_to_best1": Strategy(2, lambda x, best, r, f: x + f * (best - x + r[0] - r[1])),
    "rand_to_best1": Strategy(3, lambda x, best, r, f: r[0] + f * (best - r[0] + r[1] - r[2])),
}
"""The strategies by the names that the literature (and SciPy) gives them, without the kind of crossover."""


def check_settings(name: str, *, population: int, generations: int, f: float, strategy: str, crossover: float) -> None:
    """Refuse settings that no evolution can be run with.

    Raises:
        UserError: naming the setting.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"{name}: strategy={strategy!r} does not exist: choose one of {', '.join(STRATEGIES)}")
    needed = max(4, STRATEGIES[strategy].partners + 1)
    if population < needed:
        raise UserError(
            f"{name}: population={population} is too small: strategy={strategy!r} needs {needed} or more candidates"
        )
    if generations < 1:
        raise UserError(f"{name}: generations={generations}: at least one generation is needed")
    if not 0 < f <= 2:
        raise UserError(f"{name}: f={f}: the weight of a difference lies in (0, 2], for example 0.5")
    if not 0 <= crossover <= 1:
        raise UserError(f"{name}: crossover={crossover}: it is a probability; 1 takes the whole mutant, as the paper")


def partners(keys: Tensor, population: int, count: int, stream: int) -> list[Tensor]:
    """Draw for each candidate the others that its mutant is made of.

    Args:
        keys: ``(R,)`` one key a population.
        population: P.
        count: how many others each candidate needs, fewer than P.
        stream: of the random numbers.

    Returns:
        ``count`` tensors ``(R, P)`` int64, at each place all different and none of them the place itself.
    """
    # double, since a float32 product could round up to the excluded end
    drawn = uniform(keys, (len(keys), population, count), torch.float64, stream)
    taken = [torch.arange(population, device=keys.device).expand(len(keys), population)]  # ascending at each place
    found = []
    for turn in range(count):
        pick = (drawn[..., turn] * (population - 1 - turn)).long()  # the pick-th of those that are left
        for before in taken:
            pick = pick + (pick >= before)
        found.append(pick)
        last = pick
        for place, before in enumerate(taken):
            taken[place], last = torch.minimum(before, last), torch.maximum(before, last)
        taken.append(last)
    return found


def children(
    vectors: Tensor,
    fitness: Tensor,
    keys: Tensor,
    generation: int,
    *,
    strategy: str,
    f: float,
    crossover: float,
    bounds: str,
) -> Tensor:
    """One child for each candidate.

    Args:
        vectors: ``(R, P, D)`` the populations.
        fitness: ``(R, P)``, higher is better.
        keys: ``(R,)`` keys of the random numbers.
        generation: number of the generation that the children make, from 1.
        strategy: one of :data:`STRATEGIES`.
        f: weight of a difference.
        crossover: share of entries that the child takes from the mutant, one of them in any case; 1: all.
        bounds: see :func:`repaired`.

    Returns:
        ``(R, P, D)``.
    """
    count, population, dims = vectors.shape
    stream = STREAMS * generation
    made = STRATEGIES[strategy]
    first = torch.arange(count, device=vectors.device)[:, None] * population
    flat = vectors.flatten(0, 1)
    others = [flat[first + place] for place in partners(keys, population, made.partners, stream)]
    best = vectors[torch.arange(count, device=vectors.device), fitness.argmax(1)][:, None]
    mutants = made.mutant(vectors, best, others, f)
    if crossover < 1:
        taken = uniform(keys, vectors.shape, torch.float64, stream + 1) < crossover
        forced = (uniform(keys, (count, population, 1), torch.float64, stream + 2) * dims).long()
        mutants = torch.where(taken.scatter(2, forced, True), mutants, vectors)
    return repaired(mutants, keys, bounds, stream + 3)


BOUNDS = ("free", "clip", "reflect", "resample")


def repaired(vectors: Tensor, keys: Tensor, bounds: str, stream: int) -> Tensor:
    """Deal with what left the unit box.

    Args:
        vectors: ``(R, P, D)``.
        keys: ``(R,)`` keys of the random numbers.
        bounds: "free": stay outside, so that whoever reads the candidate clips it and its differences stay what they
            are; "clip": onto the edge; "reflect": mirrored at the edge; "resample": drawn anew, uniformly (as SciPy).
        stream: of the random numbers of "resample".
    """
    if bounds == "free":
        return vectors
    if bounds == "clip":
        return vectors.clamp(0, 1)
    if bounds == "reflect":
        return 1 - (vectors.remainder(2) - 1).abs()
    outside = (vectors < 0) | (vectors > 1)
    return torch.where(outside, uniform(keys, vectors.shape, vectors.dtype, stream), vectors)


def fingerprints(numbers: Tensor) -> Tensor:
    """One number for what a candidate describes: ``(..., K)`` int64 to ``(...)`` int64.

    A sum of products with odd 64-bit constants: two descriptions that differ in one entry never share it, any two
    others with a chance of about 2⁻⁶⁰.
    """
    # from a constant: zero, which stands for nothing in a state, must not be the fingerprint of all zeros
    code = torch.full(numbers.shape[:-1], mix_seed(-3), dtype=torch.int64, device=numbers.device)
    for place in range(numbers.shape[-1]):
        code += numbers[..., place] * (mix_seed(place) | 1)
    return code


def novel(known: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Which candidates describe something that is neither in the population nor met before among themselves.

    Args:
        known: ``(R, Q)`` int64 fingerprints of what has been evaluated already; Q may be 0.
        codes: ``(R, P)`` of the candidates.

    Returns:
        places of the novel candidates in ``codes.flatten()``, ascending; and for each candidate ``(R, P)`` the place of
        its like in ``cat([known.flatten(), codes.flatten()])``, which is either in ``known`` or novel.
    """
    salt = torch.arange(len(codes), device=codes.device)[:, None] * (mix_seed(-1) | 1)  # like only within a population
    both = torch.cat([(known + salt).flatten(), (codes + salt).flatten()])
    found, which = both.unique(return_inverse=True)
    place = torch.arange(len(both), device=codes.device)
    like = torch.full_like(found, len(both)).scatter_reduce_(0, which, place, "amin")[which][known.numel() :]
    return (like == place[known.numel() :]).nonzero()[:, 0], like.view_as(codes)


def survivors(parents: Tensor, fitness: Tensor) -> Tensor:
    """Where the child takes its parent's place, given the fitness ``(R, P)`` of both: also where it is just as fit."""
    return fitness >= parents

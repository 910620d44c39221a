"""The evolution of a one-pixel attack: the populations of many images, which go on together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_robust.attacks.base import Outcome
from lightning_robust.attacks.context import Model
from lightning_robust.attacks.differential_evolution import children, novel, survivors
from lightning_robust.attacks.evolution_state import REMEMBERED, EvolutionState
from lightning_robust.attacks.pixel_canvas import PixelCanvas
from lightning_robust.attacks.pixel_goal import log_odds, of_probabilities, reached
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.randomness import mix_seed, normal, uniform
from lightning_robust.errors import UserError

if TYPE_CHECKING:  # which imports this file
    from lightning_robust.attacks.one_pixel import OnePixel

_GROUP = 1 << 14  # candidates whose random numbers and fingerprints are made at once: some megabytes


class Evolution:
    """One batch's evolution under given settings; what changes on the way is in an :class:`EvolutionState`.

    Args:
        settings: of the attack.
        problem: the batch; with targets each row is a pair of image and target.
        search: a faster model that is asked in place of ``problem.model``, which then only confirms.
    """

    def __init__(self, settings: OnePixel, problem: Problem, search: Model | None = None) -> None:
        self.settings = settings
        self.problem, self.asked = problem, problem
        if search is not None:
            self.asked = dataclasses.replace(problem, model=search, _checked=False)
        if settings.outputs == "probabilities":
            self.problem = of_probabilities(problem)
            self.asked = self.problem if search is None else of_probabilities(self.asked)
        self.canvas = PixelCanvas(self.problem, settings.pixels, settings.eight_bit)
        # one image evolves towards each of its targets in its own way
        self.keys = problem.keys
        if problem.targets is not None:
            self.keys = problem.keys + (problem.targets + 1) * (mix_seed(-2) | 1)

    def start(self) -> EvolutionState:
        """The starting populations of the images on which the goal is not reached to begin with."""
        settings, problem = self.settings, self.problem
        clean, device = problem.images, problem.images.device
        count, dims = len(clean), settings.pixels * (2 + clean.shape[1])
        queries = torch.zeros(count, dtype=torch.int64, device=device)
        logits = problem.clean_logits
        if logits is None:
            queries += 1
            logits = torch.cat([ask(problem, part) for part in clean.split(at_once(settings, clean))])
        every = torch.arange(count, device=device)
        fitness = log_odds(problem, logits, every).to(clean.dtype)
        rows = (~problem.fooled(logits) & self.canvas.usable).nonzero()[:, 0]
        size = (len(rows), settings.population)
        state = EvolutionState(
            settings=settings.course,
            generation=0,
            keys=self.keys,
            rows=rows,
            vectors=clean.new_empty((*size, dims)),
            fitness=clean.new_zeros(size),
            codes=torch.zeros(size, dtype=torch.int64, device=device),
            met=torch.zeros((len(rows), REMEMBERED * settings.population), dtype=torch.int64, device=device),
            met_fitness=clean.new_zeros((len(rows), REMEMBERED * settings.population)),
            best=clean.new_zeros((count, dims)),
            best_fitness=fitness,
            best_class=logits.argmax(1),
            changed=torch.zeros(count, dtype=torch.bool, device=device),
            confirmed=torch.ones(count, dtype=torch.bool, device=device),
            generations=torch.zeros_like(queries),
            queries=queries,
        )
        classes = torch.empty(size, dtype=torch.int64, device=device)
        for part in self._groups(len(rows)):
            keys, vectors = state.keys[rows[part]], state.vectors[part]
            places = uniform(keys, (*vectors.shape[:2], 2 * settings.pixels), clean.dtype, 0)
            colours = normal(keys, (*vectors.shape[:2], dims - 2 * settings.pixels), clean.dtype, 1)
            vectors.copy_(torch.cat([places, (128 + 127 * colours) / 255], 2))
            state.codes[part], state.fitness[part], classes[part] = self._evaluated(state, part, vectors)
        self._take_stock(state, state.vectors, state.fitness, classes)
        return state

    def advance(self, state: EvolutionState, generations: int | None = None) -> None:
        """Let the images evolve further; ``state`` is changed.

        Stopping between generations, saving the state and going on gives what going on at once gives, to the bit.

        Args:
            state: what :meth:`start` gave, or a copy that was saved and read again.
            generations: how many further; default: as many as the settings allow.

        Raises:
            UserError: where the state is of other images, targets, seed or settings.
        """
        settings = self.settings
        if state.settings != settings.course:
            raise UserError(f"this evolution was started with other settings: {state.settings}, not {settings.course}")
        if not torch.equal(state.keys, self.keys):
            raise UserError("this evolution was started with other images, targets or another seed: start a new one")
        last = settings.generations
        if generations is not None:
            last = min(last, state.generation + generations)
        while state.generation < last and len(state.rows):
            self._generation(state)
            if self.problem.progress is not None:
                self.problem.progress(state.generation, settings.generations)

    def outcome(self, state: EvolutionState) -> Outcome:
        """The images with their candidates, as far as the evolution has come; the model judges what it has not yet."""
        open_rows = (~state.confirmed).nonzero()[:, 0]
        if len(open_rows):
            judged = self._judged(state, state.best[open_rows], open_rows)
            state.best_fitness[open_rows], state.best_class[open_rows] = judged
            state.confirmed[open_rows] = True
        images = self.problem.images.clone()
        for rows in state.changed.nonzero()[:, 0].split(_GROUP):
            images[rows] = self.canvas.written(*self.canvas.read(state.best[rows][:, None], rows), rows)
        success = reached(self.problem, state.best_class)
        return Outcome(images, state.generations.clone(), state.queries.clone(), success)

    # -- the parts of a generation -------------------------------------------------------------------------------------

    def _generation(self, state: EvolutionState) -> None:
        settings = self.settings
        state.generation += 1
        state.generations[state.rows] += 1
        born, fitness = torch.empty_like(state.vectors), torch.empty_like(state.fitness)
        codes, classes = torch.empty_like(state.codes), torch.empty_like(state.codes)
        for part in self._groups(len(state.rows)):
            born[part] = children(
                state.vectors[part],
                state.fitness[part],
                state.keys[state.rows[part]],
                state.generation,
                strategy=settings.strategy,
                f=settings.f,
                crossover=settings.crossover,
                bounds=settings.bounds,
            )
            codes[part], fitness[part], classes[part] = self._evaluated(state, part, born[part])
        grown = survivors(state.fitness, fitness)
        state.vectors = torch.where(grown[..., None], born, state.vectors)
        state.fitness = torch.where(grown, fitness, state.fitness)
        state.codes = torch.where(grown, codes, state.codes)
        self._take_stock(state, born, fitness, classes)

    def _evaluated(self, state: EvolutionState, part: slice, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fingerprints, fitness and predicted classes ``(R, P)`` of candidates of ``state.rows[part]``.

        Only what is new is asked about. The class of what is known is -1: it has been taken stock of.
        """
        asked, canvas, population = self.asked, self.canvas, self.settings.population
        rows = state.rows[part]
        places, colours = canvas.read(vectors, rows)
        codes = canvas.codes(places, colours, rows)
        known, known_fitness = state.known(part)
        new, like = novel(known, codes)
        owner = rows[new // population]
        state.queries += torch.bincount(owner, minlength=len(state.queries))
        places, colours = places.flatten(0, 1), colours.flatten(0, 1)
        fitness, classes = known_fitness.new_empty(codes.numel()), torch.full_like(codes, -1).flatten()
        passes = -(-len(new) // at_once(self.settings, asked.images))
        for some in new.tensor_split(passes) if passes else ():
            of = rows[some // population]
            logits = ask(asked, canvas.written(places[some], colours[some], of))
            fitness[some] = log_odds(asked, logits, of).to(fitness.dtype)
            classes[some] = logits.argmax(1)
        fitness = torch.cat([known_fitness.flatten(), fitness])[like]
        classes = torch.cat([classes.new_full((known.numel(),), -1), classes])[like]
        state.remember(part, codes, fitness)
        return codes, fitness, classes

    def _take_stock(self, state: EvolutionState, vectors: Tensor, fitness: Tensor, classes: Tensor) -> None:
        """Keep the best of the new candidates, and let the images go that have reached what they stop at."""
        rows = state.rows
        if len(rows) == 0:
            return
        by_label, confirmed = self.settings.stop == "label", self.asked is self.problem
        every = torch.arange(len(rows), device=rows.device)
        value, place = fitness.max(1)
        better = (value > state.best_fitness[rows]) | ~state.changed[rows]
        kept = rows[better]
        state.changed[kept], state.confirmed[kept] = True, confirmed
        state.best[kept] = vectors[every, place][better]
        state.best_fitness[kept], state.best_class[kept] = value[better], classes[every, place][better]
        if by_label:
            there = reached(self.asked, classes, rows)
            place = fitness.masked_fill(~there, -torch.inf).argmax(1)
            stops = there.any(1)
        else:
            stops = better & (value > self._needed)
        hits, place = stops.nonzero()[:, 0], place[stops]
        if len(hits) == 0:
            return
        at, chosen = rows[hits], vectors[hits, place]
        value, found = fitness[hits, place], classes[hits, place]
        if not confirmed:
            value, found = self._judged(state, chosen, at)
            agreed = reached(self.problem, found, at) if by_label else value > self._needed
            hits, at, chosen, value, found = hits[agreed], at[agreed], chosen[agreed], value[agreed], found[agreed]
        state.best[at], state.best_fitness[at], state.best_class[at] = chosen, value, found
        state.confirmed[at] = True
        state.leave(torch.zeros_like(stops).index_fill(0, hits, True))

    def _judged(self, state: EvolutionState, vectors: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Fitness and class of one candidate an image ``(n, D)``, by the model itself."""
        problem, canvas = self.problem, self.canvas
        state.queries[rows] += 1
        size = at_once(self.settings, problem.images)
        found = []
        for part, of in zip(vectors.split(size), rows.split(size), strict=True):
            logits = ask(problem, canvas.written(*canvas.read(part[:, None], of), of))
            found.append((log_odds(problem, logits, of).to(vectors.dtype), logits.argmax(1)))
        values, classes = zip(*found, strict=True)
        return torch.cat(values), torch.cat(classes)

    @property
    def _needed(self) -> float:
        """The fitness at which an image stops."""
        share = self.settings.target_confidence
        if self.problem.targets is None:
            share = 1 - self.settings.true_confidence
        return math.log(share / (1 - share))

    def _groups(self, count: int) -> Sequence[slice]:
        size = max(1, _GROUP // self.settings.population)
        return [slice(start, start + size) for start in range(0, count, size)]


def at_once(settings: OnePixel, images: Tensor) -> int:
    """Images in one forward pass."""
    if settings.max_batch is not None:
        return settings.max_batch
    if images.device.type != "cpu":
        return 4096
    # where the layers' outputs outgrow the caches (and then the allocator) an image costs up to four times as much
    return min(4096, max(8, 128 * 3072 // images[0].numel()))


@torch.no_grad()
def ask(problem: Problem, images: Tensor) -> Tensor:
    """Logits, and never a gradient."""
    return problem.logits(images)

"""The one-pixel attack (Su, Vargas & Sakurai, arXiv 1710.08864): few pixels, found by differential evolution."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_robust.attacks.base import Attack, Outcome, Problem, Progress
from lightning_robust.attacks.context import Model, attacking
from lightning_robust.attacks.differential_evolution import (
    BOUNDS,
    REMEMBERED,
    EvolutionState,
    check_settings,
    children,
    novel,
    survivors,
)
from lightning_robust.attacks.pixel_canvas import PixelCanvas
from lightning_robust.attacks.pixel_goal import AllTargets, log_odds, of_probabilities, reached
from lightning_robust.attacks.randomness import mix_seed, normal, uniform
from lightning_robust.attacks.threat_model import ThreatModel
from lightning_robust.errors import UserError

_GROUP = 1 << 14  # candidates whose random numbers and fingerprints are made at once: some megabytes


@dataclass(frozen=True, kw_only=True)
class OnePixel(Attack):
    """One-pixel attack: differential evolution of where a pixel changes and to what colour.

    A candidate is d tuples (x, y, colour), d the number of pixels. The starting population has uniform coordinates and
    colours from N(128, 127) of 255. In each generation every candidate gets one child, x_r1 + F (x_r2 - x_r3), with r1,
    r2, r3 and the parent's own place all different and no crossover, and gives way to it if the child is as fit. Fit
    is what makes the target's probability high, or the label's low where there is no target. The model is only asked,
    never differentiated: any callable from images to logits (or probabilities) will do.

    An image stops when its best candidate is confident enough, as in the paper, or as soon as any candidate reaches the
    goal (``stop="label"``). Success is judged by the predicted class of the candidate that is given back: with
    ``stop="confidence"`` the fittest (so an image may count as a failure although a less fit candidate had been
    misclassified on the way, as in the paper); an image that no candidate fools comes back with its fittest one.
    All images evolve together; those that have stopped leave.

    Candidates that describe the same pixels in the same colours are asked about once. Fitness is compared as log-odds,
    which have the order of the probabilities but do not run into 0 and 1. Coordinates are shares of the pixels that may
    change: with a mask no candidate is wasted outside it. Of a pixel that two of a candidate's tuples name the later
    one counts.

    Args:
        pixels: how many pixels may change (1, 3 and 5 in the paper).
        population: candidates of each image.
        generations: generations after the starting population at most.
        f: weight F of a difference.
        strategy: how children are made: "rand1" (the paper's), "best1", "rand2", "best2", "current_to_best1",
            "rand_to_best1".
        crossover: share of a child's numbers that come from the mutant; 1 is no crossover.
        bounds: what happens to numbers outside the image or the range of colours: "free" (kept as they are and clipped
            where the image is written), "clip", "reflect" or "resample" (drawn anew, as SciPy does).
        eight_bit: colours are multiples of 1/255, as in an image file: a success on an 8-bit image is not lost when it
            is saved.
        stop: "confidence" or "label", see above.
        target_confidence: probability of the target above which ``stop="confidence"`` stops.
        true_confidence: probability of the label below which an attack without targets does.
        outputs: what the model gives: "logits" (their softmax is taken) or "probabilities".
        max_batch: images that the model is asked about at once; default: a number that suits the device.
        seed: of the evolution; images and targets have their own random numbers whatever the batch.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> images = torch.rand(4, 3, 2, 2)
        >>> attack = OnePixel(population=20, generations=5)
        >>> adversarial = attack(model, images, model(images).argmax(1))
        >>> bool(((adversarial != images).any(1).sum((1, 2)) <= 1).all())
        True
    """

    pixels: int = 1
    population: int = 400
    generations: int = 100
    f: float = 0.5
    strategy: Literal["rand1", "best1", "rand2", "best2", "current_to_best1", "rand_to_best1"] = "rand1"
    crossover: float = 1.0
    bounds: Literal["free", "clip", "reflect", "resample"] = "free"
    eight_bit: bool = True
    stop: Literal["confidence", "label"] = "confidence"
    target_confidence: float = 0.9
    true_confidence: float = 0.05
    outputs: Literal["logits", "probabilities"] = "logits"
    max_batch: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pixels < 1:
            raise UserError(f"OnePixel: pixels={self.pixels}: at least one pixel has to change")
        check_settings(
            "OnePixel",
            population=self.population,
            generations=self.generations,
            f=self.f,
            strategy=self.strategy,
            crossover=self.crossover,
        )
        choices = {"bounds": BOUNDS, "stop": ("confidence", "label"), "outputs": ("logits", "probabilities")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"OnePixel: {name}={getattr(self, name)!r} does not exist: choose one of {', '.join(allowed)}"
                )
        for name in ("target_confidence", "true_confidence"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"OnePixel: {name}={getattr(self, name)}: it is a probability between 0 and 1")
        if self.max_batch is not None and self.max_batch < 1:
            raise UserError(f"OnePixel: max_batch={self.max_batch}: the model is asked about one image or more")

    @property
    def wants_logits(self) -> bool:  # type: ignore[override]  # here the settings say it
        """Whether outputs that look like probabilities are worth a warning."""
        return self.outputs == "logits"

    @property
    def threat_model(self) -> ThreatModel:
        """As many pixels as were asked for."""
        return ThreatModel("l0", self.pixels)

    # -- one attack ----------------------------------------------------------------------------------------------------

    def perturb(self, problem: Problem) -> Outcome:
        """Start, go on to the end, and say what came out."""
        state = self.start(problem)
        self.advance(problem, state)
        return self.outcome(problem, state)

    def _perturb_by(self, stand_in: Model, problem: Problem) -> Outcome:
        """Evolve on ``stand_in``; an image stops when ``problem.model`` agrees, which costs no second search."""
        with attacking(stand_in) as lent:
            state = self.start(problem, search=lent)
            self.advance(problem, state, search=lent)
            return self.outcome(problem, state)

    def start(self, problem: Problem, *, search: Model | None = None) -> EvolutionState:
        """The starting populations of the images on which the goal is not reached to begin with.

        Args:
            problem: the batch; with targets each row is a pair of image and target.
            search: a faster model that is asked in place of ``problem.model``, which then only confirms.

        Raises:
            UserError: for a target that is the image's label.
        """
        clean, device = problem.images, problem.images.device
        if problem.targets is not None and (same := (problem.targets == problem.labels).nonzero()[:, 0]).numel():
            named = ", ".join(str(int(row)) for row in same[:5]) + (", …" if len(same) > 5 else "")
            raise UserError(f"OnePixel: the targets of the images {named} are their labels: choose other classes")
        problem, asked = self._asked(problem, search)
        count, dims = len(clean), self.pixels * (2 + clean.shape[1])
        queries = torch.zeros(count, dtype=torch.int64, device=device)
        logits = problem.clean_logits
        if logits is None:
            queries += 1
            logits = torch.cat([self._logits(problem, part) for part in clean.split(self._at_once(clean))])
        every = torch.arange(count, device=device)
        fitness = log_odds(problem, logits, every).to(clean.dtype)
        canvas = PixelCanvas(problem, self.pixels, self.eight_bit)
        rows = (~problem.fooled(logits) & canvas.usable).nonzero()[:, 0]
        size = (len(rows), self.population)
        state = EvolutionState(
            settings=self._course,
            generation=0,
            keys=self._keys(problem),
            rows=rows,
            vectors=clean.new_empty((*size, dims)),
            fitness=clean.new_zeros(size),
            codes=torch.zeros(size, dtype=torch.int64, device=device),
            met=torch.zeros((len(rows), REMEMBERED * self.population), dtype=torch.int64, device=device),
            met_fitness=clean.new_zeros((len(rows), REMEMBERED * self.population)),
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
            places = uniform(keys, (*vectors.shape[:2], 2 * self.pixels), clean.dtype, 0)
            colours = normal(keys, (*vectors.shape[:2], dims - 2 * self.pixels), clean.dtype, 1)
            vectors.copy_(torch.cat([places, (128 + 127 * colours) / 255], 2))
            state.codes[part], state.fitness[part], classes[part] = self._evaluated(asked, canvas, state, part, vectors)
        self._take_stock(problem, asked, canvas, state, state.vectors, state.fitness, classes)
        return state

    def advance(
        self, problem: Problem, state: EvolutionState, generations: int | None = None, *, search: Model | None = None
    ) -> None:
        """Let the images evolve further; ``state`` is changed.

        Stopping between generations, saving the state and going on gives what going on at once gives, to the bit.

        Args:
            problem: that of :meth:`start`.
            state: what :meth:`start` gave, or a copy that was saved and read again.
            generations: how many further; default: as many as the settings allow.
            search: as in :meth:`start`.

        Raises:
            UserError: where the state is of other images, targets, seed or settings.
        """
        if state.settings != self._course:
            raise UserError(f"this evolution was started with other settings: {state.settings}, not {self._course}")
        if not torch.equal(state.keys, self._keys(problem)):
            raise UserError("this evolution was started with other images, targets or another seed: start a new one")
        problem, asked = self._asked(problem, search)
        canvas = PixelCanvas(problem, self.pixels, self.eight_bit)
        last = self.generations
        if generations is not None:
            last = min(last, state.generation + generations)
        while state.generation < last and len(state.rows):
            state.generation += 1
            state.generations[state.rows] += 1
            born, fitness = torch.empty_like(state.vectors), torch.empty_like(state.fitness)
            codes, classes = torch.empty_like(state.codes), torch.empty_like(state.codes)
            for part in self._groups(len(state.rows)):
                rows = state.rows[part]
                born[part] = children(
                    state.vectors[part],
                    state.fitness[part],
                    state.keys[rows],
                    state.generation,
                    strategy=self.strategy,
                    f=self.f,
                    crossover=self.crossover,
                    bounds=self.bounds,
                )
                codes[part], fitness[part], classes[part] = self._evaluated(asked, canvas, state, part, born[part])
            grown = survivors(state.fitness, fitness)
            state.vectors = torch.where(grown[..., None], born, state.vectors)
            state.fitness = torch.where(grown, fitness, state.fitness)
            state.codes = torch.where(grown, codes, state.codes)
            self._take_stock(problem, asked, canvas, state, born, fitness, classes)
            if problem.progress is not None:
                problem.progress(state.generation, self.generations)

    def outcome(self, problem: Problem, state: EvolutionState) -> Outcome:
        """The images with their candidates, as far as the evolution has come; the model judges what it has not yet."""
        problem, _ = self._asked(problem, None)
        canvas = PixelCanvas(problem, self.pixels, self.eight_bit)
        open_rows = (~state.confirmed).nonzero()[:, 0]
        if len(open_rows):
            judged = self._judged(problem, canvas, state, state.best[open_rows], open_rows)
            state.best_fitness[open_rows], state.best_class[open_rows] = judged
            state.confirmed[open_rows] = True
        images = problem.images.clone()
        for rows in state.changed.nonzero()[:, 0].split(_GROUP):
            images[rows] = canvas.written(*canvas.read(state.best[rows][:, None], rows), rows)
        return Outcome(images, state.generations.clone(), state.queries.clone(), reached(problem, state.best_class))

    # -- the parts of a generation -------------------------------------------------------------------------------------

    def _evaluated(
        self, asked: Problem, canvas: PixelCanvas, state: EvolutionState, part: slice, vectors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Fingerprints, fitness and predicted classes ``(R, P)`` of candidates of ``state.rows[part]``.

        Only what is new is asked about. The class of what is known is -1: it has been taken stock of.
        """
        rows = state.rows[part]
        places, colours = canvas.read(vectors, rows)
        codes = canvas.codes(places, colours, rows)
        known, known_fitness = state.known(part)
        new, like = novel(known, codes)
        owner = rows[new // self.population]
        state.queries += torch.bincount(owner, minlength=len(state.queries))
        places, colours = places.flatten(0, 1), colours.flatten(0, 1)
        fitness, classes = known_fitness.new_empty(codes.numel()), torch.full_like(codes, -1).flatten()
        passes = -(-len(new) // self._at_once(asked.images))
        for some in new.tensor_split(passes) if passes else ():
            of = rows[some // self.population]
            logits = self._logits(asked, canvas.written(places[some], colours[some], of))
            fitness[some] = log_odds(asked, logits, of).to(fitness.dtype)
            classes[some] = logits.argmax(1)
        if bool(fitness[new].isnan().any()):
            raise UserError(
                "the model gave NaN for an image with changed pixels: its weights or its input are broken",
                non_finite=True,
            )
        fitness = torch.cat([known_fitness.flatten(), fitness])[like]
        classes = torch.cat([classes.new_full((known.numel(),), -1), classes])[like]
        state.remember(part, codes, fitness)
        return codes, fitness, classes

    def _take_stock(
        self,
        problem: Problem,
        asked: Problem,
        canvas: PixelCanvas,
        state: EvolutionState,
        vectors: Tensor,
        fitness: Tensor,
        classes: Tensor,
    ) -> None:
        """Keep the best of the new candidates, and let the images go that have reached what they stop at."""
        rows = state.rows
        if len(rows) == 0:
            return
        every = torch.arange(len(rows), device=rows.device)
        value, place = fitness.max(1)
        better = (value > state.best_fitness[rows]) | ~state.changed[rows]
        kept = rows[better]
        state.changed[kept], state.confirmed[kept] = True, asked is problem
        state.best[kept] = vectors[every, place][better]
        state.best_fitness[kept], state.best_class[kept] = value[better], classes[every, place][better]
        if self.stop == "label":
            there = reached(asked, classes, rows)
            place = fitness.masked_fill(~there, -torch.inf).argmax(1)
            stops = there.any(1)
        else:
            stops = better & (value > self._needed(problem))
        hits, place = stops.nonzero()[:, 0], place[stops]
        if len(hits) == 0:
            return
        at, chosen = rows[hits], vectors[hits, place]
        value, found = fitness[hits, place], classes[hits, place]
        if asked is not problem:
            value, found = self._judged(problem, canvas, state, chosen, at)
            agreed = reached(problem, found, at) if self.stop == "label" else value > self._needed(problem)
            hits, at, chosen, value, found = hits[agreed], at[agreed], chosen[agreed], value[agreed], found[agreed]
        state.best[at], state.best_fitness[at], state.best_class[at] = chosen, value, found
        state.confirmed[at] = True
        state.leave(torch.zeros_like(stops).index_fill(0, hits, True))

    def _judged(
        self, problem: Problem, canvas: PixelCanvas, state: EvolutionState, vectors: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Fitness and class of one candidate an image ``(n, D)``, by the model itself."""
        state.queries[rows] += 1
        found = []
        for part, of in zip(*(each.split(self._at_once(problem.images)) for each in (vectors, rows)), strict=True):
            logits = self._logits(problem, canvas.written(*canvas.read(part[:, None], of), of))
            found.append((log_odds(problem, logits, of).to(vectors.dtype), logits.argmax(1)))
        values, classes = zip(*found, strict=True)
        return torch.cat(values), torch.cat(classes)

    def _needed(self, problem: Problem) -> float:
        """The fitness at which an image stops."""
        share = 1 - self.true_confidence if problem.targets is None else self.target_confidence
        return math.log(share / (1 - share))

    @property
    def _course(self) -> str:
        """What decides the course of an evolution, besides images, targets and seed."""
        return repr(dataclasses.replace(self, generations=1, max_batch=None, seed=0))

    def _keys(self, problem: Problem) -> Tensor:
        """One image evolves towards each of its targets in its own way."""
        return problem.keys if problem.targets is None else problem.keys + (problem.targets + 1) * (mix_seed(-2) | 1)

    def _groups(self, count: int) -> Sequence[slice]:
        size = max(1, _GROUP // self.population)
        return [slice(start, start + size) for start in range(0, count, size)]

    def _at_once(self, images: Tensor) -> int:
        """Images in one forward pass."""
        if self.max_batch is not None:
            return self.max_batch
        if images.device.type != "cpu":
            return 4096
        # where the layers' outputs outgrow the caches (and then the allocator) an image costs up to four times as much
        return min(4096, max(8, 128 * 3072 // images[0].numel()))

    def _asked(self, problem: Problem, search: Model | None) -> tuple[Problem, Problem]:
        """The problem, and the same with the model that is searched on; both give logits whatever the model gives."""
        asked = problem if search is None else dataclasses.replace(problem, model=search, _checked=False)
        if self.outputs == "logits":
            return problem, asked
        made = of_probabilities(problem)
        return made, made if search is None else of_probabilities(asked)

    @staticmethod
    @torch.no_grad()
    def _logits(problem: Problem, images: Tensor) -> Tensor:
        return problem.logits(images)

    # -- every image towards every other class -------------------------------------------------------------------------

    def run_all_targets(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        num_classes: int,
        mask: Tensor | None = None,
        seed: int | None = None,
        clean_logits: Tensor | None = None,
        progress: Progress | None = None,
        state: EvolutionState | None = None,
        checkpoint: Callable[[EvolutionState], None] | None = None,
        checkpoint_every: int = 5,
        stand_in: Model | None = None,
    ) -> AllTargets:
        """Attack every image towards every class but its label, all pairs together: the study of the paper.

        A study that was killed goes on from its last checkpoint, to the same result as one that was not::

            result = attack.run_all_targets(
                ..., checkpoint=lambda state: torch.save(state.state_dict(), path),
                state=EvolutionState.from_state_dict(torch.load(path)) if path.exists() else None,
            )

        Args:
            model: from images ``(N, C, H, W)`` in [0, 1] to what :attr:`outputs` says.
            images: clean images in [0, 1], float.
            labels: ``(N,)`` true classes.
            num_classes: K; there are N (K - 1) pairs, whose populations are in memory together: about 50 kB a pair with
                400 candidates.
            mask: as in :meth:`run`.
            seed: as in :meth:`run`.
            clean_logits: as in :meth:`run`.
            progress: told (generations done, generations).
            state: where to go on.
            checkpoint: given the state every ``checkpoint_every`` generations and at the end.
            checkpoint_every: generations between checkpoints.
            stand_in: a faster model to search on; a pair stops when ``model`` agrees, and ``model`` alone judges.

        Raises:
            UserError: as :meth:`run`, for labels beyond ``num_classes``, and for a state of another study.
        """
        if checkpoint_every < 1:
            raise UserError(f"checkpoint_every={checkpoint_every}: at least one generation lies between checkpoints")
        searching = nullcontext(None) if stand_in is None else attacking(stand_in)
        with attacking(model) as lent, searching as search:
            single = self._problem(lent, images, labels, None, mask, seed)
            if num_classes < 2 or int(single.labels.max()) >= num_classes:
                raise UserError(
                    f"num_classes={num_classes}: give the model's number of classes, two or more; the labels go up to "
                    f"{int(single.labels.max())}"
                )
            if clean_logits is None:
                parts = single.images.split(self._at_once(single.images))
                clean_logits = torch.cat([self._logits(single, part) for part in parts])
            single.clean_logits = clean_logits
            classes = torch.arange(num_classes, device=single.labels.device)
            index, target = (single.labels[:, None] != classes).nonzero().unbind(1)
            problem = dataclasses.replace(single.subset(index), targets=target, progress=progress)
            state = self.start(problem, search=search) if state is None else state.to(index.device)
            while state.generation < self.generations and len(state.rows):
                self.advance(problem, state, checkpoint_every, search=search)
                if checkpoint is not None:
                    checkpoint(state)
            outcome = self.outcome(problem, state)
        assert outcome.success is not None
        return AllTargets(
            index=index,
            target=target,
            success=outcome.success,
            predicted=state.best_class,
            confidence=state.best_fitness.sigmoid(),
            images=outcome.images,
            generations=outcome.iterations,
            queries=outcome.queries,
            changed=state.changed,
        )

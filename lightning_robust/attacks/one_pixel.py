"""The one-pixel attack (Su, Vargas & Sakurai, arXiv 1710.08864): few pixels, found by differential evolution."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_robust.attacks.base import Attack, Outcome
from lightning_robust.attacks.context import Model, attacking
from lightning_robust.attacks.differential_evolution import BOUNDS, check_settings
from lightning_robust.attacks.evolution_state import EvolutionState
from lightning_robust.attacks.one_pixel_evolution import Evolution, ask, at_once
from lightning_robust.attacks.pixel_goal import PixelRuns
from lightning_robust.attacks.problem import Problem, Progress
from lightning_robust.attacks.threat_model import ThreatModel
from lightning_robust.errors import UserError

_MOST = 8 * 2**30  # bytes of results in memory together


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

    @property
    def course(self) -> str:
        """What decides the course of an evolution, besides images, targets and seed."""
        return repr(dataclasses.replace(self, generations=1, max_batch=None, seed=0))

    def perturb(self, problem: Problem) -> Outcome:
        """Start, go on to the end, and say what came out."""
        return self._evolve(Evolution(self, problem))

    def _perturb_by(self, stand_in: Model, problem: Problem) -> Outcome:
        """Evolve on ``stand_in``; an image stops when ``problem.model`` agrees, which costs no second search."""
        with attacking(stand_in) as lent:
            return self._evolve(Evolution(self, problem, lent))

    def _evolve(self, evolution: Evolution) -> Outcome:
        state = evolution.start()
        evolution.advance(state)
        return evolution.outcome(state)

    def run_without_target(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        mask: Tensor | None = None,
        seed: int | None = None,
        clean_logits: Tensor | None = None,
        progress: Progress | None = None,
        state: EvolutionState | None = None,
        checkpoint: Callable[[EvolutionState], None] | None = None,
        checkpoint_every: int = 5,
        stand_in: Model | None = None,
    ) -> PixelRuns:
        """Lower the probability of every image's label: :meth:`run`, but it can be stopped and go on.

        The arguments are those of :meth:`run_all_targets`.
        """
        _check_every(checkpoint_every)
        searching = nullcontext(None) if stand_in is None else attacking(stand_in)
        with attacking(model) as lent, searching as search:
            problem = self._problem(lent, images, labels, None, mask, seed)
            problem.clean_logits, problem.progress = clean_logits, progress
            index = torch.arange(len(problem.images), device=problem.images.device)
            evolution = Evolution(self, problem, search)
            return self._go_on(evolution, index, state, checkpoint, checkpoint_every)

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
    ) -> PixelRuns:
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
                400 candidates, and an image.
            mask: as in :meth:`run`.
            seed: as in :meth:`run`.
            clean_logits: as in :meth:`run`.
            progress: told (generations done, generations).
            state: where to go on.
            checkpoint: given the state every ``checkpoint_every`` generations and at the end.
            checkpoint_every: generations between checkpoints.
            stand_in: a faster model to search on; a pair stops when ``model`` agrees, and ``model`` alone judges.

        Raises:
            UserError: as :meth:`run`, for labels beyond ``num_classes``, for a state of another study, and for more
                pairs than memory is likely to hold.
        """
        _check_every(checkpoint_every)
        searching = nullcontext(None) if stand_in is None else attacking(stand_in)
        with attacking(model) as lent, searching as search:
            single = self._problem(lent, images, labels, None, mask, seed)
            if num_classes < 2 or int(single.labels.max()) >= num_classes:
                raise UserError(
                    f"num_classes={num_classes}: give the model's number of classes, two or more; the labels go up to "
                    f"{int(single.labels.max())}"
                )
            self._check_memory(single.images, num_classes)
            if clean_logits is None:
                clean_logits = torch.cat([ask(single, part) for part in single.images.split(at_once(self, images))])
            single.clean_logits = clean_logits
            classes = torch.arange(num_classes, device=single.labels.device)
            index, target = (single.labels[:, None] != classes).nonzero().unbind(1)
            problem = dataclasses.replace(single.subset(index), targets=target, progress=progress)
            return self._go_on(Evolution(self, problem, search), index, state, checkpoint, checkpoint_every)

    def _go_on(
        self,
        evolution: Evolution,
        index: Tensor,
        state: EvolutionState | None,
        checkpoint: Callable[[EvolutionState], None] | None,
        every: int,
    ) -> PixelRuns:
        state = evolution.start() if state is None else state.to(index.device)
        while state.generation < self.generations and len(state.rows):
            evolution.advance(state, every)
            if checkpoint is not None:
                checkpoint(state)
        outcome = evolution.outcome(state)
        assert outcome.success is not None
        targets = evolution.problem.targets
        return PixelRuns(
            index=index,
            target=torch.full_like(index, -1) if targets is None else targets,
            success=outcome.success,
            predicted=state.best_class,
            goal_probability=(state.best_fitness if targets is not None else -state.best_fitness).sigmoid(),
            images=outcome.images,
            generations=outcome.iterations,
            queries=outcome.queries,
            changed=state.changed,
        )

    def _check_memory(self, images: Tensor, num_classes: int) -> None:
        """A thousand classes make a thousand copies of an image: better refused than killed hours later."""
        dims = self.pixels * (2 + images.shape[1])
        numbers = images[0].numel() + self.population * (dims + 12)
        needed = len(images) * (num_classes - 1) * numbers * images.element_size()
        if needed > _MOST:
            raise UserError(
                f"OnePixel: {len(images)} images towards {num_classes - 1} classes each need about "
                f"{needed / 2**30:.0f} GiB: give {max(1, int(len(images) * _MOST / needed))} images or fewer at a time "
                "(data.eval_batch_size), or attack without targets"
            )


def _check_every(checkpoint_every: int) -> None:
    if checkpoint_every < 1:
        raise UserError(f"checkpoint_every={checkpoint_every}: at least one generation lies between checkpoints")

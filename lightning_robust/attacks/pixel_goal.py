"""What the pixels of an evolution are to reach, in probabilities alone; see :mod:`.one_pixel`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_robust.attacks.context import Model
from lightning_robust.attacks.problem import Problem
from lightning_robust.errors import UserError


@dataclass(frozen=True)
class PixelRuns:
    """What :class:`OnePixel` found run by run: an image each, or a pair of image and target, those of one in a row.

    Attributes:
        index: ``(M,)`` int64, which image.
        target: ``(M,)`` int64, towards which class; -1 where away from the label.
        success: ``(M,)`` bool: the model takes the image for the target, or no longer for the label.
        predicted: ``(M,)`` int64: what the model takes it for.
        goal_probability: ``(M,)`` of the target, or of the label.
        images: ``(M, C, H, W)`` with the fittest candidate of each run, also where it fails.
        generations: ``(M,)`` int64 that were made.
        queries: ``(M,)`` int64: points at which the model was asked; the clean image of several pairs, asked about
            once for all of them, is not counted.
        changed: ``(M,)`` bool: False where the goal was reached by the clean image already (or the mask is empty), so
            that nothing was searched.
    """

    index: Tensor
    target: Tensor
    success: Tensor
    predicted: Tensor
    goal_probability: Tensor
    images: Tensor
    generations: Tensor
    queries: Tensor
    changed: Tensor


def log_odds(problem: Problem, logits: Tensor, rows: Tensor) -> Tensor:
    """Fitness ``(n,)`` from logits: log-odds of the target, or the negative ones of the label.

    log(p / (1 - p)) has the order of the probability p and resolves it where p is 0 or 1 but for rounding.
    """
    goal = problem.goal[rows, None]
    odds = logits.gather(1, goal)[:, 0] - logits.scatter(1, goal, -torch.inf).logsumexp(1)
    return -odds if problem.targets is None else odds


def reached(problem: Problem, classes: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
    """Whether the goal of the images ``rows`` ``(R,)`` is reached by predicted classes ``(R,)`` or ``(R, P)``."""
    goal = problem.goal[rows].view(-1, *[1] * (classes.dim() - 1))
    return (classes != goal) & (classes >= 0) if problem.targets is None else classes == goal


def of_probabilities(problem: Problem) -> Problem:
    """The same problem around logarithms of the probabilities that its model gives, which are logits as well."""

    def around(model: Model) -> Model:
        def logits(images: Tensor) -> Tensor:
            given = model(images)
            if isinstance(given, Tensor) and given.dim() == 2 and not given.isnan().any():
                off = (given.sum(1) - 1).abs().amax()
                if bool((given < 0).any()) or bool(off > 1e-2):
                    raise UserError(
                        "OnePixel: the model's outputs are no probabilities (in [0, 1], of sum 1): set outputs='logits'"
                    )
            return given.log()

        return logits

    draws, clean = problem.draws, problem.clean_logits
    return dataclasses.replace(
        problem,
        model=around(problem.model),
        draws=None if draws is None else lambda: [around(model) for model in draws()],
        clean_logits=None if clean is None else clean.log(),
        wants_logits=False,
        _checked=False,
    )

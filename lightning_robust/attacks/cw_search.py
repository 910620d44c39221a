"""What the searches of Carlini and Wagner (arXiv 1608.04644) share: a walk through the box by Adam, image by image.

Each image has its own constant, moments and count of steps. So it begins its next round when its last one is over, and
leaves the batch when it has done its rounds, whatever its neighbours do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lightning_robust.attacks.minimal_norm import Smallest
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.projection import per_image

# The tanh reaches this far beyond [0, 1]. On [0, 1] itself a black or white pixel lies at infinity, and one next to it
# crawls: Adam's steps have one length in the tanh's argument, and out there that moves a pixel by next to nothing.
_BEYOND = 0.1
_SPAN = 1 + 2 * _BEYOND
_BETA_1, _BETA_2, _TINY = 0.9, 0.999, 1e-8  # of Adam
_STALLED = 0.9999  # a round is over whose loss did not fall below this share of what it was a tenth of the steps before
_LONGEST = 15  # steps at most between two questions
_HALVINGS = 6  # of the way back to the clean image, at the end


class Ask(Protocol):
    """What a search asks about its points; :class:`~lightning_robust.attacks.cw_hinge.Hinge` is one."""

    copies: int

    def __call__(self, points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is left to the goal ``(n,)``, its gradient ``(n, C, H, W)``, and whether it is reached ``(n,)``.

        Where the goal is reached the gradient is zero, and what is left is minus the room there is.
        """

    def hits(self, points: Tensor, rows: Tensor) -> Tensor:
        """Whether the goal is reached ``(n,)``."""

    def forget(self, rows: Tensor) -> None:
        """The next points of these images are no continuation of the last ones."""


@dataclass(frozen=True)
class Settings:
    """Of a search; see :class:`~lightning_robust.attacks.cw.CW`."""

    steps: int
    lr: float
    abort_early: bool
    initial_const: float
    rounds: int


class Search(ABC):
    """Images on their way through the box; subclasses say what is to fall, and when a round is over.

    The way is walked in the argument of a tanh, so that no step leads out of [0, 1]. What is added to an image is the
    difference of two tanhs: a pixel whose argument does not move, as one outside the mask, stays what it is to the bit.

    Args:
        settings: of the search.
        problem: the batch.
        best: where hits are collected.
        ask: what is asked about points.
        rows: ``(n,)`` the images to attack.
        slope: ``(n, C, H, W)`` gradient of the hinge at these clean images, about which no round asks again.

    Attributes:
        rows: ``(n,)`` places in the batch of those that are still searched.
        clean: ``(n, C, H, W)`` these images.
        points: ``(n, C, H, W)`` where they are.
        delta: ``(n, C, H, W)`` their difference.
        step: ``(n,)`` int64, steps of this round.
        lr: ``(n,)`` length of a step in the tanh's argument.
        const: ``(n,)`` factor c of the hinge.
    """

    coasts: ClassVar[bool] = False  # whether a step may be made without asking, where the hinge is surely flat

    def __init__(
        self,
        settings: Settings,
        problem: Problem,
        best: Smallest,
        ask: Ask,
        rows: Tensor,
        slope: Tensor,
    ) -> None:
        self.settings, self.problem, self.best, self.ask = settings, problem, best, ask
        self.rows, self.slope, self.clean = rows, slope, problem.images[rows]
        self.points, self.delta = self.clean, torch.zeros_like(self.clean)
        self._start = _inverse(self.clean)
        self._start_tanh = self._start.tanh()
        self._at, self._tanh = self._start, self._start_tanh
        self._mean, self._square = torch.zeros_like(self.clean), torch.zeros_like(self.clean)
        self.step = torch.zeros_like(rows)
        self.lr = torch.full((len(rows),), settings.lr, dtype=slope.dtype, device=slope.device)
        self.const = torch.full_like(self.lr, settings.initial_const)
        self._least = torch.full_like(self.lr, torch.inf)  # loss of this round
        self._least_before = self._least  # the same, when it was last looked at
        self._known = self._least  # hinge when the model was last asked
        self._since, self._pause = torch.zeros_like(rows), torch.zeros_like(rows)
        self.begin()

    @abstractmethod
    def begin(self) -> None:
        """Set up what a subclass keeps besides, and take the first step."""

    @property
    @abstractmethod
    def most(self) -> int:
        """Steps that the search takes at most, or usually at most."""

    @abstractmethod
    def turn(self, value: Tensor, slope: Tensor, hit: Tensor) -> None:
        """Go on from the points, about which ``value``, ``slope`` and ``hit`` are known now."""

    def run(self) -> None:
        """Search until every image has left."""
        count = 0
        while len(self.rows):
            self.turn(*self._look_around())
            if self.best.threat_model.bounded:
                self.keep(self.best.norm[self.rows] > self.best.threat_model.radius + 1e-6)
            count += 1
            if self.problem.progress is not None:
                self.problem.progress(min(count, self.most), self.most)

    def _look_around(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ask about the points, but for images that are far beyond the boundary, and keep the hits."""
        self.best.iterations[self.rows] += 1
        self._since = self._since + 1
        awake = self._since > self._pause
        if awake.all():
            value, slope, hit = self._inquire(self.points, self.rows)
        else:
            value, slope, hit = self._known.clone(), torch.zeros_like(self.points), torch.zeros_like(awake)
            places = awake.nonzero()[:, 0]
            if len(places):
                value[places], slope[places], hit[places] = self._inquire(self.points[places], self.rows[places])
        if self.coasts:
            # Half of the steps that it takes to come back to the boundary at the present rate, and no more than about
            # twice the last pause: the way there is bent.
            back = (-value / ((value - self._known) / self._since).clamp_min(1e-30) / 2).clamp(0, _LONGEST)
            back = torch.where(self._known.isfinite(), back, 0).long()
            pause = torch.where(hit & (value < 0), torch.minimum(back, 2 * self._pause + 1), 0)
            self._pause = torch.where(awake, pause, self._pause)
        self._known, self._since = torch.where(awake, value, self._known), self._since.masked_fill(awake, 0)
        return value, slope, hit

    def _inquire(self, points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, slope, hit = self.ask(points, rows)
        self.best.offer(rows, points, hit)
        self.best.queries[rows] += self.ask.copies
        return value, slope, hit

    def keep(self, which: Tensor) -> None:
        """Go on with some of the images: every tensor of a search has one entry an image."""
        if not which.all():
            for name, values in vars(self).items():
                if isinstance(values, Tensor):
                    setattr(self, name, values[which])

    def over(self, loss: Tensor) -> Tensor:
        """Which rounds are over: all steps done, or the loss ``(n,)`` no longer falls; called once a step."""
        over = self.step + 1 >= self.settings.steps
        if self.settings.abort_early:
            # The least loss so far and not the last one: at the boundary the loss goes up and down, and of a whole
            # batch, which the original looks at, that averages out.
            self._least = torch.minimum(self._least, loss)
            due = self.step % max(self.settings.steps // 10, 1) == 0
            over = over | self.stalled(due & (self._least > _STALLED * self._least_before))
            self._least_before = torch.where(due, self._least, self._least_before)
        return over

    def stalled(self, stalled: Tensor) -> Tensor:
        """Of the images ``(n,)`` bool whose loss no longer falls, those whose round is over for that."""
        return stalled

    def restart(self, which: Tensor, points: Tensor | None = None) -> None:
        """Begin a round of the images ``which`` ``(n,)`` bool, at ``points`` ``(n, C, H, W)`` or the clean images."""
        chosen = per_image(which, self.clean)
        self._at = torch.where(chosen, self._start if points is None else _inverse(points), self._at)
        self._mean, self._square = self._mean.masked_fill(chosen, 0), self._square.masked_fill(chosen, 0)
        self.step = self.step.masked_fill(which, 0)
        self._least = self._least.masked_fill(which, torch.inf)
        self._least_before = self._least_before.masked_fill(which, torch.inf)
        self._known = self._known.masked_fill(which, torch.inf)
        self._since, self._pause = self._since.masked_fill(which, 0), self._pause.masked_fill(which, 0)
        self.ask.forget(self.rows[which])
        self._look()

    def move(self, gradient: Tensor, which: Tensor | None = None) -> None:
        """One step of Adam.

        Args:
            gradient: ``(n, C, H, W)``, by the pixels, of what is to fall.
            which: ``(n,)`` bool, the images that step; default: all.
        """
        # at an edge of the box a pixel gathers no speed outwards
        out = ((self.points <= 0) & (gradient > 0)) | ((self.points >= 1) & (gradient < 0))
        slope = (1 - self._tanh.square()).mul_(gradient).mul_(_SPAN / 2).masked_fill_(out, 0)
        step = (self.step + 1).to(slope.dtype)
        mean, square = self._mean.lerp(slope, 1 - _BETA_1), self._square.lerp(slope.square(), 1 - _BETA_2)
        root = (square / per_image(1 - _BETA_2**step, slope)).sqrt_().add_(_TINY)
        at = self._at - per_image(self.lr / (1 - _BETA_1**step), slope) * mean / root
        if which is None:
            self._at, self._mean, self._square, self.step = at, mean, square, self.step + 1
        else:
            chosen = per_image(which, slope)
            self._at = torch.where(chosen, at, self._at)
            self._mean = torch.where(chosen, mean, self._mean)
            self._square = torch.where(chosen, square, self._square)
            self.step = self.step + which
        self._look()

    def _look(self) -> None:
        self._tanh = self._at.tanh()
        self.points = (self._tanh - self._start_tanh).mul_(_SPAN / 2).add_(self.clean).clamp_(0, 1)
        self.delta = self.points - self.clean


def _inverse(images: Tensor) -> Tensor:
    return ((2 * images - 1) / _SPAN).atanh()


def draw_back(best: Smallest, ask: Ask) -> None:
    """Move each image towards its clean one as far as it remains a hit: where the steps were coarse, much of the norm.

    Args:
        best: what was found.
        ask: says what a hit is.
    """
    clean, threat_model = best.problem.images, best.threat_model
    rows = best.todo & best.norm.isfinite()
    if threat_model.bounded:
        rows &= best.norm > threat_model.radius + 1e-6
    rows = rows.nonzero()[:, 0]
    far = best.images[rows]
    low, high = torch.zeros_like(best.norm[rows]), torch.ones_like(best.norm[rows])
    for _ in range(_HALVINGS if len(rows) else 0):
        middle = (low + high) / 2
        points = torch.lerp(clean[rows], far, per_image(middle, far))
        hit = ask.hits(points, rows)
        best.queries[rows] += ask.copies
        best.offer(rows, points, hit)
        low, high = torch.where(hit, low, middle), torch.where(hit, middle, high)

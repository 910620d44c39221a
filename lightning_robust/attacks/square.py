"""Square attack (Andriushchenko et al., arXiv 1912.00049): random squares, kept where they help; a black-box attack."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_robust.attacks.base import Attack, Outcome
from lightning_robust.attacks.losses import cross_entropy, margin
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.projection import norms
from lightning_robust.attacks.randomness import uniform
from lightning_robust.attacks.squares import Squares
from lightning_robust.attacks.threat_model import Norm, ThreatModel, check_ball_norm
from lightning_robust.errors import UserError

# The share of pixels that a square covers is halved after each of these, of 10,000 proposals (section 3.2).
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_BLOCK = 64  # proposals whose random numbers are drawn at once
# Values of the images in one pass of `look_ahead`: about what keeps one core, or a GPU, busy.
_ROOM = {"cpu": 2**17}
_ROOM_ELSEWHERE = 2**20


@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Square attack: proposes squares at random places, from large to small, and keeps those that lower the margin.

    A black-box attack: the model may be any function from images to logits, and no gradient is asked for. In L∞ a
    square sets each channel to one end of the budget; in L2 it moves part of the budget from one place to another, in
    a shape of two bumps of opposite sign; L1 is the form of arXiv 2103.01208. A proposal that would change nothing (its
    pixels are at that end already) is not asked about, since the answer is known.

    Args:
        eps: budget in pixel units of [0, 1], a number or a fraction such as 8/255.
        norm: norm of the budget.
        queries: proposals of each run, the start counted: at most so many points are asked about (and the clean image).
        p_init: share of the pixels that the first squares cover, in (0, 1].
        restarts: independent runs; an image is fooled if one of them fools it.
        loss: "margin" (true logit minus best other) or "ce" (cross-entropy). A targeted run always lowers the
            cross-entropy of the target, as the official code does.
        rescale_schedule: stretch the schedule of sizes, which the paper gives for 10,000 queries, over ``queries``;
            AutoAttack does not.
        look_ahead: also ask, in the same pass, about the proposals that come next, and ask again about those that come
            after one that was kept. The result is the same, to rounding; of use on a GPU and for few images, where a
            larger pass takes hardly longer. It takes more queries.
        seed: of the squares.

    An image that withstands comes back where its loss was best in the last run.

    Raises:
        UserError: for settings outside these ranges.

    Example:
        >>> import torch
        >>> images = torch.full((4, 1, 6, 6), 0.5)
        >>> def steps(images):  # no gradient leads anywhere here
        ...     rounded = (8 * images.flatten(1)).round()
        ...     return torch.stack([rounded[:, :18].sum(1), rounded[:, 18:].sum(1) - 1], 1)
        >>> bool(Square(eps=0.1, queries=100).run(steps, images, steps(images).argmax(1)).success.all())
        True
    """

    stop_at_success = True

    eps: float | str = "8/255"
    norm: Norm = "linf"
    queries: int = 5000
    p_init: float = 0.8
    restarts: int = 1
    loss: Literal["margin", "ce"] = "margin"
    rescale_schedule: bool = True
    look_ahead: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_ball_norm(self.norm, "Square")
        _ = self.threat_model  # refuses a bad ε
        if self.queries < 1:
            raise UserError(f"Square: queries={self.queries}: at least one is needed, 5000 in AutoAttack")
        if self.restarts < 1:
            raise UserError(f"Square: restarts={self.restarts}: at least one run is needed")
        if not 0 < self.p_init <= 1:
            raise UserError(f"Square: p_init={self.p_init} is a share above 0 and up to 1, 0.8 in AutoAttack")
        if self.loss not in ("margin", "ce"):
            raise UserError(f"Square: loss={self.loss!r} does not exist: choose margin or ce")

    @property
    def threat_model(self) -> ThreatModel:
        """Norm and budget."""
        return ThreatModel(self.norm, self.eps)

    @torch.no_grad()
    def perturb(self, problem: Problem) -> Outcome:
        """Run after run, on the images that are not yet fooled."""
        logits = problem.clean_logits
        iterations = torch.zeros_like(problem.labels)
        queries = torch.zeros_like(iterations)
        if logits is None:
            queries += 1
            logits = problem.logits(problem.images)
        outcome = Outcome(problem.images.clone(), iterations, queries)
        success = problem.fooled(logits)
        for restart in range(self.restarts):
            rows = (~success).nonzero()[:, 0]
            if len(rows) == 0:
                break
            success[_Run(self, problem, outcome, rows, restart).search()] = True
        outcome.success = success
        return outcome

    def side(self, done: int, height: int, width: int) -> int:
        """Side in pixels of the square that is proposed after ``done`` others."""
        place = done * 10_000 // self.queries if self.rescale_schedule else done
        pixels = self.p_init / 2 ** bisect_left(_HALVINGS, place) * height * width
        side = round(pixels**0.5)
        # two bumps need three pixels, and an odd number has a middle
        side = max(side, 1) if self.norm == "linf" else max(side, 3) // 2 * 2 + 1
        return min(side, height, width)


class _Run:
    """One run. Rows leave as their images are fooled; their points so far are kept in the outcome itself."""

    def __init__(self, attack: Square, problem: Problem, outcome: Outcome, rows: Tensor, restart: int) -> None:
        self.attack, self.problem, self.outcome, self.rows, self.restart = attack, problem, outcome, rows, restart
        self.squares = Squares(problem, attack.threat_model)
        self.stream = restart * (attack.queries // _BLOCK + 2)
        self.fooled = [rows[:0]]
        self.draws = problem.images.new_empty(len(rows), 0)  # random numbers of the present block of proposals
        self.rate = 1.0  # share of the last proposals that were kept

    def search(self) -> Tensor:
        """Run to the end, or until every image is fooled.

        Returns:
            the rows that are fooled.
        """
        attack, problem, outcome, squares = self.attack, self.problem, self.outcome, self.squares
        height, width = problem.images.shape[2:]
        start = squares.start(self.rows, self._draw(squares.start_draws))
        outcome.images[self.rows] = start
        outcome.queries[self.rows] += 1
        logits = problem.logits(start)
        self.loss = self._loss(logits, self.rows)  # of each image's point, to be lowered
        self._leave(problem.fooled(logits, self.rows))
        done, last = 0, attack.queries - 1
        while done < last and len(self.rows):
            if done % _BLOCK == 0:
                self.draws = self._draw((_BLOCK, squares.draws))
            ahead = min(self._ahead(), _BLOCK - done % _BLOCK, last - done)
            side = attack.side(done, height, width)
            while attack.side(done + ahead - 1, height, width) != side:
                ahead -= 1
            self._decide(done, ahead, side)
            done += ahead
            if problem.progress is not None:
                problem.progress(self.restart * attack.queries + done + 1, attack.restarts * attack.queries)
        return torch.cat(self.fooled)

    def _draw(self, shape: tuple[int, ...]) -> Tensor:
        self.stream += 1
        keys = self.problem.keys[self.rows]
        return uniform(keys, (len(keys), *shape), self.problem.images.dtype, self.stream)

    def _ahead(self) -> int:
        """How many proposals to ask about in one pass: as many as there is room for and are likely to be of use."""
        if not self.attack.look_ahead:
            return 1
        images = self.problem.images
        room = _ROOM.get(images.device.type, _ROOM_ELSEWHERE) // images[0].numel()
        return max(1, min(room // len(self.rows), int(0.5 / max(self.rate, 1 / _BLOCK))))

    def _decide(self, done: int, ahead: int, side: int) -> None:
        """Keep or refuse the next ``ahead`` proposals of each image, one after the other.

        All that wait are asked about in one pass. Those of an image that come after its first one to be kept start from
        another point now, and are asked about again.
        """
        problem, outcome, rows = self.problem, self.outcome, self.rows
        steps = torch.arange(ahead, device=rows.device)
        waiting = torch.ones(len(rows), ahead, dtype=torch.bool, device=rows.device)
        fooled = torch.zeros_like(waiting[:, 0])
        decided = torch.full_like(rows, ahead)
        kept = 0
        while True:
            place, step = waiting.nonzero(as_tuple=True)
            points = outcome.images.index_select(0, rows[place])
            proposed = self.squares.propose(points, rows[place], self.draws[place, done % _BLOCK + step], side)
            new = (norms(proposed - points, "linf") > 0).nonzero()[:, 0]
            if len(new) == 0:
                break
            if len(new) < len(place):
                place, step, proposed = place[new], step[new], proposed.index_select(0, new)
            image = rows[place]
            outcome.queries.index_add_(0, image, torch.ones_like(image))
            logits = problem.logits(proposed)
            loss, hit = self._loss(logits, image), problem.fooled(logits, image)
            better = torch.zeros_like(waiting)
            better[place, step] = hit | (loss < self.loss[place])
            changed, first = better.any(1), better.int().argmax(1)  # argmax: the first of equals
            take = changed[place] & (step == first[place])
            place, hit, proposed = place[take], hit[take], proposed[take]
            if len(place) == 0:
                break
            outcome.images[rows[place]] = proposed
            self.loss[place] = loss[take]
            kept += len(place)
            fooled[place] = hit
            decided[place[hit]] = first[place[hit]] + 1
            waiting = (changed & ~fooled)[:, None] & (steps > first[:, None])
            if ahead == 1 or not waiting.any():
                break
        self.rate = kept / (len(rows) * ahead)
        outcome.iterations[rows] += decided
        self._leave(fooled)

    def _leave(self, fooled: Tensor) -> None:
        if fooled.any():
            self.fooled.append(self.rows[fooled])
            self.rows, self.loss, self.draws = self.rows[~fooled], self.loss[~fooled], self.draws[~fooled]

    def _loss(self, logits: Tensor, rows: Tensor) -> Tensor:
        problem = self.problem
        if problem.targets is not None:
            return cross_entropy(logits, problem.targets[rows])
        return -(margin if self.attack.loss == "margin" else cross_entropy)(logits, problem.labels[rows])

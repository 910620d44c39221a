"""What is audited: a model, some images, and per image what it has withstood so far."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from lightning_robust.attacks import Attack, ThreatModel, Transfer, accelerate
from lightning_robust.attacks.adaptive import EOT, Randomized
from lightning_robust.attacks.context import Model, attacking, unwrap
from lightning_robust.attacks.losses import AttackLoss
from lightning_robust.attacks.randomness import mix_seed
from lightning_robust.audit.answers import VOTES, asked, judges, unit
from lightning_robust.audit.result import AttackRow
from lightning_robust.audit.share import Share
from lightning_robust.audit.stand_ins import Reseeded
from lightning_robust.errors import UserError

Progress = Callable[[str, float], None]
"""Told the name of what runs, and the share of it that is done."""

_SAME = 1e-3  # of logits of length one: what a stand-in may differ by


class Subject:
    """A model under audit, this process's share of the images, and the ledger of what ran.

    Vectors over "all images" are those of all processes, in one order, on the CPU.

    Args:
        model: images ``(N, C, H, W)`` in [0, 1] to logits ``(N, K)``.
        images: this process's images, on the model's device.
        labels: ``(n,)``.
        threat_model: norm and ε that are stated.
        seed: of all random numbers.
        batch_size: images that are attacked at a time.
        share: which of the images this process holds.
        progress: told of each attack.
        fast: search on a stand-in with BatchNorm folded where that has the model's logits.

    Attributes:
        right: ``(total,)`` bool, classified rightly.
        withstood: ``(total,)`` bool, classified rightly under everything that ran at ε.
        rows: the attacks that ran at ε.
        random: the model answers differently from call to call, or draws by the pixels.
        blind: no gradient reaches the image at all.
        non_finite: images at which some attack met NaN.
        nan_answers: of this process, how often the model answered a changed image with NaN.
    """

    def __init__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        threat_model: ThreatModel,
        *,
        seed: int = 0,
        batch_size: int = 128,
        share: Share | None = None,
        progress: Progress | None = None,
        fast: bool = True,
    ) -> None:
        self.model: Model = unwrap(model)
        self.images, self.labels, self.threat_model = images, labels, threat_model
        self.seed, self.batch_size = seed, batch_size
        self.share = Share.of_all(len(images)) if share is None else share
        self.random, self.blind = False, False
        parts = self.model.modules() if isinstance(self.model, nn.Module) else ()
        self.handed_in_training = any(part.training for part in parts)
        self.nan_answers = 0
        self.rows: list[AttackRow] = []
        self._progress = progress
        self._fast: Model | None = None
        self.told("clean images", 0)
        logits, mistake = torch.zeros(0), None
        try:
            logits = self.answers(self.images)
            if bool(logits.isnan().any()):
                what = "the model gave NaN for clean images: its weights or its input are broken"
                mistake = UserError(what, non_finite=True)
        except UserError as error:
            mistake = error
        self.share.agree(mistake)
        self.classes = logits.shape[1]
        self.logits = self.share.gather(logits)
        self.right = self.share.gather(logits.argmax(1) == self.labels)
        self.withstood = self.right.clone()
        self.non_finite = torch.zeros_like(self.right)
        if fast:
            self._fast = self._stand_in()

    # -- images --------------------------------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """How many images there are."""
        return self.share.total

    def first(self, count: int) -> Tensor:
        """The first so many of all images, as ``(total,)`` bool."""
        return torch.arange(self.total) < count

    def first_right(self, count: int) -> Tensor:
        """The first so many of the rightly classified images, as ``(total,)`` bool."""
        return self.right & (self.right.cumsum(0) <= count)

    def each(self, wanted: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What a function gives for some of the images, one row an image.

        Args:
            wanted: ``(total,)`` bool.
            function: from some of this process's images and their labels to ``(n, …)``.

        Returns:
            ``(wanted, …)`` in the order of all images.
        """
        rows = self.share.mine(wanted)
        # an image is asked about even where none is wanted here: it says what shape the answer has
        asked = rows if len(rows) else torch.zeros(1, dtype=torch.int64)
        parts = [function(self.images[part], self.labels[part]) for part in asked.split(self.batch_size)]
        found = torch.cat(parts).detach().cpu()
        everything = torch.zeros(len(self.images), *found.shape[1:], dtype=found.dtype)
        if len(rows):
            everything[rows] = found
        return self.share.gather(everything)[wanted]

    # -- the model -----------------------------------------------------------------------------------------------------

    def answers(self, images: Tensor, model: Model | None = None) -> Tensor:
        """Logits of some images ``(n, K)``, in eval mode and without gradients.

        Raises:
            UserError: if the model cannot take the images.
        """
        with attacking(self.model if model is None else model) as lent, torch.no_grad():
            found = torch.cat([asked(lent, part) for part in images.split(self.batch_size)])
        self.nan_answers += int(found.isnan().any(1).sum())
        return found

    def wrong(self, images: Tensor, labels: Tensor) -> Tensor:
        """Whether the model errs on some images; a random one by a majority of fresh draws."""
        if not self.random:
            return self.answers(images).argmax(1) != labels
        with torch.random.fork_rng():
            torch.manual_seed(mix_seed(self.seed, VOTES) % 2**63)
            votes = torch.stack(
                [self.answers(images, judge).argmax(1) != labels for judge in judges(self.model, self.seed)]
            )
        return 2 * votes.sum(0) > VOTES

    def set_random(self) -> None:
        """From now on the majority of fresh draws counts."""
        self.random, self._fast = True, None
        self.right = self.share.gather(~self.wrong(self.images, self.labels))
        self.withstood = self.right.clone()

    def fixed(self, model: Model | None = None) -> Model:
        """The model with its dice thrown once and for all, where it is random."""
        model = self.model if model is None else model
        if not self.random:
            return model
        return model.draws(1)[0] if isinstance(model, Randomized) else Reseeded(model, self.seed)

    def in_double(self) -> Model | None:
        """A copy of the model that computes in float64; ``None`` where it cannot."""
        if not isinstance(self.model, nn.Module):
            return None
        try:
            copied = copy.deepcopy(self.model).double()
            with attacking(copied) as lent, torch.no_grad():
                lent(self.images[:2].double())  # an image alone is another question
        # a kernel for float32 alone, weights cast by hand, …
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            return None
        return copied

    @property
    def searched(self) -> Model:
        """What attacks search on: a faster model of the same logits, or the model."""
        return self.model if self._fast is None else self._fast

    def gradients(self, model: Model, images: Tensor, labels: Tensor, loss: AttackLoss) -> tuple[Tensor, Tensor]:
        """Loss ``(n,)`` and its gradient ``(n, C, H, W)``; zeros where no gradient reaches the images."""
        with attacking(model) as lent:
            points = images.detach().clone().requires_grad_()
            values = loss(lent(points), labels)
            found = None
            if values.requires_grad:
                found = torch.autograd.grad(values.sum(), points, allow_unused=True)[0]
        return values.detach(), torch.zeros_like(points, requires_grad=False) if found is None else found

    def _stand_in(self) -> Model | None:
        """A faster model of the same logits, if there is one."""
        if not isinstance(self.model, nn.Module) or isinstance(self.model, Randomized | GraphModule):
            return None
        fast = accelerate(self.model)
        some = self.images[: self.batch_size]
        ours, theirs = unit(self.answers(some)), unit(self.answers(some, fast))
        same = self.share.sum(float((ours - theirs).norm(dim=1).max() > _SAME)) == 0
        return fast if same else None

    # -- attacks -------------------------------------------------------------------------------------------------------

    def attack(
        self,
        name: str,
        attack: Attack,
        on: Tensor,
        *,
        model: Model | None = None,
        gradient: bool = True,
        adaptive: bool = False,
        of: Tensor | None = None,
    ) -> Tensor:
        """Attack some of the images, and note the result where it is one at the stated ε.

        Args:
            name: what it is called.
            attack: with the norm that is stated, of any ε.
            on: ``(total,)`` bool: images to attack; wrongly classified ones are left out.
            model: what is attacked in place of the model; what was found is shown to the model itself.
            gradient: the attack follows gradients, and is of no use where there are none.
            adaptive: it is made for what the checks found.
            of: ``(total,)`` bool: the images that the share is taken of where ``on`` are those left of them.

        Returns:
            ``(total,)`` bool: the images that it fooled.
        """
        begun = time.perf_counter()
        on = on & self.right
        if gradient and model is None:
            on = on & ~self.non_finite  # it would meet NaN again
        fooled = torch.zeros_like(on)
        if not (gradient and self.blind and model is None):
            fooled = self._fooled(name, attack, on, model)
        fooled = fooled & on
        theirs = attack.threat_model
        if theirs.norm == self.threat_model.norm and theirs.radius < self.threat_model.radius:
            self.withstood &= ~fooled  # a smaller change than the stated one is within it
        if attack.threat_model == self.threat_model:
            self.withstood &= ~fooled
            base = torch.ones_like(on) if of is None else of
            left = (self.withstood if of is not None else self.right & ~fooled) & base
            self.rows.append(
                AttackRow(
                    name=name,
                    robust_accuracy=int(left.sum()) / max(int(base.sum()), 1),
                    seconds=time.perf_counter() - begun,
                    adaptive=adaptive,
                    images=int(base.sum()),
                    left_over=of is not None,
                )
            )
        return fooled

    def _fooled(self, name: str, attack: Attack, on: Tensor, model: Model | None) -> Tensor:
        rows = self.share.mine(on)
        local = torch.zeros(len(self.images), dtype=torch.bool)
        broken = torch.zeros_like(local)
        self.told(name, 0)
        parts = rows.split(self.batch_size) if len(rows) else ()
        for number, part in enumerate(parts):

            def told(done: int, steps: int, number: int = number) -> None:
                self.told(name, (number + done / max(steps, 1)) / len(parts))

            fooled, lost = self._on_batch(attack, part, model, told)
            local[part], broken[part] = fooled.cpu(), lost.cpu()
        self.non_finite |= self.share.gather(broken)
        return self.share.gather(local)

    def _on_batch(
        self, attack: Attack, part: Tensor, model: Model | None, told: Callable[[int, int], None]
    ) -> tuple[Tensor, Tensor]:
        """Of some images whether each is fooled, and whether the attack met NaN at it."""
        images, labels = self.images[part], self.labels[part]
        if self.random:  # one call that errs is no success, and no reason to stop
            attack = attack.to_the_end()
        stand_in = None if model is not None or isinstance(attack, EOT | Transfer) else self._fast
        try:
            result = attack.run(
                self.model if model is None else model,
                images,
                labels,
                rounding=False,
                stand_in=stand_in,
                progress=told,
                seed=mix_seed(self.seed, attack.seed),
            )
        except UserError as error:
            if not error.non_finite:
                raise
            # the images at fault are found by halves; the others go on
            if len(part) == 1:
                return torch.zeros(1, dtype=torch.bool), torch.ones(1, dtype=torch.bool)
            halves = [self._on_batch(attack, half, model, told) for half in part.split(-(-len(part) // 2))]
            return torch.cat([fooled for fooled, _ in halves]), torch.cat([lost for _, lost in halves])
        fooled = result.success if model is None and not self.random else self.wrong(result.images, labels)
        return fooled.cpu(), torch.zeros(len(part), dtype=torch.bool)

    def told(self, name: str, done: float) -> None:
        """Tell how far something is."""
        if self._progress is not None:
            self._progress(name, min(done, 1.0))

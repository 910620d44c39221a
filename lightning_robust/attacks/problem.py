"""What an attack works on: :class:`Problem`, a batch with its model, and every question that an attack may ask."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_robust.attacks.checks import check_gradient, check_logits, check_no_nan, warn_of_probabilities
from lightning_robust.attacks.context import Model

Progress = Callable[[int, int], None]
"""Told (steps done, steps in all) as an attack goes on."""


@dataclass
class Problem:
    """One batch to attack, checked and ready: what :meth:`Attack.perturb` is given.

    Attributes:
        model: from images ``(N, C, H, W)`` to logits ``(N, K)``, in eval mode, parameters without gradients.
        images: clean images in [0, 1].
        labels: ``(N,)`` int64.
        targets: ``(N,)`` int64, or ``None`` for an untargeted attack.
        mask: 1 where pixels may change, broadcastable to the images, in their dtype; ``None``: everywhere.
        keys: ``(N,)`` int64, keys of :mod:`lightning_robust.attacks.randomness`.
        clean_logits: logits of the clean images where the caller has them already.
        progress: told of each step.
        wants_logits: warn of a model whose outputs look like probabilities.
        draws: what to average over in place of one call of the model, where the model is random: gives the models of
            one such average (see :class:`~lightning_robust.attacks.adaptive.EOT`).
        aims: ``(N,)`` int64, the class that an untargeted attack is to go for, where it would choose some itself; any
            other class than the label is a success all the same.
    """

    model: Model
    images: Tensor
    labels: Tensor
    targets: Tensor | None
    mask: Tensor | None
    keys: Tensor
    clean_logits: Tensor | None = None
    progress: Progress | None = None
    draws: Callable[[], Sequence[Model]] | None = None
    wants_logits: bool = True
    aims: Tensor | None = None
    _checked: bool = dataclasses.field(default=False, repr=False)

    @property
    def sign(self) -> float:
        """Direction in which the loss of :attr:`goal` is followed: up from the label, down towards a target."""
        return 1.0 if self.targets is None else -1.0

    @property
    def goal(self) -> Tensor:
        """The class that the loss is computed for: the label, or the target of a targeted attack."""
        return self.labels if self.targets is None else self.targets

    def fooled(self, logits: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """Which of the images ``rows`` the attack has succeeded on, given their logits."""
        predicted = logits.argmax(1)
        return predicted != self.labels[rows] if self.targets is None else predicted == self.targets[rows]

    def subset(self, rows: Tensor) -> Problem:
        """The same problem for the images ``rows`` only."""

        def of(values: Tensor | None) -> Tensor | None:
            return values if values is None or len(values) == 1 < len(self.images) else values[rows]

        return dataclasses.replace(
            self,
            images=self.images[rows],
            labels=self.labels[rows],
            targets=of(self.targets),
            mask=of(self.mask),
            keys=self.keys[rows],
            clean_logits=of(self.clean_logits),
            aims=of(self.aims),
        )

    def logits(self, images: Tensor) -> Tensor:
        """Logits of some images, gradients as the surrounding context says.

        The first answer's shape and classes are checked, and every answer for NaN.

        Of a model with :attr:`draws`: the logarithm of its mean probabilities over them.
        """
        if self.draws is None:
            return self._ask(self.model, images)
        return _expected([self._ask(model, images) for model in self.draws()])

    def _ask(self, model: Model, images: Tensor) -> Tensor:
        logits = model(images)
        if not self._checked:
            self._checked = True
            check_logits(logits, images, self.labels, self.targets)
            if self.wants_logits:
                warn_of_probabilities(logits)
        else:
            check_no_nan(logits)
        # a loss in half precision would tie where logits differ
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def loss_and_gradient(
        self,
        images: Tensor,
        rows: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        fooled_leave: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Forward and backward of the images ``rows`` at the points ``images``.

        Args:
            images: ``(n, C, H, W)`` points to differentiate at.
            rows: ``(n,)`` their places in the batch.
            loss: from logits and rows to one value an image.
            fooled_leave: the gradient of an image that is fooled at its point is not asked for, and may be zero.

        Returns:
            loss ``(n,)``, its gradient ``(n, C, H, W)`` (zero outside the mask) and logits ``(n, K)``, all detached.
        """
        if not fooled_leave or self.draws is not None:
            (values,), (gradient,), logits = self.gradients(images, rows, lambda *given: [loss(*given)])
            return values, gradient, logits
        with torch.enable_grad():
            images = images.detach().requires_grad_()
            logits = self.logits(images)
            values = loss(logits, rows)
            left = (~self.fooled(logits.detach(), rows)).nonzero()[:, 0]
            # A backward pass costs about as much as a forward pass, and cannot be had for a part of a batch: where
            # fewer than half of the images go on, forward and backward of these alone are cheaper.
            if 2 * len(left) < len(images):
                values, logits = values.detach(), logits.detach()  # the graph is let go
                gradient = torch.zeros_like(images, requires_grad=False)
                if len(left):
                    gradient[left] = self.loss_and_gradient(images[left], rows[left], loss)[1]
                return values, gradient, logits
            found = _gradient(values, images)
        return values.detach(), self._masked(found, rows), logits.detach()

    def gradients(
        self,
        images: Tensor,
        rows: Tensor,
        functions: Callable[[Tensor, Tensor], Sequence[Tensor]],
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """One forward pass, and one backward pass for each of several functions of the logits.

        Every gradient attack comes through here, so that an average over a model's randomness (:attr:`draws`) reaches
        all of them.

        Args:
            images: ``(n, C, H, W)`` points to differentiate at.
            rows: ``(n,)`` their places in the batch.
            functions: from logits ``(n, K)`` and rows to some tensors of one value an image ``(n,)``.

        Returns:
            the values ``(n,)`` and the gradients ``(n, C, H, W)`` (zero outside the mask) of each function, and the
            logits ``(n, K)``, all detached.
        """
        all_values: list[list[Tensor]] = []
        all_gradients: list[list[Tensor]] = []
        all_logits: list[Tensor] = []
        for model in [self.model] if self.draws is None else self.draws():
            with torch.enable_grad():
                points = images.detach().requires_grad_()
                logits = self._ask(model, points)
                values = list(functions(logits, rows))
                last = len(values) - 1
                try:
                    found = [_gradient(value, points, keep=place < last) for place, value in enumerate(values)]
                except RuntimeError as error:
                    if last < 1 or "donated buffer" not in str(error):
                        raise
                    # a compiled backward pass frees what it works on: a forward pass for each function
                    found = []
                    for place in range(len(values)):
                        points = images.detach().requires_grad_()
                        found.append(_gradient(list(functions(self._ask(model, points), rows))[place], points))
            all_values.append([value.detach() for value in values])
            all_gradients.append(found)
            all_logits.append(logits.detach())
        return (
            [torch.stack(of).mean(0) if len(of) > 1 else of[0] for of in zip(*all_values, strict=True)],
            [
                self._masked(sum(of[1:], of[0]) / len(of) if len(of) > 1 else of[0], rows)
                for of in zip(*all_gradients, strict=True)
            ],
            _expected(all_logits),
        )

    def _masked(self, gradient: Tensor, rows: Tensor) -> Tensor:
        if self.mask is None:
            return gradient
        return gradient * (self.mask if len(self.mask) == 1 else self.mask[rows])


def _gradient(values: Tensor, images: Tensor, keep: bool = False) -> Tensor:
    # sum and not mean: each image's gradient is its own, and fp16 keeps more of its sign;
    # autograd.grad and not backward: no parameter's .grad and no hook of a distributed wrapper is touched
    found = None
    if values.requires_grad:
        found = torch.autograd.grad(values.sum(), images, allow_unused=True, retain_graph=keep)[0]
    return check_gradient(found)


def _expected(logits: Sequence[Tensor]) -> Tensor:
    """The logarithm of the mean probabilities, or the logits themselves where there is one draw."""
    if len(logits) == 1:
        return logits[0]
    return torch.stack([each.log_softmax(1) for each in logits]).logsumexp(0) - math.log(len(logits))

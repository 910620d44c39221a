"""The contract of an attack: :class:`Attack`, what it works on (:class:`Problem`) and gives (:class:`AttackResult`)."""

from __future__ import annotations

import dataclasses
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_robust.attacks.context import Model, attacking
from lightning_robust.attacks.projection import norms
from lightning_robust.attacks.randomness import image_keys, mix_seed
from lightning_robust.attacks.threat_model import ThreatModel
from lightning_robust.errors import UserError

Progress = Callable[[int, int], None]
"""Told (steps done, steps in all) as an attack goes on."""


@dataclass(frozen=True)
class AttackResult:
    """What an attack found, image by image.

    Attributes:
        images: adversarial images ``(N, C, H, W)`` in [0, 1]; the clean image where nothing was to be done.
        success: ``(N,)`` bool: the model is fooled (untargeted: not the label; targeted: the target).
        iterations: ``(N,)`` int64: iterations until success, or all that were made.
        queries: ``(N,)`` int64: points at which the model was asked about the image until success, or all of them.
        norms: size of the perturbation, ``{"linf": (N,), "l2": (N,), "l1": (N,), "l0": (N,)}`` in pixel units; of "l0"
            the number of pixels of which any channel changed.
        success_8bit: ``(N,)`` bool: still fooled after the image was rounded to 8 bits, as a saved file is.
        clean_gradient: ``(N, C, H, W)`` gradient of each image's own loss at the clean image, where the attack
            computed it on its way; else ``None``.
    """

    images: Tensor
    success: Tensor
    iterations: Tensor
    queries: Tensor
    norms: dict[str, Tensor]
    success_8bit: Tensor
    clean_gradient: Tensor | None = None


@dataclass
class Outcome:
    """What :meth:`Attack.perturb` gives back; ``success`` is ``None`` where the attack did not need to know it."""

    images: Tensor
    iterations: Tensor
    queries: Tensor
    success: Tensor | None = None
    clean_gradient: Tensor | None = None


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
        elif _holds_nan(logits):  # whose argmax is some class, which would count as fooled
            count = int(logits.isnan().any(1).sum())
            raise UserError(
                f"the model gave NaN for {count} of {len(images)} attacked images: its weights are broken, or it "
                "cannot take what an image in [0, 1] may hold",
                non_finite=True,
            )
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
    if found is None:
        raise UserError(
            "the model's output does not depend on its input through differentiable operations: a gradient "
            "attack cannot see through it; use a black-box attack or give the model a differentiable stand-in"
        )
    if _holds_nan(found):  # whose sign is 0: an image that stays where it is would seem robust
        count = int(found.flatten(1).isnan().any(1).sum())
        raise UserError(
            f"the model's gradient is NaN at {count} of {len(found)} attacked images: no step can be made along it",
            non_finite=True,
        )
    return found


def _holds_nan(values: Tensor) -> bool:
    # of the sum first, which costs a tenth of a look at each value
    return math.isnan(float(values.detach().sum())) and bool(values.isnan().any())


def _expected(logits: Sequence[Tensor]) -> Tensor:
    """The logarithm of the mean probabilities, or the logits themselves where there is one draw."""
    if len(logits) == 1:
        return logits[0]
    return torch.stack([each.log_softmax(1) for each in logits]).logsumexp(0) - math.log(len(logits))


class Attack(ABC):
    """Something that perturbs a batch so that a model errs.

    Concrete attacks are frozen dataclasses: their fields are their settings, they can be compared, printed and written
    to a config. They hold no state: an attack is a function of model, images, labels and seed.

    The promise (kept by this class and by :func:`~lightning_robust.attacks.context.attacking`): the result lies in
    the ε-ball (to 1e-6) and in [0, 1]; pixels outside ``mask`` are untouched; the mode of every submodule,
    ``requires_grad`` and ``.grad`` of every parameter and the global random state are as before; labels of any integer
    type are taken; autocast, inference mode, a distributed wrapper and a compiled model are fine; random numbers
    depend on image and seed only, not on the batch or the device count.
    """

    seed: int
    # no annotation: it is no setting, and jsonargparse cannot read the types of a dataclass with a ClassVar
    wants_logits = True

    @property
    @abstractmethod
    def threat_model(self) -> ThreatModel:
        """Norm and budget that the result keeps to."""

    def to_the_end(self) -> Attack:
        """The same attack, which does not stop at success where it could be told not to."""
        if any(setting.name == "stop_at_success" for setting in dataclasses.fields(self)):  # type: ignore[arg-type]
            return self.replace(stop_at_success=False)
        return self

    @abstractmethod
    def perturb(self, problem: Problem) -> Outcome:
        """Do the work on a checked problem; called by :meth:`run`."""

    def __call__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Adversarial images; the arguments are those of :meth:`run`."""
        with attacking(model) as lent:
            problem = self._problem(lent, images, labels, targets, mask, seed)
            return _finite(self.perturb(problem).images)

    def run(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        seed: int | None = None,
        clean_logits: Tensor | None = None,
        progress: Progress | None = None,
        rounding: bool = True,
        stand_in: Model | None = None,
    ) -> AttackResult:
        """Attack a batch and say how it went.

        Args:
            model: from images ``(N, C, H, W)`` in [0, 1] to logits ``(N, K)``.
            images: clean images in [0, 1], float.
            labels: ``(N,)`` true classes, any integer type.
            targets: ``(N,)`` classes to reach: makes the attack targeted.
            mask: 1 (or True) where pixels may change: ``(H, W)``, ``(1, H, W)``, ``(N, H, W)`` or ``(N, 1|C, H, W)``.
            seed: takes the place of the attack's own seed, for another random start of the same images.
            clean_logits: the model's logits of ``images``, if they are known, which saves a pass.
            progress: told (steps done, steps in all).
            rounding: also check success after rounding to 8 bits (one forward pass more); else ``success_8bit`` is
                all False.
            stand_in: a faster model of (nearly) the same function, from
                :func:`~lightning_robust.attacks.acceleration.accelerate`. The search runs on it; every success is
                confirmed on ``model``, and images that fooled only the stand-in are attacked again on ``model``. An
                image on which the search fails is not searched again.

        Raises:
            UserError: for images outside [0, 1] or not finite, labels or targets out of range, a mask of another size.
        """
        with attacking(model) as lent:
            problem = self._problem(lent, images, labels, targets, mask, seed)
            problem.clean_logits, problem.progress = clean_logits, progress
            outcome = self.perturb(problem) if stand_in is None else self._perturb_by(stand_in, problem)
            _finite(outcome.images)
            success = outcome.success
            with torch.no_grad():
                if success is None:
                    success = problem.fooled(problem.logits(outcome.images))
                rounded = torch.zeros_like(success)
                if rounding and success.any():
                    rows = success.nonzero()[:, 0]
                    rounded[rows] = problem.fooled(problem.logits((outcome.images[rows] * 255).round() / 255), rows)
        delta = outcome.images - problem.images
        return AttackResult(
            images=outcome.images,
            success=success,
            iterations=outcome.iterations,
            queries=outcome.queries,
            norms={norm: norms(delta, norm) for norm in ("linf", "l2", "l1", "l0")},
            success_8bit=rounded,
            clean_gradient=outcome.clean_gradient,
        )

    def _perturb_by(self, stand_in: Model, problem: Problem) -> Outcome:
        """Search on ``stand_in``, confirm on the model, and search again on the model where the two disagree."""
        queries = 1  # the confirmation
        if getattr(self, "stop_at_success", False) and problem.clean_logits is None:
            # which images are misclassified to begin with is for the model to say
            with torch.no_grad():
                problem.clean_logits = problem.logits(problem.images)
            queries += 1
        with attacking(stand_in) as lent:
            outcome = self.perturb(dataclasses.replace(problem, model=lent, _checked=False))
        outcome.clean_gradient = None  # it is the stand-in's, not the model's
        outcome.queries += queries
        with torch.no_grad():
            success = problem.fooled(problem.logits(outcome.images))
        if outcome.success is not None:
            rows = (outcome.success & ~success).nonzero()[:, 0]
            if len(rows):
                again = self.perturb(problem.subset(rows))
                outcome.images[rows] = again.images
                outcome.iterations[rows] += again.iterations
                outcome.queries[rows] += again.queries
                if again.success is None:
                    with torch.no_grad():
                        again.success = problem.fooled(problem.logits(again.images), rows)
                success[rows] = again.success
        outcome.success = success
        return outcome

    def replace(self, **changes: Any) -> Attack:
        """A copy with other settings."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def _problem(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        mask: Tensor | None,
        seed: int | None,
    ) -> Problem:
        check_images(images)
        self.threat_model.check_images(images)
        images = images.detach().clone()  # a tensor made in inference mode cannot be differentiated; its copy can
        labels = _classes(labels, len(images), "labels", images.device)
        if targets is not None:
            targets = _classes(targets, len(images), "targets", images.device)
            check_targets(targets, labels)
        return Problem(
            model=model,
            images=images,
            labels=labels,
            targets=targets,
            mask=None if mask is None else expand_mask(mask, images),
            keys=image_keys(images, mix_seed(self.seed if seed is None else seed)),
            wants_logits=self.wants_logits,
        )


def check_images(images: Tensor) -> None:
    """Refuse what is not a batch of pixel images.

    Raises:
        UserError: for another shape or type than float ``(N, C, H, W)``, NaN, and values outside [0, 1].
    """
    if images.dim() != 4 or not images.is_floating_point() or 0 in images.shape:
        raise UserError(
            f"images of shape {tuple(images.shape)} and type {images.dtype}: an attack needs a non-empty float batch "
            "(N, C, H, W) in [0, 1]"
        )
    if images.dtype in (torch.float16, torch.bfloat16):
        raise UserError(
            f"images of type {images.dtype}: half precision cannot hold a budget such as 8/255; give float32 images, "
            "and let the model run in half precision under autocast (trainer.precision=bf16-mixed and not bf16-true) "
            "or with accelerate(model, dtype=torch.bfloat16)"
        )
    low, high = (float(value) for value in torch.aminmax(images.detach()))
    if not (low >= 0 and high <= 1):  # written so that NaN is caught
        if low != low or high != high:
            raise UserError("images hold NaN: check the data and the transforms before the attack", non_finite=True)
        raise UserError(
            f"images reach from {low:.3g} to {high:.3g}, outside [0, 1]: attacks and ε live in pixel space; give raw "
            "pixels and put the normalisation (mean and std) inside the model"
        )


def _finite(images: Tensor) -> Tensor:
    if not bool(torch.isfinite(images).all()):
        raise UserError(
            "the model's gradient is NaN or infinite at an attacked image: no step can be made along it",
            non_finite=True,
        )
    return images


def check_logits(logits: Tensor, images: Tensor, labels: Tensor, targets: Tensor | None) -> None:
    """Refuse logits of another shape, NaN, and labels or targets that the model has no class for.

    Raises:
        UserError: naming what is wrong.
    """
    if not isinstance(logits, Tensor):
        raise UserError(f"the model gave a {type(logits).__name__}: an attack needs its logits alone, (N, classes)")
    if logits.dim() != 2 or len(logits) != len(images):
        raise UserError(f"the model gave shape {tuple(logits.shape)} for {len(images)} images: logits are (N, classes)")
    if torch.isnan(logits.detach()).any():
        raise UserError(
            "the model gave NaN for a clean or random start image: its weights or its input are broken",
            non_finite=True,
        )
    for name, classes in (("labels", labels), ("targets", targets)):
        if classes is not None and int(classes.max()) >= logits.shape[1]:
            raise UserError(
                f"{name} go up to {int(classes.max())} but the model has {logits.shape[1]} classes (0 to "
                f"{logits.shape[1] - 1})"
            )


def warn_of_probabilities(logits: Tensor) -> None:
    """Warn, as AutoAttack does, of a model that ends in a softmax: its saturated gradients flatter it."""
    values = logits.detach()
    if values.shape[1] > 1 and bool((values >= 0).all()) and bool(((values.sum(1) - 1).abs() < 1e-3).all()):
        warnings.warn(
            "the model's outputs look like probabilities, and attacks need logits: gradients through a saturated "
            "softmax vanish, and the model seems more robust than it is; take the softmax off its end",
            stacklevel=2,
        )


def _classes(values: Tensor, count: int, name: str, device: torch.device) -> Tensor:
    if values.shape != (count,) or values.is_floating_point() or values.dtype == torch.bool:
        raise UserError(
            f"{name} of shape {tuple(values.shape)} and type {values.dtype}: an attack needs one integer an image, "
            f"here ({count},)"
        )
    values = values.detach().to(device=device, dtype=torch.int64, copy=True)
    if int(values.min()) < 0:
        raise UserError(f"{name} hold {int(values.min())}: classes are numbered from 0")
    return values


def check_targets(targets: Tensor, labels: Tensor) -> None:
    """Refuse targets that are the labels: they would count as reached at no cost.

    Raises:
        UserError: naming the images.
    """
    same = (targets == labels).nonzero()[:, 0].tolist()
    if same:
        named = ", ".join(str(row) for row in same[:5]) + (", …" if len(same) > 5 else "")
        raise UserError(f"the targets of the images {named} are their labels: choose other classes")


def expand_mask(mask: Tensor, images: Tensor) -> Tensor:
    """Bring a mask to ``(1 or N, 1 or C, H, W)`` in the images' type.

    Raises:
        UserError: if it has another height or width, another number of images, or values other than 0 and 1.
    """
    count, channels, height, width = images.shape
    given = tuple(mask.shape)
    if mask.dim() == 2:
        mask = mask[None, None]
    elif mask.dim() == 3:
        mask = mask[:, None]
    fits = (
        mask.dim() == 4
        and mask.shape[0] in (1, count)
        and mask.shape[1] in (1, channels)
        and mask.shape[2:] == (height, width)
    )
    if not fits:
        raise UserError(
            f"a mask of shape {given} does not fit images of shape {tuple(images.shape)}: give (H, W), (N, H, W) or "
            "(N, 1 or C, H, W)"
        )
    mask = mask.detach().to(device=images.device, dtype=images.dtype)
    if not ((mask == 0) | (mask == 1)).all():
        raise UserError("a mask holds 1 (may change) and 0 (may not), nothing between")
    return mask

"""The contract of an attack: :class:`Attack`, and what it gives (:class:`AttackResult`)."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_robust.attacks.checks import check_classes, check_finite, check_images, check_targets, expand_mask
from lightning_robust.attacks.context import Model, attacking
from lightning_robust.attacks.problem import Problem, Progress
from lightning_robust.attacks.projection import norms
from lightning_robust.attacks.randomness import image_keys, mix_seed
from lightning_robust.attacks.threat_model import ThreatModel

__all__ = ["Attack", "AttackResult", "Outcome", "Problem", "Progress", "check_images", "expand_mask"]


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
            return check_finite(self.perturb(problem).images)

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
            check_finite(outcome.images)
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
        labels = check_classes(labels, len(images), "labels", images.device)
        if targets is not None:
            targets = check_classes(targets, len(images), "targets", images.device)
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

"""The contract of an objective: *how* a classifier is trained, as pure torch."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.attacks import Attack, ThreatModel, attacking, parse_number
from lightning_robust.attacks.context import Model
from lightning_robust.errors import UserError
from lightning_robust.objectives.awp import AWP


@dataclass
class ObjectiveOutput:
    """What a training step needs.

    Attributes:
        loss: scalar, mean over the batch; call ``backward`` on it.
        logits: ``(N, K)``, detached: of the images that training accuracy is reported on, the adversarial ones where
            there are any.
        images_adv: ``(N, C, H, W)`` adversarial images in [0, 1].
        clean_logits: ``(N, K)``, detached, in training mode, where the clean images went through the network.
        clean_gradient: ``(N, C, H, W)``: each image's own ∂CE/∂x at the clean image in eval mode, where the attack
            computed it anyway (on the stand-in, if it ran on one).
        restore: to be called right after the backward pass where it is not ``None``: puts the weights back that
            adversarial weight perturbation has shifted.
    """

    loss: Tensor
    logits: Tensor
    images_adv: Tensor | None = None
    clean_logits: Tensor | None = None
    clean_gradient: Tensor | None = None
    restore: Callable[[], None] | None = None


@dataclass
class Perturbed:
    """What :meth:`Objective.perturb` found.

    Attributes:
        images: ``(N, C, H, W)`` adversarial images, or ``None`` for an objective without an attack.
        clean_gradient: see :class:`ObjectiveOutput`.
    """

    images: Tensor | None = None
    clean_gradient: Tensor | None = None


class Objective(ABC):
    """How a classifier is trained: from a batch to the loss to minimise.

    Concrete objectives are frozen dataclasses: their fields are their settings, of types that the command line and a
    checkpoint can hold. They keep no state; the attack runs in eval mode with the promise of
    :class:`~lightning_robust.attacks.Attack` (BatchNorm statistics, gradients and the random state stay), and the loss
    runs the network in the mode that it is in.

    A training step by hand::

        output = objective(model, images, labels, seed=step)
        output.loss.backward()
        if output.restore is not None:
            output.restore()
        optimizer.step()

    Attributes:
        awp: adversarial weight perturbation, or ``None``.
    """

    awp: AWP | None

    @property
    def attack(self) -> Attack | None:
        """The attack whose images are trained on, or ``None``."""
        return None

    @property
    def threat_model(self) -> ThreatModel | None:
        """What the attack may do, or ``None``."""
        return None if self.attack is None else self.attack.threat_model

    def with_budget(self, share: float) -> Objective:
        """The same objective with ε and step size of its attack times a share, for a warm-up of the budget.

        Args:
            share: in (0, 1].

        Raises:
            UserError: for a share outside (0, 1].
        """
        if not 0 < share <= 1:
            raise UserError(f"{type(self).__name__}: a budget times {share}: give a share in (0, 1]")
        if self.attack is None:
            return self
        # either the attack is a setting, or its ε and step are settings of the objective
        owner = self.attack if _has(self, "attack") else self
        changes = {"eps": self.attack.threat_model.radius * share}
        step = getattr(owner, "step_size", None)
        if step is not None:
            changes["step_size"] = parse_number(step, "step_size") * share
        scaled: Any = dataclasses.replace(owner, **changes)  # type: ignore[type-var]
        return scaled if owner is self else dataclasses.replace(self, attack=scaled)  # type: ignore[type-var]

    def perturb(
        self, model: Model, images: Tensor, labels: Tensor, *, seed: int, mask: Tensor | None = None
    ) -> Perturbed:
        """Adversarial images of a batch.

        Args:
            model: from images to logits; may be a faster stand-in (:func:`lightning_robust.attacks.accelerate`).
            images: ``(N, C, H, W)`` in [0, 1].
            labels: ``(N,)`` classes.
            seed: of the random start, another one for each step; takes the place of the attack's own.
            mask: where pixels may change, see :meth:`lightning_robust.attacks.Attack.run`.

        Raises:
            UserError: for a batch that cannot be attacked.
        """
        attack = self.attack
        if attack is None:
            return Perturbed()
        with attacking(model) as lent:
            # not run(): its confirmation of success would be one more pass that training has no use for
            outcome = attack.perturb(attack._problem(lent, images, labels, None, mask, seed))
        # Another loss has another gradient, and a mask cuts it.
        own = mask is None and getattr(attack, "loss", None) == "ce"
        return Perturbed(outcome.images.detach(), outcome.clean_gradient if own else None)

    @abstractmethod
    def loss(self, model: Model, images: Tensor, labels: Tensor, perturbed: Perturbed) -> ObjectiveOutput:
        """The loss, by forward passes in the model's present mode.

        Args:
            model: the network that is trained.
            images: ``(N, C, H, W)`` clean images in [0, 1].
            labels: ``(N,)`` int64.
            perturbed: from :meth:`perturb`.
        """

    def __call__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        seed: int,
        mask: Tensor | None = None,
        stand_in: Model | None = None,
        epoch: int = 0,
    ) -> ObjectiveOutput:
        """Perturb the images, shift the weights where AWP asks for it, and compute the loss.

        Args:
            model: the network that is trained, in train mode.
            images: ``(N, C, H, W)`` in [0, 1].
            labels: ``(N,)`` classes.
            seed: of the attack's random start, another one for each step.
            mask: where pixels may change.
            stand_in: a faster model of (nearly) the same function for the attack to run on; default ``model``.
            epoch: from 0, for AWP's warm-up.

        Returns:
            The output; call its ``restore`` after the backward pass if it is not ``None``. Under ``no_grad`` weights
            are not shifted.
        """
        perturbed = self.perturb(model if stand_in is None else stand_in, images, labels, seed=seed, mask=mask)
        restore = None
        if self.awp is not None and self.awp.active(epoch) and torch.is_grad_enabled():

            def loss_of(network: nn.Module) -> Tensor:
                return self.loss(network, images, labels, perturbed).loss

            restore = self.awp.perturb_weights(model, loss_of)
        try:
            output = self.loss(model, images, labels, perturbed)
        except BaseException:
            if restore is not None:
                restore()
            raise
        output.restore = restore
        return output


def _has(settings: object, name: str) -> bool:
    return any(field.name == name for field in dataclasses.fields(settings))  # type: ignore[arg-type]


def adversarial_images(perturbed: Perturbed) -> Tensor:
    """The adversarial images that a loss needs.

    Raises:
        UserError: if there are none.
    """
    if perturbed.images is None:
        raise UserError("this objective trains on adversarial images: call the objective itself, or perturb() first")
    return perturbed.images


def check_share(owner: object, name: str, value: float) -> None:
    """Refuse a setting that is no share in [0, 1).

    Raises:
        UserError: naming it.
    """
    if not 0 <= value < 1:
        raise UserError(f"{type(owner).__name__}: {name}={value} is a share: 0 or more and less than 1")


def check_weight(owner: object, name: str, value: float) -> None:
    """Refuse a weight of a loss term that is not a finite number of 0 or more.

    Raises:
        UserError: naming it.
    """
    if not 0 <= value < float("inf"):
        raise UserError(f"{type(owner).__name__}: {name}={value} weighs a term of the loss: give 0 or more")

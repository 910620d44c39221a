"""The contract of a defense: :class:`Defense`, a classifier behind something that is done to its input at test time.

Every defense in this package is published, and every one of them is broken by an attacker who knows it. They are here
to be measured: as they are (:meth:`Defense.forward`), and against the attacker that :meth:`Defense.draws` serves
(:class:`~lightning_robust.attacks.EOT`).
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from lightning_robust.attacks.context import unwrap
from lightning_robust.attacks.randomness import image_keys, mix_seed
from lightning_robust.errors import UserError


class Defense(nn.Module):
    """A classifier and what protects it.

    Calling it is exactly what the defense does at test time, and the argmax of the logits is its verdict. The logits
    always carry a gradient for an attacker who asks: the exact one of a differentiable operation, else that of a
    stand-in (:class:`~lightning_robust.attacks.BPDA`).

    With a ``seed``, what is drawn for an image depends on that image and the seed alone: a verdict is the same in any
    batch and on any number of devices. With ``seed=None`` each call draws anew from torch's generator, as a deployed
    defense does. Note what a seed means for an attack that goes on until the defense errs: it may find an image whose
    own draw is an unlucky one. Judge such images with another seed (:meth:`with_seed`).

    Subclasses give :meth:`decide` and :meth:`single`, and add their settings to the constructor.

    Args:
        model: images ``(N, C, H, W)`` in [0, 1] to logits ``(N, K)``; a distributed wrapper is taken off. Without one,
            the defense is settings only, for :meth:`around`.
        seed: of the draws; ``None`` for fresh ones.

    Raises:
        UserError: for a model that is no module, or a seed that is no integer.
    """

    random: bool = True  # no setting: whether calling it draws
    model: nn.Module | None

    def __init__(self, model: nn.Module | None = None, *, seed: int | None = 0) -> None:
        super().__init__()
        self.register_module("model", None if model is None else self._network(model))
        self.seed = self._checked(seed)

    @abstractmethod
    def decide(self, images: Tensor, keys: Tensor) -> Tensor:
        """The verdict.

        Args:
            images: ``(N, C, H, W)``, checked.
            keys: ``(N,)`` of :mod:`lightning_robust.attacks.randomness`, to draw with.

        Returns:
            logits ``(N, K)``.
        """

    @abstractmethod
    def single(self, images: Tensor, keys: Tensor) -> Tensor:
        """The classifier's logits ``(N, K)`` behind one draw, differentiable; arguments as of :meth:`decide`."""

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` in [0, 1] to the defended logits ``(N, K)``.

        Raises:
            UserError: without a model, and for images that are no float32 or float64 batch in [0, 1].
        """
        self.protected()
        self._check(images)
        return self.decide(images, self.keys(images))

    def draws(self, samples: int) -> Sequence[nn.Module]:
        """What an adaptive attacker averages over: differentiable models from images to logits, one a draw.

        They are draws of the same kind as that of :meth:`forward` but other ones: the attacker knows the defense and
        not how its dice will fall.

        Args:
            samples: how many at most; a defense with fewer outcomes gives all of them.
        """
        self.protected()
        if samples < 1:
            raise UserError(f"{type(self).__name__}: draws({samples}): an average needs one draw or more")
        return [Draw(self, number) for number in range(samples)]

    def around(self, model: nn.Module) -> Self:
        """A copy with the same settings that protects ``model``, which is not copied.

        Raises:
            UserError: if ``model`` is no module.
        """
        return self._copied(self._network(model))

    def with_seed(self, seed: int | None) -> Self:
        """A copy around the same model that draws with another seed."""
        copied = self._copied(self.model)
        copied.seed = self._checked(seed)
        return copied

    def protected(self) -> nn.Module:
        """The model inside.

        Raises:
            UserError: if there is none.
        """
        if self.model is None:
            name = type(self).__name__
            raise UserError(
                f"{name} has no classifier to protect: give one, as {name}(model), or take {name}(…).around(model)"
            )
        return self.model

    def keys(self, images: Tensor, draw: int = 0) -> Tensor:
        """Keys ``(N,)`` to draw with: of each image and the seed, or fresh ones.

        Args:
            images: ``(N, C, H, W)``.
            draw: number of the draw; 0 is the verdict's own.
        """
        if self.seed is None:
            return torch.randint(-(2**63), 2**63 - 1, (len(images),), device=images.device)
        return image_keys(images, mix_seed(self.seed, draw))

    def _copied(self, model: nn.Module | None) -> Self:
        # the model stands for itself in the copy
        copied = copy.deepcopy(self, {} if self.model is None else {id(self.model): self.model})
        copied.model = model
        return copied

    def _network(self, model: nn.Module) -> nn.Module:
        # in a distributed wrapper each call is a collective, and ranks may call differently often
        network = unwrap(model)
        if not isinstance(network, nn.Module):
            raise UserError(
                f"{type(self).__name__}: a {type(model).__name__} is no model that it could protect: give an nn.Module "
                "from images (N, C, H, W) in [0, 1] to logits (N, K)"
            )
        return network

    def _checked(self, seed: int | None) -> int | None:
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise UserError(f"{type(self).__name__}: seed={seed!r}: give an integer, or None to draw anew at each call")
        return seed

    def _check(self, images: Tensor) -> None:
        name = type(self).__name__
        # a tracer's proxy is refused as well: what is drawn must not end up as a constant of a graph
        if not isinstance(images, Tensor) or images.dim() != 4 or 0 in images.shape:
            shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise UserError(f"{name}: images of shape {shape}: give a non-empty batch (N, C, H, W)")
        if images.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"{name}: images of type {images.dtype}: what a defense draws depends on the exact pixels, so give "
                "float32; for speed let the model inside run in lower precision, under autocast or as "
                ".around(accelerate(model, dtype=torch.bfloat16))"
            )
        low, high = (float(value) for value in torch.aminmax(images.detach()))
        if not (low >= -1e-6 and high <= 1 + 1e-6):  # written so that NaN is caught
            raise UserError(
                f"{name}: images reach from {low:.3g} to {high:.3g}, outside [0, 1]: give raw pixels and put the "
                "normalisation (mean and std) inside the model",
                non_finite=low != low or high != high,
            )


class Draw(nn.Module):
    """A defense with its dice thrown.

    Args:
        defense: the defense.
        number: of the draw, from 0.
    """

    def __init__(self, defense: Defense, number: int) -> None:
        super().__init__()
        self.defense, self.number = defense, number

    def forward(self, images: Tensor) -> Tensor:
        """``(N, C, H, W)`` to logits ``(N, K)`` behind this one draw."""
        return self.defense.single(images, self.defense.keys(images, self.number + 1))


def positive_integer(owner: object, name: str, value: int, least: int = 1) -> int:
    """A whole number of at least ``least``.

    Raises:
        UserError: for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{type(owner).__name__}: {name}={value!r}: give a whole number, {least} or more")
    return value


def asks_for_gradient(images: Tensor) -> bool:
    """Whether someone will go back through a function of these images."""
    return torch.is_grad_enabled() and images.requires_grad


def integers(uniforms: Tensor, count: Tensor | int) -> Tensor:
    """Uniform numbers in [0, 1), as float64, to uniform whole numbers 0 to ``count`` - 1."""
    return (uniforms * count).long()  # in float64 the product stays below count

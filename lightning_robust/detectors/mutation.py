"""What a mutation operator is: the common side of image and model mutation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn


class Trial(ABC):
    """One batch under mutation; images leave it as they are decided.

    Attributes:
        predicted: ``(N,)`` int64, the classes f(x) without mutation, of all images of the batch.
    """

    predicted: Tensor

    @abstractmethod
    def changed(self, first: int, count: int) -> Tensor:
        """``(n, count)`` bool: whether mutants ``first``, ``first`` + 1, … change the label, of the n images left."""

    @abstractmethod
    def keep(self, going: Tensor) -> None:
        """Go on with those of the n images left for which ``going`` ``(n,)`` is true."""

    @abstractmethod
    def batch(self, done: int) -> int:
        """How many mutants are best asked for at a time, when so many are done."""


class Bench(ABC):
    """A model and the mutants to be drawn for it, ready for any number of batches."""

    @abstractmethod
    def most_images(self, image: Tensor) -> int:
        """How many images like ``image`` ``(1, C, H, W)`` are best tried at a time."""

    @abstractmethod
    def trial(self, images: Tensor) -> Trial:
        """Put a batch ``(N, C, H, W)`` of images in [0, 1] under mutation."""


class Mutation(ABC):
    """A mutation operator with its settings: what makes mutants, of images or of a model.

    Concrete ones are frozen dataclasses of plain values, so that a detector can be saved and loaded without running
    code from a file.
    """

    seed: int

    @property
    @abstractmethod
    def of(self) -> Literal["images", "model"]:
        """What is mutated."""

    @property
    @abstractmethod
    def title(self) -> str:
        """The operator's name for tables and figures."""

    @abstractmethod
    def bench(self, model: nn.Module, chosen: Sequence[int], chunk: int) -> Bench:
        """Get ready for a model.

        Args:
            model: images to logits, in eval mode.
            chosen: the numbers of the mutants, in the order in which they are drawn.
            chunk: points that go through the model at a time, about.
        """

    @abstractmethod
    def differentiable(self, model: nn.Module, chosen: Sequence[int]) -> list[Callable[[Tensor], Tensor]]:
        """Models ``images -> logits`` with the gradient of the images, one for each of the mutants ``chosen``."""

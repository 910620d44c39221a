"""Two parts of a network that learn in turn: one rests, in eval mode, while the other one is trained."""

from __future__ import annotations

from torch import nn


class Turns:
    """Which part of a network rests.

    Names are kept and not modules: a module held here by the one that is trained would be saved twice.

    Args:
        parts: names of the submodules, the one first that learns first.
        epochs: of a turn.
    """

    def __init__(self, parts: tuple[str, str], epochs: int) -> None:
        self.parts, self.epochs = parts, epochs
        self._resting: str | None = None
        self._asleep: list[nn.Module] = []

    def begin(self, network: nn.Module, epoch: int) -> None:
        """Put the part into eval mode whose turn it is not in an epoch, and wake the other one.

        Args:
            network: which has the parts.
            epoch: from 0.
        """
        resting = self.parts[1 - epoch // self.epochs % 2]
        if resting == self._resting:
            return
        self.wake()
        # as they are found: a layer that somebody keeps in eval mode is not woken later
        self._asleep = [module for module in network.get_submodule(resting).modules() if module.training]
        self._resting = resting
        for module in self._asleep:
            module.training = False

    def wake(self) -> None:
        """Both learn, or nobody does."""
        for module in self._asleep:
            module.training = True
        self._resting, self._asleep = None, []

    def drop_gradients(self, network: nn.Module) -> None:
        """Take the gradients from the part that rests.

        Its parameters ask for them all the same: DDP waits for all that asked when it was made.
        """
        if self._resting is not None:
            for parameter in network.get_submodule(self._resting).parameters():
                parameter.grad = None

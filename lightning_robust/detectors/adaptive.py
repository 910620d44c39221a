"""What an attacker who knows the detector attacks: the model and its mutants together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from lightning_robust.attacks.context import unwrap
from lightning_robust.detectors.detector import MutationTestingDetector


class Mutants(nn.Module):
    """A model as :class:`~lightning_robust.attacks.EOT` attacks it so that the detector stays quiet.

    Called, it is the model. Its ``draws`` are the model and mutants of it, or mutants of the image: an attack that
    averages its loss over them looks for an image whose wrong label withstands the mutations. The attacker knows the
    detector: of model mutants these are the very first that it will use; mutants of an image depend on its pixels and
    are new at each step.

    Args:
        model: images in [0, 1] to logits.
        detector: calibrated for it.

    Raises:
        UserError: for a detector of another model.
    """

    def __init__(self, model: nn.Module, detector: MutationTestingDetector) -> None:
        super().__init__()
        detector.require(model)
        self.model, self.detector = model, detector
        self._made: list[Callable[[Tensor], Tensor]] = []

    def forward(self, images: Tensor) -> Tensor:
        """The model's logits."""
        return self.model(images)

    def draws(self, samples: int) -> Sequence[Callable[[Tensor], Tensor]]:
        """The model and ``samples`` - 1 of its mutants; the same ones each time."""
        chosen = self.detector.calibrated.chosen[: samples - 1]
        if len(self._made) != len(chosen):
            inner = unwrap(self.model)
            assert isinstance(inner, nn.Module)
            self._made = self.detector.mutation.differentiable(inner, chosen)
        return [self.model, *self._made]

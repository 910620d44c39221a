"""What an evaluation that ended early had counted already."""

from __future__ import annotations

import math
from typing import Any, cast

import pytorch_lightning as pl
from torch import Tensor

from lightning_robust.callbacks.adversarial_accuracy import AdversarialAccuracy
from lightning_robust.callbacks.robustness_curve import RobustnessCurve


class _Recorder:
    """A module as far as a callback that publishes needs it, which can log outside of Lightning's loops."""

    def __init__(self, module: pl.LightningModule) -> None:
        self._module = module
        self.logged: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def log(self, name: str, value: Tensor | float, **_: Any) -> None:
        """Keep a number, unless it was computed of no image."""
        if math.isfinite(float(value)):
            self.logged[name] = float(value)


def partial_results(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
    """Publish what was counted of an evaluation's first images: hours of attacks, perhaps.

    Numbers, tables and figures are those of a whole evaluation, named ``test_partial`` (``val_partial``) in place of
    ``test``. The tables per class say of how many images they are: an attack that ran when the evaluation ended has
    seen a batch less than those before it.

    Args:
        trainer: the one whose evaluation ended.
        module: what it evaluated.

    Returns:
        The numbers by name; none in a ``fit``, and none on several devices, where the ranks, each at another place,
        could not sum up what they have counted.
    """
    if trainer.state.fn not in ("test", "validate") or trainer.world_size > 1:
        return {}
    recorder = _Recorder(module)
    stage = "test_partial" if trainer.state.fn == "test" else "val_partial"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, AdversarialAccuracy | RobustnessCurve) or not callback._running:
            continue
        if isinstance(callback, AdversarialAccuracy):
            # an attack that no batch has been through has nothing to say
            callback._metrics = {name: metric for name, metric in callback._metrics.items() if metric.update_called}
        # and a curve is whole or none
        if callback._metrics and all(metric.update_called for metric in callback._metrics.values()):
            callback.publish(trainer, cast(pl.LightningModule, recorder), stage)
    return recorder.logged

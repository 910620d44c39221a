"""Predictions that may refuse an image."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_robust.batch import as_batch
from lightning_robust.detectors import REJECTED, MutationTestingDetector
from lightning_robust.errors import UserError


class DetectAdversarial(pl.Callback):
    """In ``predict``, shows every image to a detector: the predictions say which images it refuses.

    Beside what the module's ``predict_step`` gives, each batch has ``verdict`` (the class, or -1 for an image that is
    refused), ``kappa`` (share of the mutants that changed the label) and ``mutants`` (how many the decision took).
    :class:`~lightning_robust.callbacks.PredictionWriter` writes them, too.

    Args:
        detector: file of a detector that was calibrated for this model: ``<run>/detectors/<name>.pt`` of
            :class:`~lightning_robust.callbacks.MutationDetection`, or of its ``save``.
    """

    def __init__(self, detector: str) -> None:
        self.detector = detector
        self._loaded: MutationTestingDetector | None = None

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the detector, and refuse one of another model.

        Raises:
            UserError: for a file that cannot be read, and for another model.
        """
        self._loaded = MutationTestingDetector.load(self.detector, pl_module)

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the columns to what ``predict_step`` gave."""
        assert self._loaded is not None
        if not isinstance(outputs, dict):
            raise UserError(
                f"DetectAdversarial adds to a dictionary, and {type(pl_module).__name__}.predict_step gives a "
                f"{type(outputs).__name__}: let it give one, or use DetectingClassifier in it"
            )
        with torch.autocast(pl_module.device.type, enabled=False):
            found = self._loaded.decide(pl_module, as_batch(batch).images.to(pl_module.dtype))
        verdict: Tensor = torch.where(found.adversarial, REJECTED, found.predicted)
        outputs |= {"verdict": verdict, "kappa": found.kappa, "mutants": found.mutants}

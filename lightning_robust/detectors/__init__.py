"""Detectors: is this image adversarial? Pure torch; usable with any ``nn.Module`` from images in [0, 1] to logits."""

from lightning_robust.detectors.adaptive import Mutants
from lightning_robust.detectors.calibration import Calibration
from lightning_robust.detectors.detector import Decision, MutationTestingDetector
from lightning_robust.detectors.fingerprint import fingerprint
from lightning_robust.detectors.image_mutation import ImageMutation
from lightning_robust.detectors.model_mutation import ModelMutation
from lightning_robust.detectors.mutation import Mutation
from lightning_robust.detectors.sprt import SequentialState, SequentialTest
from lightning_robust.detectors.wrapper import REJECTED, DetectingClassifier, Verdict

__all__ = [
    "REJECTED",
    "Calibration",
    "Decision",
    "DetectingClassifier",
    "ImageMutation",
    "ModelMutation",
    "Mutants",
    "Mutation",
    "MutationTestingDetector",
    "SequentialState",
    "SequentialTest",
    "Verdict",
    "fingerprint",
]

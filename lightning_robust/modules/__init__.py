"""LightningModules: what is trained."""

from lightning_robust.modules.classifier import ImageClassifier
from lightning_robust.modules.distilled import DistilledClassifier
from lightning_robust.modules.foreground import ForegroundClassifier
from lightning_robust.modules.foreground_settings import SegmenterSettings
from lightning_robust.modules.optimization import OptimizerSettings, ScheduleSettings
from lightning_robust.modules.prm import PRMClassifier
from lightning_robust.modules.prm_settings import PRMSettings

__all__ = [
    "DistilledClassifier",
    "ForegroundClassifier",
    "ImageClassifier",
    "OptimizerSettings",
    "PRMClassifier",
    "PRMSettings",
    "ScheduleSettings",
    "SegmenterSettings",
]

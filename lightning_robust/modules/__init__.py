"""LightningModules: what is trained."""

from lightning_robust.modules.classifier import ImageClassifier
from lightning_robust.modules.optimization import OptimizerSettings, ScheduleSettings

__all__ = ["ImageClassifier", "OptimizerSettings", "ScheduleSettings"]

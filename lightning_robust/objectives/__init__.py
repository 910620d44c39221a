"""Objectives: how a classifier is trained, as pure torch."""

from lightning_robust.objectives.adversarial import PGDAdversarial
from lightning_robust.objectives.awp import AWP
from lightning_robust.objectives.base import Objective, ObjectiveOutput, Perturbed
from lightning_robust.objectives.config import from_config, to_config
from lightning_robust.objectives.distillation import Distillation, DistillationObjective, SoftLabels
from lightning_robust.objectives.distillation_robust import ARD, RSLAD
from lightning_robust.objectives.fast import CatastrophicOverfitting, FastFGSM
from lightning_robust.objectives.mart import MART
from lightning_robust.objectives.natural import Natural
from lightning_robust.objectives.trades import TRADES

__all__ = [
    "ARD",
    "AWP",
    "MART",
    "RSLAD",
    "TRADES",
    "CatastrophicOverfitting",
    "Distillation",
    "DistillationObjective",
    "FastFGSM",
    "Natural",
    "Objective",
    "ObjectiveOutput",
    "PGDAdversarial",
    "Perturbed",
    "SoftLabels",
    "from_config",
    "to_config",
]

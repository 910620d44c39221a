"""Attacks on whole batches: plain functions of model, images and labels, usable with any ``nn.Module``."""

from lightning_robust.attacks.acceleration import accelerate
from lightning_robust.attacks.adaptive import BPDA, EOT, Randomized, Temperature, Transfer
from lightning_robust.attacks.apgd import APGD
from lightning_robust.attacks.autoattack import AutoAttack, AutoAttackResult
from lightning_robust.attacks.base import Attack, AttackResult, Outcome
from lightning_robust.attacks.context import attacking
from lightning_robust.attacks.cw import CW
from lightning_robust.attacks.deepfool import DeepFool
from lightning_robust.attacks.evolution_state import EvolutionState
from lightning_robust.attacks.external import External
from lightning_robust.attacks.fab import FAB
from lightning_robust.attacks.fgsm import FGSM
from lightning_robust.attacks.jsma import JSMA
from lightning_robust.attacks.kl_pgd import KLPGD, NormalStartPGD
from lightning_robust.attacks.minimal_norm import MinimalNormAttack
from lightning_robust.attacks.one_pixel import OnePixel
from lightning_robust.attacks.optmargin import OptMargin
from lightning_robust.attacks.pgd import PGD
from lightning_robust.attacks.pixel_goal import PixelRuns
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.random_noise import RandomNoise
from lightning_robust.attacks.square import Square
from lightning_robust.attacks.threat_model import ThreatModel, parse_number

__all__ = [
    "APGD",
    "BPDA",
    "CW",
    "EOT",
    "FAB",
    "FGSM",
    "JSMA",
    "KLPGD",
    "PGD",
    "Attack",
    "AttackResult",
    "AutoAttack",
    "AutoAttackResult",
    "DeepFool",
    "EvolutionState",
    "External",
    "MinimalNormAttack",
    "NormalStartPGD",
    "OnePixel",
    "OptMargin",
    "Outcome",
    "PixelRuns",
    "Problem",
    "RandomNoise",
    "Randomized",
    "Square",
    "Temperature",
    "ThreatModel",
    "Transfer",
    "accelerate",
    "attacking",
    "parse_number",
]

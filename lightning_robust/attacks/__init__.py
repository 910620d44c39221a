"""Attacks on whole batches: plain functions of model, images and labels, usable with any ``nn.Module``."""

from lightning_robust.attacks.acceleration import accelerate
from lightning_robust.attacks.adaptive import BPDA, EOT, Randomized, Temperature, Transfer
from lightning_robust.attacks.apgd import APGD
from lightning_robust.attacks.base import Attack, AttackResult, Outcome, Problem
from lightning_robust.attacks.context import attacking
from lightning_robust.attacks.external import External
from lightning_robust.attacks.fgsm import FGSM
from lightning_robust.attacks.kl_pgd import KLPGD, NormalStartPGD
from lightning_robust.attacks.pgd import PGD
from lightning_robust.attacks.threat_model import ThreatModel, parse_number

__all__ = [
    "APGD",
    "BPDA",
    "EOT",
    "FGSM",
    "KLPGD",
    "PGD",
    "Attack",
    "AttackResult",
    "External",
    "NormalStartPGD",
    "Outcome",
    "Problem",
    "Randomized",
    "Temperature",
    "ThreatModel",
    "Transfer",
    "accelerate",
    "attacking",
    "parse_number",
]

"""Published defenses that change a classifier's input at test time, to be measured: all of them are broken."""

from lightning_robust.defenses.base import Defense
from lightning_robust.defenses.binarization import Binarization
from lightning_robust.defenses.neutralizer import Neutralizer, attack_neutralized
from lightning_robust.defenses.pixel_deflection import PixelDeflection
from lightning_robust.defenses.pixel_shift import PixelShift
from lightning_robust.defenses.randomization import Randomization
from lightning_robust.defenses.region_based import RegionBased
from lightning_robust.defenses.region_radius import RadiusSearch, find_radius

__all__ = [
    "Binarization",
    "Defense",
    "Neutralizer",
    "PixelDeflection",
    "PixelShift",
    "RadiusSearch",
    "Randomization",
    "RegionBased",
    "attack_neutralized",
    "find_radius",
]

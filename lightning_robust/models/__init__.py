"""Classifiers by name, with normalisation inside and weights read safely, and the Pixel Robustness Manipulator.

Pure torch: nothing here imports Lightning, and every model is an ``nn.Module`` from pixels in [0,1] to logits.
"""

from lightning_robust.models.factory import create_network, list_networks
from lightning_robust.models.foreground import ForegroundNetwork, compose, grow_masks
from lightning_robust.models.manipulated import ManipulatedNetwork
from lightning_robust.models.mask_attack import MaskAttack
from lightning_robust.models.normalization import Normalization, Normalized, normalization_of
from lightning_robust.models.prm import PixelRobustnessManipulator
from lightning_robust.models.prm_pattern import SparsePattern
from lightning_robust.models.registry import register_network
from lightning_robust.models.segmentation import create_segmenter
from lightning_robust.models.weights import load_weights, read_state_dict, require_fit

__all__ = [
    "ForegroundNetwork",
    "ManipulatedNetwork",
    "MaskAttack",
    "Normalization",
    "Normalized",
    "PixelRobustnessManipulator",
    "SparsePattern",
    "compose",
    "create_network",
    "create_segmenter",
    "grow_masks",
    "list_networks",
    "load_weights",
    "normalization_of",
    "read_state_dict",
    "register_network",
    "require_fit",
]

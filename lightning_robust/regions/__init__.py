"""Where a model looks and where an attacker writes (Chattopadhyay et al., arXiv 2011.10794): maps, regions, blobs.

Pure functions of images and a model::

    activation = ActivationMap().resolved(model, images)
    roi = Threshold("otsu").region(importance(model, images, labels, activation))
    roa = Threshold("relative", 0.5).region(pixel_change(images, FGSM(eps=0.1)(model, images, labels)))
    regions = isolate(roi, roa)  # (N, H, W), one of the four Region numbers a pixel
"""

from lightning_robust.regions.activation import ActivationMap, feature_maps, importance
from lightning_robust.regions.blobs import Blobs, blob, load_blobs, neutralize, save_blobs
from lightning_robust.regions.colocation import Components, MoranTest, components, morans_i, morans_i_test
from lightning_robust.regions.isolation import REGION_NAMES, Region, isolate, region_shares
from lightning_robust.regions.maps import pixel_change, unit_scale
from lightning_robust.regions.thresholds import Threshold, check_region

__all__ = [
    "REGION_NAMES",
    "ActivationMap",
    "Blobs",
    "Components",
    "MoranTest",
    "Region",
    "Threshold",
    "blob",
    "check_region",
    "components",
    "feature_maps",
    "importance",
    "isolate",
    "load_blobs",
    "morans_i",
    "morans_i_test",
    "neutralize",
    "pixel_change",
    "region_shares",
    "save_blobs",
    "unit_scale",
]

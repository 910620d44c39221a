"""What is counted: torchmetrics whose states are sums, so that ranks and batch sizes cannot change a number."""

from lightning_robust.metrics.classification import ClassificationScore
from lightning_robust.metrics.functional import input_gradient, pixel_gradient
from lightning_robust.metrics.gradient_map import InputGradient, InputGradientMaps
from lightning_robust.metrics.intervals import wilson_interval
from lightning_robust.metrics.one_pixel import (
    AllTargetsScores,
    AllTargetsSuccess,
    NonTargetedScores,
    NonTargetedSuccess,
)
from lightning_robust.metrics.pixel_iou import PixelIoU
from lightning_robust.metrics.pixels import intersection_over_union, load_mask, stride_pattern, top_pixels
from lightning_robust.metrics.robust_accuracy import RobustAccuracy

__all__ = [
    "AllTargetsScores",
    "AllTargetsSuccess",
    "ClassificationScore",
    "InputGradient",
    "InputGradientMaps",
    "NonTargetedScores",
    "NonTargetedSuccess",
    "PixelIoU",
    "RobustAccuracy",
    "input_gradient",
    "intersection_over_union",
    "load_mask",
    "pixel_gradient",
    "stride_pattern",
    "top_pixels",
    "wilson_interval",
]

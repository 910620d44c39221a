"""What is counted: torchmetrics whose states are sums, so that ranks and batch sizes cannot change a number."""

from lightning_robust.metrics.cell_accuracy import CellAccuracy
from lightning_robust.metrics.classification import ClassificationScore
from lightning_robust.metrics.defense import defense_rate, falls
from lightning_robust.metrics.detection import DetectionScores, KindScores, SystemAccuracy, SystemScores
from lightning_robust.metrics.feature_robustness import FeatureRobustness, FeatureRobustnessScores
from lightning_robust.metrics.foreground import ForegroundGradient, ForegroundGradientScores
from lightning_robust.metrics.functional import input_gradient, pixel_gradient
from lightning_robust.metrics.gradient_amplitude import (
    GradientAmplitude,
    GradientAmplitudes,
    softmax_jacobian_amplitude,
)
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
from lightning_robust.metrics.regions import MapMeans, MapMeanScores, RegionCounts, RegionFrequencies
from lightning_robust.metrics.regions_similarity import GroupMeans, GroupMeanScores, RegionSimilarity, map_similarity
from lightning_robust.metrics.robust_accuracy import RobustAccuracy
from lightning_robust.metrics.size_statistics import SizeScores, SizeStatistics

__all__ = [
    "AllTargetsScores",
    "AllTargetsSuccess",
    "CellAccuracy",
    "ClassificationScore",
    "DetectionScores",
    "FeatureRobustness",
    "FeatureRobustnessScores",
    "ForegroundGradient",
    "ForegroundGradientScores",
    "GradientAmplitude",
    "GradientAmplitudes",
    "GroupMeanScores",
    "GroupMeans",
    "InputGradient",
    "InputGradientMaps",
    "KindScores",
    "MapMeanScores",
    "MapMeans",
    "NonTargetedScores",
    "NonTargetedSuccess",
    "PixelIoU",
    "RegionCounts",
    "RegionFrequencies",
    "RegionSimilarity",
    "RobustAccuracy",
    "SizeScores",
    "SizeStatistics",
    "SystemAccuracy",
    "SystemScores",
    "defense_rate",
    "falls",
    "input_gradient",
    "intersection_over_union",
    "load_mask",
    "map_similarity",
    "pixel_gradient",
    "softmax_jacobian_amplitude",
    "stride_pattern",
    "top_pixels",
    "wilson_interval",
]

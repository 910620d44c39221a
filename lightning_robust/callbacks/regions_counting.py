"""What RegionMaps counts of one attack, batch by batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_robust.callbacks.regions_report import Example, Measured
from lightning_robust.metrics.regions import MapMeans, MapMeanScores, RegionCounts
from lightning_robust.metrics.regions_similarity import GroupMeans, RegionSimilarity
from lightning_robust.regions import Threshold, components, isolate, morans_i, unit_scale

_STATISTICS = (
    "flat_importance",
    "moran_importance",
    "moran_change",
    "moran_cross",
    "components_importance",
    "components_change",
)


@dataclass
class Counted:
    """Metrics over G directions, and the first images of each.

    Attributes:
        change: mean maps of how far pixels are moved.
        regions: counts of the four regions.
        similarity: SSIM of each image's two maps.
        statistics: name to means over images.
        examples: direction to images, for the figure.
    """

    change: MapMeans
    regions: RegionCounts
    similarity: RegionSimilarity
    statistics: dict[str, GroupMeans]
    examples: dict[int, list[Example]] = field(default_factory=dict)

    @classmethod
    def of(cls, groups: int, size: tuple[int, int], device: torch.device) -> Counted:
        """Fresh counts."""
        return cls(
            MapMeans(groups, size).to(device),
            RegionCounts(groups, size).to(device),
            RegionSimilarity(groups).to(device),
            {what: GroupMeans(groups).to(device) for what in _STATISTICS},
        )

    def count(
        self,
        images: Tensor,
        importance: Tensor,
        roi: Tensor,
        change: Tensor,
        threshold: Threshold,
        groups: Tensor,
        *,
        keep: int,
    ) -> None:
        """Count a batch.

        Args:
            images: ``(N, C, H, W)``.
            importance: ``(N, H, W)`` in [0, 1].
            roi: ``(N, H, W)`` bool, region of importance.
            change: ``(N, H, W)`` pixel units.
            threshold: δ₂, of the change.
            groups: ``(N,)`` direction of each image.
            keep: how many images of each direction the figure gets.
        """
        roa = threshold.region(change)
        regions = isolate(roi, roa)
        self.change.update(change, groups)
        self.regions.update(regions, groups)
        self.similarity.update(importance, unit_scale(change), groups)
        found = {
            "flat_importance": (importance.amax((1, 2)) == 0).double(),
            "moran_importance": morans_i(importance),
            "moran_change": morans_i(change),
            "moran_cross": morans_i(importance, change),
            "components_importance": components(roi).count.double(),
            "components_change": components(roa).count.double(),
        }
        for statistic, values in found.items():
            self.statistics[statistic].update(values, groups)
        if keep:
            for group in groups.unique().tolist():
                kept = self.examples.setdefault(group, [])
                for row in (groups == group).nonzero()[: keep - len(kept), 0].tolist():
                    kept.append(Example(*(values[row].cpu() for values in (images, importance, change, regions))))

    def measured(self, importance: MapMeanScores) -> Measured:
        """Over all images of all ranks."""
        return Measured(
            importance=importance.mean.cpu(),
            images=importance.images.cpu(),
            change=self.change.compute().mean.cpu(),
            frequencies=self.regions.compute(),
            similarity=self.similarity.compute(),
            statistics={what: metric.compute() for what, metric in self.statistics.items()},
        )

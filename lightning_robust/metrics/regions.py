"""Class representatives of regions (arXiv 2011.10794): mean maps and counts of regions, summed class by class."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_robust.errors import UserError
from lightning_robust.metrics.checks import check_image_size
from lightning_robust.regions import Region, isolate

# Not NamedTuples, as elsewhere: torchmetrics would make scalars of the tensors of a single group.


class MapMeanScores:
    """What :class:`MapMeans` computes.

    Attributes:
        mean: ``(K, H, W)`` float64, mean map of each group; NaN of one without images.
        images: ``(K,)`` int64.
    """

    def __init__(self, mean: Tensor, images: Tensor) -> None:
        self.mean, self.images = mean, images


class MapMeans(Metric):
    """The pixel-wise mean of maps, group by group (a class, or a source and target class).

    Sums are in float64: the same to 1e-10 on any number of ranks and with any batch size; its memory does not grow
    with the number of images.

    Args:
        groups: number of groups K.
        image_size: (height, width).

    Raises:
        UserError: for fewer than one group, another size; from ``update`` for maps and groups that do not fit.

    Example:
        >>> means = MapMeans(groups=2, image_size=(1, 2))
        >>> means.update(torch.tensor([[[0.0, 1.0]], [[1.0, 1.0]]]), torch.tensor([0, 0]))
        >>> means.compute().mean[0]
        tensor([[0.5000, 1.0000]], dtype=torch.float64)
    """

    full_state_update = False
    is_differentiable = False
    total: Tensor
    images: Tensor

    def __init__(self, groups: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.groups, self.image_size = _checked_groups(groups, "MapMeans"), check_image_size(image_size, "MapMeans")
        self.add_state("total", torch.zeros(groups, *self.image_size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros(groups, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, maps: Tensor, groups: Tensor) -> None:
        """Count a batch.

        Args:
            maps: ``(N, H, W)`` finite real values.
            groups: ``(N,)`` integers, the group of each image; -1 for one that belongs to none.
        """
        rows, maps = _members(maps, groups, self.groups, self.image_size, "MapMeans")
        if not torch.isfinite(maps).all():
            raise UserError("MapMeans: a map holds NaN or infinity: its mean would too")
        rows, maps = rows.to(self.total.device), maps.detach().double().to(self.total.device)
        # not in place: a state that was reset in inference mode may not be changed in place outside of it
        self.total = self.total.index_add(0, rows, maps)
        self.images = self.images + torch.bincount(rows, minlength=self.groups)

    def compute(self) -> MapMeanScores:
        """Means over all images counted, on every rank the same."""
        return MapMeanScores(self.total / self.images[:, None, None], self.images)


class RegionFrequencies:
    """What :class:`RegionCounts` computes.

    Attributes:
        frequency: ``(K, 4, H, W)`` float64: in what share of a group's images a pixel lies in each
            :class:`~lightning_robust.regions.Region`; NaN of a group without images.
        images: ``(K,)`` int64.
    """

    def __init__(self, frequency: Tensor, images: Tensor) -> None:
        self.frequency, self.images = frequency, images

    @property
    def shares(self) -> Tensor:
        """``(K, 4)`` float64, the mean share of the pixels in each region."""
        return self.frequency.mean((-2, -1))

    @property
    def importance(self) -> Tensor:
        """``(K, H, W)`` float64, share of the images in whose region of importance a pixel lies."""
        return self.frequency[:, Region.UV] + self.frequency[:, Region.U_ONLY]

    @property
    def attack(self) -> Tensor:
        """``(K, H, W)`` float64, share of the images in whose region of attack a pixel lies."""
        return self.frequency[:, Region.UV] + self.frequency[:, Region.V_ONLY]

    @property
    def union(self) -> Tensor:
        """``(K, H, W)`` int64: the regions of the unions of all images' regions of importance and of attack."""
        return isolate(self.importance > 0, self.attack > 0)


class RegionCounts(Metric):
    """How often each pixel lies in each of the four regions, group by group; integer counts, exact on any ranks.

    Args:
        groups: number of groups K.
        image_size: (height, width).

    Raises:
        UserError: as :class:`MapMeans`, and for values that are no :class:`~lightning_robust.regions.Region`.

    Example:
        >>> counts = RegionCounts(groups=1, image_size=(1, 2))
        >>> counts.update(torch.tensor([[[0, 2]], [[3, 2]]]), torch.tensor([0, 0]))
        >>> counts.compute().frequency[0, 2]
        tensor([[0., 1.]], dtype=torch.float64)
    """

    full_state_update = False
    is_differentiable = False
    counts: Tensor
    images: Tensor

    def __init__(self, groups: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.groups = _checked_groups(groups, "RegionCounts")
        self.image_size = check_image_size(image_size, "RegionCounts")
        shape = (groups, len(Region), *self.image_size)
        self.add_state("counts", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros(groups, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, regions: Tensor, groups: Tensor) -> None:
        """Count a batch.

        Args:
            regions: ``(N, H, W)`` int64 of :func:`~lightning_robust.regions.isolate`.
            groups: ``(N,)`` integers; -1 for an image that belongs to none.
        """
        rows, regions = _members(regions, groups, self.groups, self.image_size, "RegionCounts")
        if regions.is_floating_point() or bool(((regions < 0) | (regions >= len(Region))).any()):
            raise UserError("RegionCounts: regions are integers from 0 to 3, as isolate gives them")
        rows, regions = rows.to(self.counts.device), regions.to(self.counts.device)
        each = torch.stack([regions == region for region in Region], dim=1).long()
        self.counts = self.counts.index_add(0, rows, each)
        self.images = self.images + torch.bincount(rows, minlength=self.groups)

    def compute(self) -> RegionFrequencies:
        """Frequencies over all images counted, on every rank the same."""
        return RegionFrequencies(self.counts.double() / self.images[:, None, None, None], self.images)


def _checked_groups(groups: int, what: str) -> int:
    if groups < 1:
        raise UserError(f"{what}: groups={groups}: at least one group is needed")
    return groups


def _members(maps: Tensor, groups: Tensor, count: int, size: tuple[int, int], what: str) -> tuple[Tensor, Tensor]:
    """The images that belong to a group: their groups and maps."""
    if maps.dim() != 3 or tuple(maps.shape[1:]) != size:
        raise UserError(f"{what} was made for maps of {size[0]}×{size[1]} pixels and got shape {tuple(maps.shape)}")
    if groups.shape != maps.shape[:1] or groups.is_floating_point() or groups.dtype == torch.bool:
        raise UserError(
            f"{what}: groups of shape {tuple(groups.shape)} and type {groups.dtype}: one integer an image is needed, "
            f"here ({len(maps)},)"
        )
    if len(groups) and not bool(((groups >= -1) & (groups < count)).all()):
        raise UserError(f"{what}: groups are 0 to {count - 1}, or -1 for an image that belongs to none")
    inside = groups >= 0
    return groups[inside].long(), maps[inside.to(maps.device)]

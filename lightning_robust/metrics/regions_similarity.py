"""How alike maps are (SSIM), and means of one number an image, class by class."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import structural_similarity_index_measure

from lightning_robust.errors import UserError

_KERNEL = 11  # pixels, of a Gaussian of σ = 1.5 (Wang et al. 2004)
_AT_ONCE = 2**15  # pixels: a convolution in float64 unfolds each into its window, which takes 5 kB


def map_similarity(first: Tensor, second: Tensor) -> Tensor:
    """SSIM of pairs of maps (Wang et al., IEEE TIP 13, 2004), by torchmetrics, with a data range of 1.

    Args:
        first: ``(N, H, W)`` in [0, 1].
        second: ``(N, H, W)`` in [0, 1].

    Returns:
        ``(N,)`` float64. Maps below 11 pixels get a narrower window.

    Raises:
        UserError: for other shapes, and maps below 3 pixels.

    Example:
        >>> maps = torch.rand(2, 16, 16)
        >>> map_similarity(maps, maps).tolist()
        [1.0, 1.0]
    """
    if first.dim() != 3 or first.shape != second.shape:
        raise UserError(f"maps of shape {tuple(first.shape)} and {tuple(second.shape)}: both are (N, H, W)")
    side = min(first.shape[1:])
    if side < 3:
        raise UserError(f"SSIM compares neighbourhoods: maps of {side} pixels have none")
    if not len(first):
        return first.new_zeros(0, dtype=torch.float64)
    reach = min(_KERNEL, side - 1 + side % 2) // 2
    sigma = 1.5 if reach == _KERNEL // 2 else (reach - 0.4) / 3.5  # torchmetrics' window reaches int(3.5 σ + 0.5)
    few = max(1, _AT_ONCE // first[0].numel())
    return torch.cat([_similarity(*part, sigma) for part in zip(first.split(few), second.split(few), strict=True)])


def _similarity(first: Tensor, second: Tensor, sigma: float) -> Tensor:
    found = structural_similarity_index_measure(
        first.detach().double()[:, None],
        second.detach().double()[:, None],
        sigma=sigma,
        reduction="none",
        data_range=1.0,
    )
    assert isinstance(found, Tensor)
    return found.double().reshape(len(first))


class GroupMeanScores:
    """What :class:`GroupMeans` computes.

    Attributes:
        mean: ``(K,)`` float64; NaN of a group without values.
        error: ``(K,)`` float64, standard error of the mean; NaN of a group with fewer than two values.
        count: ``(K,)`` int64.
    """

    # no NamedTuple: torchmetrics would make scalars of the tensors of a single group
    def __init__(self, mean: Tensor, error: Tensor, count: Tensor) -> None:
        self.mean, self.error, self.count = mean, error, count

    def interval(self, group: int, z: float = 1.959964) -> tuple[float, float]:
        """The normal 95 % interval of a group's mean."""
        mean, half = float(self.mean[group]), z * float(self.error[group])
        return mean - half, mean + half


class GroupMeans(Metric):
    """Means and standard errors of one number an image, group by group; sums in float64.

    NaN values (of an image whose map is flat) are left out.

    Args:
        groups: number of groups K.

    Raises:
        UserError: for fewer than one group; from ``update`` for values and groups that do not fit.

    Example:
        >>> means = GroupMeans(2)
        >>> means.update(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, -1]))
        >>> means.compute().mean.tolist()
        [2.0, nan]
    """

    full_state_update = False
    is_differentiable = False
    total: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self, groups: int) -> None:
        super().__init__()
        if groups < 1:
            raise UserError(f"{type(self).__name__}: groups={groups}: at least one group is needed")
        self.groups = groups
        for name in ("total", "squares"):
            self.add_state(name, torch.zeros(groups, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(groups, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, values: Tensor, groups: Tensor) -> None:
        """Count a batch.

        Args:
            values: ``(N,)``.
            groups: ``(N,)`` integers, the group of each image; -1 for one that belongs to none.
        """
        if values.dim() != 1 or groups.shape != values.shape or groups.is_floating_point():
            raise UserError(
                f"{type(self).__name__}: values of shape {tuple(values.shape)} and groups of shape "
                f"{tuple(groups.shape)}: one of each an image is needed"
            )
        values, groups = values.detach().double().to(self.total.device), groups.long().to(self.total.device)
        kept = (groups >= 0) & ~values.isnan()
        values, groups = values[kept], groups[kept]
        self.total = self.total.index_add(0, groups, values)
        self.squares = self.squares.index_add(0, groups, values.square())
        self.count = self.count + torch.bincount(groups, minlength=self.groups)

    def compute(self) -> GroupMeanScores:
        """Over all values counted, on every rank the same."""
        mean = self.total / self.count
        spread = (self.squares - self.count * mean.square()).clamp_min(0) / (self.count - 1)
        error = torch.where(self.count > 1, (spread / self.count).sqrt(), float("nan"))
        return GroupMeanScores(mean, error, self.count)


class RegionSimilarity(GroupMeans):
    """Mean SSIM of two maps of each image, group by group: of importance and change, the paper's "mean of samples".

    Args:
        groups: number of groups K.
    """

    def update(self, first: Tensor, second: Tensor, groups: Tensor) -> None:  # type: ignore[override]
        """Count a batch.

        Args:
            first: ``(N, H, W)`` in [0, 1].
            second: ``(N, H, W)`` in [0, 1].
            groups: ``(N,)`` integers; -1 for an image that belongs to none.
        """
        super().update(map_similarity(first, second), groups)

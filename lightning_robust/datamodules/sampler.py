"""Samplers that are exact on any number of devices, and the training loader that resumes where it stopped.

PyTorch's own ``DistributedSampler`` repeats images so that every rank gets as many: 13 images on 2 ranks are counted as
14. The two samplers here repeat nothing. They subclass it, because Lightning replaces any other sampler in a
distributed run, whatever ``use_distributed_sampler`` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from lightning_robust.errors import UserError


class UnpaddedSampler(DistributedSampler[Any]):
    """For evaluation: rank r takes images r, r + world, r + 2·world, …: each image on exactly one rank.

    Args:
        dataset: What is sampled from; its length matters.
        num_replicas: Number of ranks (the world size).
        rank: Number of this rank.

    Raises:
        UserError: If there are fewer images than ranks: a rank without a batch would let the others wait for ever.

    Example:
        >>> list(UnpaddedSampler(range(5), num_replicas=2, rank=0)), list(UnpaddedSampler(range(5), 2, 1))
        ([0, 2, 4], [1, 3])
    """

    def __init__(self, dataset: Dataset[Any] | Sized, num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)  # type: ignore[arg-type]
        total = len(dataset)  # type: ignore[arg-type]
        if total < num_replicas:
            raise UserError(
                f"{total} images cannot be shared out to {num_replicas} devices: evaluate on fewer devices "
                "(--trainer.devices) or raise --data.limit."
            )
        self.total_size = total
        self.num_samples = len(range(rank, total, num_replicas))

    def __iter__(self) -> Iterator[int]:
        """Yield this rank's image numbers in ascending order."""
        return iter(range(self.rank, self.total_size, self.num_replicas))


class EpochSampler(DistributedSampler[Any]):
    """For training: the order is a pure function of (seed, epoch), the same on any number of ranks.

    The k-th batches of all ranks together are the k-th batch of one process. Nothing is padded; the last, incomplete
    batch of an epoch is left out. Only a set smaller than one batch gives an incomplete batch: one, of the largest size
    that all ranks can share equally.

    It yields pairs ``(epoch, index)``, so that a data set in a worker process can key its augmentation to the epoch
    although the workers outlive it.

    Args:
        dataset: What is sampled from; its length matters.
        batch_size: Images per batch **over all ranks together**; a multiple of ``num_replicas``.
        seed: Seed of the order, at least 0.
        num_replicas: Number of ranks (the world size).
        rank: Number of this rank.

    Raises:
        UserError: If there are fewer images than ranks, or ``batch_size`` is not a multiple of the ranks.

    Example:
        >>> one = [index for _, index in EpochSampler(range(7), batch_size=4)]
        >>> two = [[index for _, index in EpochSampler(range(7), 4, num_replicas=2, rank=r)] for r in (0, 1)]
        >>> len(one), sorted(one) == sorted(two[0] + two[1])
        (4, True)
    """

    def __init__(
        self,
        dataset: Dataset[Any] | Sized,
        batch_size: int,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed)  # type: ignore[arg-type]
        self.images = len(dataset)  # type: ignore[arg-type]
        self.local_batch_size = share_of_batch(batch_size, num_replicas)
        if self.images < num_replicas:
            raise UserError(
                f"{self.images} training images cannot be shared out to {num_replicas} devices: train on fewer "
                "devices (--trainer.devices) or raise --data.limit."
            )
        unit = batch_size if self.images >= batch_size else num_replicas
        self.total_size = self.images // unit * unit
        self.num_samples = self.total_size // num_replicas
        self.start_batch = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield this rank's (epoch, image number) from ``start_batch`` on."""
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.images)[: self.total_size]
        mine = order[self.rank :: self.num_replicas][self.start_batch * self.local_batch_size :]
        epoch = self.epoch
        return ((epoch, index) for index in mine.tolist())


def share_of_batch(batch_size: int, world_size: int) -> int:
    """Divide a batch over the devices.

    Args:
        batch_size: Images per batch over all devices together.
        world_size: Number of devices.

    Returns:
        Images per batch of one device.

    Raises:
        UserError: If the batch cannot be divided equally.
    """
    if batch_size % world_size:
        lower = batch_size // world_size * world_size
        raise UserError(
            f"batch_size={batch_size} is the batch over all devices together and cannot be divided over {world_size} "
            f"devices: choose a multiple, such as {lower or world_size} or {lower + world_size}."
        )
    return batch_size // world_size


class EpochLoader(DataLoader[Any]):
    """The training loader: starts an epoch at the first batch asked for, and resumes inside an epoch.

    Lightning makes the iterator of a resumed run before it tells the sampler the epoch; with worker processes the
    first batches would then come from another epoch's order. Here the iterator is made when the first batch is asked
    for. ``state_dict`` and ``load_state_dict`` are the interface that Lightning calls for a checkpoint inside an epoch:
    the batches already trained on are passed over without being read.
    """

    _delivered: int = 0
    _resume: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches of the sampler's current epoch."""
        self._delivered = 0
        # Lightning's overfit_batches puts a sequential sampler here: such an epoch always starts at its beginning.
        if isinstance(self.sampler, EpochSampler):
            if self._resume is not None and self._resume[0] == self.sampler.epoch:
                self._delivered = self._resume[1]
            self.sampler.start_batch = self._delivered
        self._resume = None
        for batch in super().__iter__():
            self._delivered += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of its batches that were delivered."""
        return {"epoch": int(getattr(self.sampler, "epoch", 0)), "batches": self._delivered}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration go on where the state was taken, if it is of the same epoch."""
        self._resume = (state["epoch"], state["batches"])

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from lightning_robust.datamodules import EpochLoader, EpochSampler, UnpaddedSampler
from lightning_robust.datamodules.sampler import share_of_batch
from lightning_robust.errors import UserError

worlds = st.integers(1, 3)


def batches(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


@given(st.integers(3, 50), worlds)
def test_evaluation_counts_each_image_once(total: int, world: int) -> None:
    samplers = [UnpaddedSampler(range(total), world, rank) for rank in range(world)]
    assert sorted(index for sampler in samplers for index in sampler) == list(range(total))
    for rank, sampler in enumerate(samplers):
        assert list(sampler) == list(range(rank, total, world))
        assert len(sampler) == len(list(sampler))


def test_evaluation_needs_an_image_a_rank() -> None:
    with pytest.raises(UserError, match="2 images cannot be shared out to 3 devices"):
        UnpaddedSampler(range(2), 3, 0)


@given(st.integers(3, 60), worlds, st.integers(1, 4), st.integers(0, 5), st.integers(0, 5))
def test_ranks_together_see_the_batches_of_one_process(
    total: int, world: int, share: int, seed: int, epoch: int
) -> None:
    size = share * world
    ranks = [EpochSampler(range(total), size, seed, world, rank) for rank in range(world)]
    alone = EpochSampler(range(total), size, seed)
    for sampler in (alone, *ranks):
        sampler.set_epoch(epoch)
        assert len(sampler) == len(list(sampler))
    whole = [index for _, index in alone]
    parts = [batches([index for _, index in sampler], share) for sampler in ranks]
    together = [sorted(index for part in parts for index in part[k]) for k in range(len(parts[0]))]
    if total >= size:
        assert len(whole) == total // size * size
        assert together == [sorted(batch) for batch in batches(whole, size)]
    else:
        # One batch of the largest size that all ranks can share equally.
        assert len(together) == 1
        assert len(together[0]) == total // world * world
        assert set(together[0]) <= set(whole) == set(range(total))
    assert len(set(whole)) == len(whole)
    assert {e for e, _ in alone} == {epoch}


def test_order_depends_on_seed_and_epoch_and_not_on_their_sum() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        sampler = EpochSampler(range(50), 10, seed)
        sampler.set_epoch(epoch)
        return tuple(index for _, index in sampler)

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    assert order(2, 1) == order(2, 1)


def test_order_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    list(EpochSampler(range(50), 10))
    assert torch.equal(before, torch.get_rng_state())


def test_lightning_keeps_these_samplers() -> None:
    # Lightning replaces whatever is not a DistributedSampler, in a distributed run.
    assert issubclass(EpochSampler, DistributedSampler)
    assert issubclass(UnpaddedSampler, DistributedSampler)


@pytest.mark.parametrize(("size", "world"), [(5, 2), (1, 3)])
def test_a_batch_that_does_not_divide_is_an_error(size: int, world: int) -> None:
    with pytest.raises(UserError, match=f"batch_size={size} .* cannot be divided over {world} devices"):
        share_of_batch(size, world)


def test_training_needs_an_image_a_rank() -> None:
    with pytest.raises(UserError, match="2 training images"):
        EpochSampler(range(2), 6, num_replicas=3)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_goes_on_inside_an_epoch(workers: int) -> None:
    def loader() -> EpochLoader:
        sampler = EpochSampler(range(20), 4, seed=1)
        sampler.set_epoch(2)
        settings = {"num_workers": workers, "persistent_workers": workers > 0, "collate_fn": list}
        return EpochLoader(_Echo(), batch_size=4, sampler=sampler, **settings)

    whole = list(loader())
    stopped = loader()
    iterator = iter(stopped)
    first = [next(iterator) for _ in range(2)]
    state = stopped.state_dict()
    assert state == {"epoch": 2, "batches": 2}
    resumed = loader()
    resumed.load_state_dict(state)
    assert len(resumed) == 5
    assert first + list(resumed) == whole
    assert resumed.state_dict() == {"epoch": 2, "batches": 5}
    assert list(resumed) == whole


def test_loader_begins_another_epoch_at_its_beginning() -> None:
    sampler = EpochSampler(range(20), 4)
    loader = EpochLoader(_Echo(), batch_size=4, sampler=sampler, collate_fn=list)
    loader.load_state_dict({"epoch": 0, "batches": 5})
    sampler.set_epoch(1)
    assert len(list(loader)) == 5


def test_loader_takes_the_epoch_when_the_first_batch_is_asked_for() -> None:
    sampler = EpochSampler(range(8), 4)
    loader = EpochLoader(
        _Echo(), batch_size=4, sampler=sampler, num_workers=1, persistent_workers=True, collate_fn=list
    )
    iterator = iter(loader)
    sampler.set_epoch(3)
    assert {epoch for batch in iterator for epoch, _ in batch} == {3}


class _Echo(torch.utils.data.Dataset):
    def __getitem__(self, key: tuple[int, int]) -> tuple[int, int]:
        return key

    def __len__(self) -> int:
        return 20

"""The keyed random numbers: their distribution, and that they depend on image and seed alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lightning_robust.attacks.randomness import ball, image_keys, mix_seed, normal, uniform

SHAPE = (3, 16, 16)


def keys_of(count: int, seed: int = 0) -> torch.Tensor:
    return image_keys(torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(1)), seed)


def is_plausible(p_value: float) -> bool:
    """The draws are fixed by their keys, so a test passes always or never; one in a million would fail by chance."""
    return p_value > 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_is_uniform(dtype: torch.dtype) -> None:
    values = uniform(keys_of(64), (64, *SHAPE), dtype)
    assert values.dtype == dtype
    assert values.min() >= 0
    assert values.max() < 1
    flat = values.flatten().numpy()
    assert is_plausible(stats.kstest(flat, "uniform").pvalue)
    assert is_plausible(stats.chisquare(np.histogram(flat, 256, (0, 1))[0]).pvalue)


def test_uniform_within_each_image_and_across_images() -> None:
    values = uniform(keys_of(128), (128, *SHAPE), torch.float64).flatten(1).numpy()
    for p_values in (
        [stats.kstest(v, "uniform").pvalue for v in values],
        [stats.kstest(v, "uniform").pvalue for v in values.T],
    ):
        assert is_plausible(stats.kstest(p_values, "uniform").pvalue)


def test_neighbours_are_uncorrelated() -> None:
    values = uniform(keys_of(64), (64, *SHAPE), torch.float64).flatten(1).numpy()
    for a, b in ((values[:, :-1], values[:, 1:]), (values[:-1], values[1:]), (values[:, :256], values[:, 256:512])):
        assert is_plausible(stats.pearsonr(a.ravel(), b.ravel()).pvalue)


def test_streams_and_seeds_are_independent() -> None:
    shape = (32, *SHAPE)
    first = uniform(keys_of(32), shape, torch.float64)
    for other in (
        uniform(keys_of(32), shape, torch.float64, stream=1),
        uniform(keys_of(32, seed=1), shape, torch.float64),
    ):
        assert (first == other).double().mean() < 1e-4
        assert is_plausible(stats.pearsonr(first.flatten().numpy(), other.flatten().numpy()).pvalue)


def test_normal_is_normal() -> None:
    values = normal(keys_of(64), (64, *SHAPE), torch.float64)
    assert torch.isfinite(values).all()
    assert is_plausible(stats.kstest(values.flatten().numpy(), "norm").pvalue)


@pytest.mark.parametrize(("norm", "order"), [("linf", torch.inf), ("l2", 2), ("l1", 1)])
def test_ball_is_uniform_in_volume(norm: str, order: float) -> None:
    """The share of the volume inside a point's radius is uniform: (r / ε)^d."""
    count, shape, eps = 4000, (1, 2, 3), 0.25
    delta = ball(keys_of(count), torch.Size((count, *shape)), torch.float64, norm, eps)
    radius = delta.flatten(1).norm(p=order, dim=1)
    assert radius.max() <= eps + 1e-12
    assert is_plausible(stats.kstest(((radius / eps) ** 6).numpy(), "uniform").pvalue)
    assert is_plausible(stats.binomtest(int((delta > 0).sum()), delta.numel()).pvalue)


def test_directions_in_the_l2_and_l1_ball_have_their_laws() -> None:
    """A squared coordinate of a uniform direction is Beta(1/2, (d-1)/2); a share of the L1 norm is Beta(1, d-1)."""
    count, shape = 4000, (1, 2, 3)
    for norm, power, law in (("l2", 2, (0.5, 2.5)), ("l1", 1, (1, 5))):
        delta = ball(keys_of(count), torch.Size((count, *shape)), torch.float64, norm, 1.0).flatten(1)
        share = delta.abs() ** power
        share = share / share.sum(1, keepdim=True)
        for coordinate in share.T:
            assert is_plausible(stats.kstest(coordinate.numpy(), "beta", law).pvalue)


@given(st.integers(0, 2**63), st.permutations(list(range(6))))
@settings(max_examples=30, deadline=None)
def test_keys_belong_to_images_and_not_to_places(seed: int, order: list[int]) -> None:
    images = torch.rand(6, 3, 5, 5, generator=torch.Generator().manual_seed(seed % 2**32))
    keys = image_keys(images, seed)
    assert torch.equal(image_keys(images[order], seed), keys[order])
    assert torch.equal(image_keys(images[2:3], seed), keys[2:3])
    assert len(set(keys.tolist())) == 6
    assert not (image_keys(images, seed + 1) == keys).any()


def test_memory_layout_and_type_do_not_change_the_key() -> None:
    images = torch.rand(4, 3, 6, 6)
    keys = image_keys(images, 0)
    assert torch.equal(image_keys(images.to(memory_format=torch.channels_last), 0), keys)
    assert torch.equal(image_keys(images.double(), 0), keys)


def test_one_pixel_changes_the_key_and_so_does_its_place() -> None:
    images = torch.zeros(13, 3, 2, 2)
    for place in range(12):
        images[place + 1].view(-1)[place] = 1 / 255
    assert len(set(image_keys(images, 0).tolist())) == 13


def test_draws_of_one_key_do_not_depend_on_the_batch() -> None:
    keys = keys_of(8)
    together = uniform(keys, (8, *SHAPE), torch.float32)
    assert torch.equal(uniform(keys[3:4], (1, *SHAPE), torch.float32), together[3:4])


@given(st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_mix_seed_gives_a_signed_64_bit_seed(parts: list[int]) -> None:
    seed = mix_seed(*parts)
    assert -(2**63) <= seed < 2**63
    assert seed == mix_seed(*parts)
    assert seed != mix_seed(*parts, 0)
    assert seed != mix_seed(parts[0] + 1, *parts[1:])

"""Projections and steepest steps, against optimisers of scipy and against pyautoattack."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from torch import Tensor

from lightning_robust.attacks.projection import norms, project, project_ball, steepest

NORMS = ("linf", "l2", "l1")
ORDER = {"linf": torch.inf, "l2": 2, "l1": 1}


@st.composite
def moved_images(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)) -> tuple:
    """Clean images (some pixels black or white), points to project, and a budget."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 6)))
    dtype = draw(st.sampled_from(dtypes))
    images = (torch.rand(shape, generator=generator, dtype=dtype) * 1.5 - 0.25).clamp(0, 1)
    scale = 10 ** draw(st.floats(-6, 2))
    moved = images + scale * torch.randn(shape, generator=generator, dtype=dtype)
    return images, moved, draw(st.sampled_from([0.0, 1e-4, 8 / 255, 0.3, 1.0]))


@given(moved_images(), st.sampled_from(NORMS))
@settings(max_examples=150, deadline=None)
def test_projection_lands_in_ball_and_box(case: tuple[Tensor, Tensor, float], norm: str) -> None:
    images, moved, eps = case
    result = project(images, moved, norm, eps)
    assert result.dtype == images.dtype
    assert result.min() >= 0
    assert result.max() <= 1
    size = (result.double() - images.double()).flatten(1).norm(p=ORDER[norm], dim=1).max()
    assert size <= eps + 1e-6


@given(moved_images(), st.sampled_from(NORMS))
@settings(max_examples=100, deadline=None)
def test_projection_twice_is_projection_once(case: tuple[Tensor, Tensor, float], norm: str) -> None:
    images, moved, eps = case
    once = project(images, moved, norm, eps)
    torch.testing.assert_close(project(images, once, norm, eps), once, rtol=0, atol=2e-6)


@given(moved_images(), st.sampled_from(NORMS))
@settings(max_examples=100, deadline=None)
def test_points_inside_stay(case: tuple[Tensor, Tensor, float], norm: str) -> None:
    images, moved, eps = case
    direction = moved.clamp(0, 1) - images
    inside = images + direction * (0.5 * eps / norms(direction, norm).clamp_min(0.5 * eps + 1e-9))[:, None, None, None]
    torch.testing.assert_close(project(images, inside, norm, eps), inside, rtol=0, atol=1e-6)


@given(moved_images((torch.float64,)))
@settings(max_examples=60, deadline=None)
def test_l1_projection_is_the_nearest_point(case: tuple[Tensor, Tensor, float]) -> None:
    """A linear programme looks for what may not be: a feasible z with ⟨y − P(y), z − P(y)⟩ > 0."""
    images, moved, eps = case
    for clean, point, projected in zip(images, moved, project(images, moved, "l1", eps), strict=True):
        x, d = clean.flatten().numpy(), (projected - clean).flatten().numpy()
        away = (point - clean).flatten().numpy() - d
        # z = p - n with p and n at least 0; their sum is the L1 norm
        bounds = [*((0, 1 - value) for value in x), *((0, value) for value in x)]
        best = linprog(np.concatenate([-away, away]), np.ones((1, 2 * len(x))), [eps], bounds=bounds)
        assert best.status == 0
        assert -best.fun - away @ d <= 1e-5 * max(1.0, np.abs(away).max())


def test_l1_projection_is_as_near_as_an_optimiser_gets() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        x, y, eps = generator.uniform(size=4), generator.normal(size=4) * 2, generator.uniform(0.1, 2)

        def distance(parts: np.ndarray, y: np.ndarray = y) -> float:
            return float(((parts[:4] - parts[4:] - y) ** 2).sum())

        found = minimize(
            distance,
            np.zeros(8),
            method="SLSQP",
            bounds=[*((0, 1 - v) for v in x), *((0, v) for v in x)],
            constraints={"type": "ineq", "fun": lambda parts, eps=eps: eps - parts.sum()},
            options={"maxiter": 500, "ftol": 1e-14},
        )
        clean = torch.from_numpy(x).view(1, 1, 2, 2)
        ours = (project(clean, clean + torch.from_numpy(y).view(1, 1, 2, 2), "l1", eps) - clean).flatten().numpy()
        np.testing.assert_allclose(ours, found.x[:4] - found.x[4:], atol=1e-4)


@pytest.mark.parametrize("eps", [0.5, 2.0, 12.0, 60.0])
def test_l1_projection_equals_pyautoattack(eps: float) -> None:
    reference = pytest.importorskip("pyautoattack.autopgd_base").L1_projection
    images = (torch.rand(8, 3, 8, 8) * 1.5 - 0.25).clamp(0, 1)
    moved = images + torch.randn(images.shape)
    theirs = moved + reference(images, moved - images, eps)
    torch.testing.assert_close(project(images, moved, "l1", eps), theirs, rtol=0, atol=1e-5)


def test_l1_norm_of_a_large_image_stays_in_the_ball() -> None:
    """150,528 small summands: rounding must not carry the sum out of the ball."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 224, 224, generator=generator)
    moved = images + torch.randn(images.shape, generator=generator)
    for eps in (1.0, 12.0, 255.0):
        delta = project(images, moved, "l1", eps).double() - images.double()
        assert delta.flatten(1).abs().sum(1).max() <= eps * (1 + 1e-6)


@given(st.integers(0, 2**32), st.sampled_from(NORMS), st.floats(0.01, 3))
@settings(max_examples=40, deadline=None)
def test_ball_without_the_box(seed: int, norm: str, eps: float) -> None:
    delta = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    result = project_ball(delta, norm, eps)
    assert norms(result, norm).max() <= eps + 1e-9
    inside = norms(delta, norm) <= eps
    torch.testing.assert_close(result[inside], delta[inside])
    # on the surface where it came from outside
    torch.testing.assert_close(norms(result[~inside], norm), torch.full((int((~inside).sum()),), eps).double())


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e6])
@pytest.mark.parametrize("norm", NORMS)
def test_steepest_has_length_one_at_any_scale_of_gradient(norm: str, scale: float) -> None:
    gradient = torch.randn(4, 3, 5, 5) * scale
    direction = steepest(gradient, norm)
    torch.testing.assert_close(norms(direction, norm), torch.ones(4))
    torch.testing.assert_close(direction, steepest(gradient / scale, norm))


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_steepest_rises_as_much_as_its_dual_norm(norm: str, dual: int) -> None:
    gradient = torch.randn(4, 3, 5, 5)
    rise = (gradient * steepest(gradient, norm)).flatten(1).sum(1)
    torch.testing.assert_close(rise, gradient.flatten(1).norm(p=dual, dim=1))


def test_l1_step_moves_its_share_of_the_largest_gradients() -> None:
    gradient = torch.randn(2, 1, 10, 10)
    direction = steepest(gradient, "l1", sparsity=0.9).flatten(1)
    assert (direction != 0).sum(1).tolist() == [10, 10]
    smallest_moved = gradient.flatten(1).abs().masked_fill(direction == 0, torch.inf).amin(1)
    assert bool((gradient.flatten(1).abs().masked_fill(direction != 0, 0).amax(1) <= smallest_moved).all())


@pytest.mark.parametrize("norm", NORMS)
def test_no_gradient_no_step(norm: str) -> None:
    assert not steepest(torch.zeros(2, 3, 4, 4), norm).any()

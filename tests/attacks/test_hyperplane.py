"""Projections onto hyperplanes in the box: against scipy, the official code of FAB and closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from torch import Tensor

from lightning_robust.attacks.hyperplane import nearest, slopes, smallest_move

ORDER = {"linf": torch.inf, "l2": 2, "l1": 1}
NORMS = list(ORDER)


@st.composite
def hyperplanes(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float64,)) -> tuple[Tensor, Tensor, Tensor]:
    """Points in the box, normals with some zeros and of any length, and gaps, some of which the box does not allow."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 2)), draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    dtype = draw(st.sampled_from(dtypes))
    points = (torch.rand(shape, generator=generator, dtype=dtype) * 1.5 - 0.25).clamp(0, 1)
    normals = torch.randn(shape, generator=generator, dtype=dtype)
    normals = normals * (torch.rand(shape, generator=generator) > 0.2) * 10 ** draw(st.floats(-8, 4))
    reach = draw(st.floats(0.001, 2)) * (2 * torch.rand(shape[0], generator=generator, dtype=dtype) - 1)
    return points, normals, reach * normals.abs().flatten(1).sum(1) * 0.5


def room_towards(points: Tensor, normals: Tensor, gaps: Tensor) -> Tensor:
    """The largest |normal·d| that the box allows in the direction of the gap, ``(n,)``."""
    way = normals * gaps.sign()[:, None, None, None]
    return torch.where(way > 0, way * (1 - points), -way * points).flatten(1).sum(1)


def least_norm(point: np.ndarray, normal: np.ndarray, gap: float, norm: str) -> float:
    """The same by an optimiser of scipy."""
    size = len(point)
    normal, gap = normal / np.abs(normal).max(), gap / np.abs(normal).max()
    bounds = list(zip(-point, 1 - point, strict=True))
    if norm == "l2":
        start = normal * gap / (normal @ normal)
        found = minimize(
            lambda d: d @ d,
            start.clip(-point, 1 - point),
            jac=lambda d: 2 * d,
            bounds=bounds,
            constraints={"type": "eq", "fun": lambda d: normal @ d - gap, "jac": lambda d: normal},
            options={"maxiter": 500, "ftol": 1e-14},
        )
        assert abs(normal @ found.x - gap) < 1e-6
        return float(np.sqrt(found.fun))
    if norm == "linf":
        # d and a bound on all of its values
        cost = np.r_[np.zeros(size), 1]
        inequalities = np.block([[np.eye(size), -np.ones((size, 1))], [-np.eye(size), -np.ones((size, 1))]])
        found = linprog(cost, inequalities, np.zeros(2 * size), np.r_[normal, 0][None], [gap], [*bounds, (0, 1)])
    else:
        # the positive and the negative part of d
        both = [(0, high) for _, high in bounds] + [(0, -low) for low, _ in bounds]
        found = linprog(np.ones(2 * size), A_eq=np.r_[normal, -normal][None], b_eq=[gap], bounds=both)
    assert found.success
    return float(found.fun)


@given(hyperplanes((torch.float32, torch.float64)), st.sampled_from(NORMS))
@settings(max_examples=200, deadline=None)
def test_the_move_ends_on_the_hyperplane_or_in_the_corner_next_to_it(case: Any, norm: str) -> None:
    points, normals, gaps = case
    move = smallest_move(points, normals, gaps, norm)
    assert move.dtype == points.dtype
    assert torch.isfinite(move).all()
    assert (points + move).min() >= -1e-6
    assert (points + move).max() <= 1 + 1e-6
    assert not move[normals == 0].any()
    reached = (move.double() * normals).flatten(1).sum(1)
    expected = gaps.sign() * torch.minimum(gaps.abs(), room_towards(points, normals, gaps))
    scale = normals.double().abs().flatten(1).sum(1).clamp_min(1e-300)
    assert ((reached - expected).abs() / scale).max() < (1e-5 if points.dtype == torch.float32 else 1e-10)


@given(hyperplanes(), st.sampled_from(NORMS))
@settings(max_examples=60, deadline=None)
def test_the_move_is_as_small_as_that_of_an_optimiser(case: Any, norm: str) -> None:
    points, normals, gaps = case
    size = smallest_move(points, normals, gaps, norm).flatten(1).norm(p=ORDER[norm], dim=1)
    reachable = gaps.abs() < 0.999 * room_towards(points, normals, gaps)
    for row in reachable.nonzero()[:, 0].tolist():
        expected = least_norm(points[row].flatten().numpy(), normals[row].flatten().numpy(), float(gaps[row]), norm)
        assert float(size[row]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_the_move_is_that_of_the_official_projection(norm: str) -> None:
    theirs = pytest.importorskip("pyautoattack.fab_projections")
    generator = torch.Generator().manual_seed(1)
    points = (torch.rand(32, 3, 8, 8, generator=generator, dtype=torch.float64) * 1.4 - 0.2).clamp(0, 1)
    normals = torch.randn(points.shape, generator=generator, dtype=torch.float64)
    gaps = torch.linspace(-60, 60, 32, dtype=torch.float64)
    flat, normal = points.flatten(1), normals.flatten(1)
    project = {"linf": theirs.projection_linf, "l2": theirs.projection_l2, "l1": theirs.projection_l1}[norm]
    expected = project(flat, normal, (flat * normal).sum(1) + gaps).view_as(points)
    torch.testing.assert_close(smallest_move(points, normals, gaps, norm), expected, rtol=1e-4, atol=1e-5)


def test_a_move_of_one_image_does_not_depend_on_the_others() -> None:
    generator = torch.Generator().manual_seed(2)
    points = torch.rand(16, 1, 9, 9, generator=generator, dtype=torch.float64) ** 4
    normals = torch.randn(points.shape, generator=generator, dtype=torch.float64) ** 5
    gaps = 10 ** torch.linspace(-3, 3, 16, dtype=torch.float64)
    for norm in NORMS:
        together = smallest_move(points, normals, gaps, norm)
        for row in range(16):
            alone = smallest_move(points[row : row + 1], normals[row : row + 1], gaps[row : row + 1], norm)
            torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-12)


def test_broken_gradients_end() -> None:
    """NaN neither loops for ever nor spreads to other images."""
    points, normals = torch.full((2, 1, 2, 2), 0.5), torch.ones(2, 1, 2, 2)
    normals[0, 0, 0, 0] = torch.nan
    for norm in NORMS:
        for gap in (0.5, torch.inf):
            move = smallest_move(points, normals, torch.tensor([0.5, gap]), norm)
            assert torch.isfinite(move[1]).all()


@pytest.mark.parametrize("norm", NORMS)
def test_the_nearest_of_several_boundaries(norm: str) -> None:
    generator = torch.Generator().manual_seed(3)
    normals = [torch.randn(5, 3, 4, 4, generator=generator) * 10**-k for k in range(4)]
    values = [torch.randn(5, generator=generator) * 10**-k for k in range(4)]
    dual = {"linf": 1, "l2": 2, "l1": torch.inf}[norm]
    distances = torch.stack(
        [v.abs() / n.flatten(1).norm(p=dual, dim=1) for v, n in zip(values, normals, strict=True)], 1
    )
    value, normal = nearest(values, normals, norm)
    for row, best in enumerate(distances.argmin(1).tolist()):
        assert value[row] == values[best][row]
        assert torch.equal(normal[row], normals[best][row])
    # squares that underflow in float32
    torch.testing.assert_close(slopes(normals[0] * 1e-25, norm) * 1e25, slopes(normals[0], norm))

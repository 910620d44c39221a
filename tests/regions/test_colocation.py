"""Moran's I and connected components against definitions written out, and on maps whose answer is known."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from skimage.measure import label

from lightning_robust.errors import UserError
from lightning_robust.regions import components, morans_i, morans_i_test
from lightning_robust.regions.colocation import _moved


def by_hand(x: np.ndarray, y: np.ndarray) -> float:
    """The double sum over pixels."""
    height, width = x.shape
    dx, dy = x - x.mean(), y - y.mean()
    total = weights = 0.0
    for i in range(height):
        for j in range(width):
            for k in range(max(i - 1, 0), min(i + 2, height)):
                for m in range(max(j - 1, 0), min(j + 2, width)):
                    if (k, m) != (i, j):
                        total += dx[i, j] * dy[k, m]
                        weights += 1
    return x.size / weights * total / np.sqrt((dx**2).sum() * (dy**2).sum())


def test_morans_i_is_the_double_sum() -> None:
    maps = torch.rand(2, 3, 6, 5)
    other = torch.rand(2, 3, 6, 5)
    alone, crossed = morans_i(maps), morans_i(maps, other)
    for i in range(2):
        for j in range(3):
            x, y = maps[i, j].double().numpy(), other[i, j].double().numpy()
            assert float(alone[i, j]) == pytest.approx(by_hand(x, x), abs=1e-12)
            assert float(crossed[i, j]) == pytest.approx(by_hand(x, y), abs=1e-12)


def test_known_maps() -> None:
    rows = torch.arange(20.0)[:, None].expand(20, 20)
    board = (torch.arange(400).view(20, 20) // 20 + torch.arange(20)) % 2
    assert float(morans_i(rows)) > 0.9
    # of a chessboard the straight neighbours differ and the diagonal ones agree
    assert abs(float(morans_i(board.double()))) < 0.06
    stripes = torch.arange(20.0)[:, None].expand(20, 20) % 2
    assert float(morans_i(stripes)) < -0.4
    assert morans_i(torch.full((2, 8, 8), 0.1)).isnan().all()
    patch = torch.zeros(20, 20)
    patch[4:9, 4:9] = 1
    beside = torch.roll(patch, 1, dims=1)
    assert float(morans_i(patch, beside)) > 0.5
    assert float(morans_i(patch, 1 - beside)) < -0.5


def test_p_values() -> None:
    patch = torch.zeros(12, 12)
    patch[3:7, 3:7] = 1
    found = morans_i_test(patch, permutations=199)
    assert found.p_value == pytest.approx(1 / 200)
    assert found.expected == pytest.approx(-1 / 143)
    assert morans_i_test(patch, permutations=199) == found  # the same permutations
    torch.manual_seed(1)
    p = [morans_i_test(torch.rand(12, 12), permutations=99, seed=seed).p_value for seed in range(40)]
    assert 0.3 < np.mean(p) < 0.7  # of noise they are uniform
    flat = morans_i_test(torch.ones(5, 5))
    assert np.isnan(flat.i)
    assert np.isnan(flat.p_value)


def test_p_values_of_two_maps() -> None:
    """Two smooth maps are seldom near 0, related or not: the p-value must know that they are smooth."""

    def smooth() -> torch.Tensor:
        grown = torch.nn.functional.interpolate(torch.rand(1, 1, 5, 5), 30, mode="bilinear")[0, 0]
        return grown[2:26, 2:26]

    torch.manual_seed(2)
    patch = torch.zeros(24, 24)
    patch[3:7, 3:7] = 1
    assert morans_i_test(patch, torch.roll(patch, 1, 0), permutations=199).p_value < 0.02
    assert morans_i_test(patch, torch.roll(patch, 12, 0), permutations=199).p_value > 0.1
    p = torch.tensor([morans_i_test(smooth(), smooth(), permutations=99, seed=seed).p_value for seed in range(60)])
    assert 0.35 < float(p.mean()) < 0.65
    assert float((p <= 0.05).double().mean()) < 0.15  # by permuted pixels it is 0.4


def test_moves_are_of_the_whole_map() -> None:
    """Every other place of a small map comes up, and nothing else."""
    first, second = torch.rand(3, 4, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    found = float(morans_i(first, second))
    moves = [torch.roll(second, (row, column), (0, 1)) for row in range(3) for column in range(4) if row or column]
    share = sum(float(morans_i(first, moved)) >= found - 1e-12 for moved in moves) / len(moves)
    assert morans_i_test(first, second, permutations=4000).p_value == pytest.approx(share, abs=0.04)
    assert {tuple(m.flatten().tolist()) for m in _moved(second, 500, torch.Generator().manual_seed(0))} == {
        tuple(moved.flatten().tolist()) for moved in moves
    }


def test_components_are_those_of_scikit_image() -> None:
    regions = torch.rand(12, 15, 13) < 0.25
    regions[3] = False
    regions[4] = True
    found = components(regions)
    for number, region in enumerate(regions.numpy()):
        labels, count = label(region, connectivity=2, return_num=True)
        assert int(found.count[number]) == count
        if count:
            sizes = np.bincount(labels.ravel())[1:]
            assert float(found.largest[number]) == pytest.approx(sizes.max() / sizes.sum())
        else:
            assert found.largest[number].isnan()


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="bring them to one size"):
        morans_i(torch.rand(4, 4), torch.rand(5, 5))
    with pytest.raises(UserError, match="at least two pixels"):
        morans_i(torch.rand(1, 1))
    with pytest.raises(UserError, match="permutations=0"):
        morans_i_test(torch.rand(4, 4), permutations=0)
    with pytest.raises(UserError, match="of one map"):
        morans_i_test(torch.rand(2, 4, 4))
    with pytest.raises(UserError, match=r"type torch\.float32"):
        components(torch.rand(2, 4, 4))
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UserError, match=r"needs scipy.*lightning-robust\[regions\]"):
        components(torch.rand(2, 4, 4) > 0.5)

"""The best pair is the one that a look at all pairs finds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_robust.attacks import saliency
from lightning_robust.attacks.saliency import best_pairs, best_sums


def by_hand(rise: Tensor, fall: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs: the first best, whether there is one, and its product."""
    features = rise.shape[1]
    up, down = (each[:, :, None] + each[:, None, :] for each in (rise, fall))
    pair = allowed[:, :, None] & allowed[:, None, :] & ~torch.eye(features, dtype=torch.bool)
    worth = torch.where(pair & (up > 0) & (down > 0), up * down, -1.0)
    value, place = worth.flatten(1).max(1)
    return torch.stack([place // features, place % features], 1), value >= 0, value


def product(rise: Tensor, fall: Tensor, features: Tensor) -> Tensor:
    return rise.gather(1, features).sum(1) * fall.gather(1, features).sum(1)


def _line(count: int, features: int) -> tuple[Tensor, Tensor]:
    """No feature dominates another, and many pairs tie."""
    rise = torch.arange(features).repeat(count, 1) - features // 2
    return rise, 2 - rise


# (rise, fall) of whole numbers, whose sums and products are exact, so that ties are ties
EXACT: dict[str, Callable[[int, int], tuple[Tensor, Tensor]]] = {
    "few values": lambda n, f: (torch.randint(-2, 3, (n, f)), torch.randint(-2, 3, (n, f))),
    "two values": lambda n, f: (torch.randint(0, 2, (n, f)), torch.randint(0, 2, (n, f))),
    "mostly inadmissible": lambda n, f: (torch.randint(-9, 2, (n, f)), torch.randint(-9, 2, (n, f))),
    "zeros": lambda n, f: (torch.zeros(n, f), torch.zeros(n, f)),
    "equal": lambda n, f: (torch.ones(n, f), torch.ones(n, f)),
    "no rise": lambda n, f: (torch.zeros(n, f), torch.randint(-3, 4, (n, f))),
    "all inadmissible": lambda n, f: ((r := torch.randint(-50, 51, (n, f))), -9 * r),
    "on a line": _line,
    "opposed": lambda n, f: ((r := torch.randint(-50, 51, (n, f))), torch.randint(-2, 9, (n, f)) - r),
    "mostly zero": lambda n, f: (torch.randint(-4, 5, (n, f)), torch.randint(-4, 5, (n, f)) * (torch.rand(n, f) < 0.1)),
}
ROUNDED: dict[str, Callable[[int, int], tuple[Tensor, Tensor]]] = {
    "independent": lambda n, f: (torch.randn(n, f), torch.randn(n, f)),
    "opposed": lambda n, f: ((r := torch.randn(n, f)), 0.1 * torch.randn(n, f) - r),
    "alike": lambda n, f: ((r := torch.randn(n, f)), 0.1 * torch.randn(n, f) + r),
    "heavy tails": lambda n, f: (torch.randn(n, f) ** 5, torch.randn(n, f) ** 5),
}


@pytest.fixture(params=["as it is", "always sorted", "small blocks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way through the search gives the same."""
    if request.param == "always sorted":
        monkeypatch.setattr(saliency, "_SORTED_FROM", 0)
    if request.param == "small blocks":
        monkeypatch.setattr(saliency, "_ENTRIES", 50)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", EXACT)
def test_it_is_the_first_of_the_best_pairs(kind: str) -> None:
    for number in range(120):
        count, features = int(torch.randint(1, 5, ())), int(torch.randint(2, 70, ()))
        rise, fall = (values.float() for values in EXACT[kind](count, features))
        allowed = torch.rand(count, features) < (1, 0.6, 0.05)[number % 3]
        pairs, found = best_pairs(rise, fall, allowed)
        expected, there, _ = by_hand(rise, fall, allowed)
        assert torch.equal(found, there)
        assert torch.equal(pairs[found], expected[found])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ROUNDED)
def test_no_pair_is_better(kind: str, dtype: torch.dtype) -> None:
    for number in range(60):
        count, features = int(torch.randint(1, 5, ())), int(torch.randint(2, 150, ()))
        rise, fall = (values.to(dtype) for values in ROUNDED[kind](count, features))
        allowed = torch.rand(count, features) < (1, 0.6, 0.05)[number % 3]
        pairs, found = best_pairs(rise, fall, allowed)
        _, there, value = by_hand(rise, fall, allowed)
        assert torch.equal(found, there)
        assert torch.equal(product(rise, fall, pairs)[found], value[found])
        assert bool((pairs[:, 0] < pairs[:, 1])[found].all())
        assert bool(allowed.gather(1, pairs)[found].all())


def test_no_pair_is_better_among_many() -> None:
    rise, fall = torch.randn(2, 1, 3000, dtype=torch.float64)
    allowed = torch.ones(1, 3000, dtype=torch.bool)
    expected, _, _ = by_hand(rise, fall, allowed)
    assert torch.equal(best_pairs(rise, fall, allowed)[0], expected)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-19, 1e30])
def test_neither_small_nor_large_gradients_tie(scale: float) -> None:
    """A product of gradients of 1e-30 is zero in float32; which pair is best does not hang on it."""
    rise, fall = torch.randn(2, 4, 200)
    allowed = torch.ones(4, 200, dtype=torch.bool)
    rise, fall = rise * scale, fall * scale
    pairs, found = best_pairs(rise, fall, allowed)
    expected, there, _ = by_hand(rise.double(), fall.double(), allowed)
    assert found.all()
    assert torch.equal(found, there)
    assert torch.equal(pairs, expected)


def test_an_image_s_pair_does_not_depend_on_the_others() -> None:
    rise, fall = torch.randn(2, 8, 300)
    rise[3], fall[4] = 0, -1  # one with ties, one without a pair
    allowed = torch.rand(8, 300) < 0.9
    pairs, found = best_pairs(rise, fall, allowed)
    assert found.tolist() == [True] * 3 + [bool(found[3]), False] + [True] * 3
    for row in range(8):
        alone = best_pairs(rise[row : row + 1], fall[row : row + 1], allowed[row : row + 1])
        assert alone[1][0] == found[row]
        if found[row]:
            assert torch.equal(alone[0][0], pairs[row])


@pytest.mark.parametrize("features", [1, 2])
def test_hardly_any_features(features: int) -> None:
    ones = torch.ones(3, features)
    allowed = torch.ones(3, features, dtype=torch.bool)
    for pairs, found in (best_pairs(ones, ones, allowed), best_sums(ones, allowed)):
        assert pairs.shape == (3, 2)
        assert bool((found == (features == 2)).all())
    for pairs, found in (best_pairs(ones, ones, ~allowed), best_sums(ones, ~allowed)):
        assert pairs.shape == (3, 2)
        assert not found.any()


@pytest.mark.parametrize("kind", EXACT)
def test_the_best_sum_is_the_best_pair_where_both_numbers_are_one(kind: str) -> None:
    for number in range(60):
        count, features = int(torch.randint(1, 5, ())), int(torch.randint(2, 70, ()))
        rise = EXACT[kind](count, features)[0].float()
        allowed = torch.rand(count, features) < (1, 0.6, 0.05)[number % 3]
        pairs, found = best_sums(rise, allowed)
        expected, there, _ = by_hand(rise, rise, allowed)
        assert torch.equal(found, there)
        assert torch.equal(pairs[found], expected[found])


@pytest.mark.parametrize("kind", ["independent", "all inadmissible", "zeros"])
def test_large_images_take_little_memory(kind: str) -> None:
    """Of 3 × 224 × 224: a matrix of all pairs would take 84 GiB. In a process of its own, whose peak is looked at."""
    code = f"""
import torch
from pathlib import Path
from lightning_robust.attacks.saliency import best_pairs
def kib(field):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(field))
features = 3 * 224 * 224
rise, fall = torch.randn(2, 2, features)
if {kind!r} == "all inadmissible":
    fall = -9 * rise
if {kind!r} == "zeros":
    rise, fall = 0 * rise, 0 * fall
rise[1, [7, 150_000]], fall[1, [7, 150_000]] = 99.0, 99.0
before = kib("VmRSS")
pairs, found = best_pairs(rise, fall, torch.ones_like(rise, dtype=torch.bool))
assert found.tolist() == [{kind == "independent"}, True], found
assert pairs[1].tolist() == [7, 150_000], pairs
print(kib("VmHWM") - before)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert int(done.stdout) < 256 * 1024

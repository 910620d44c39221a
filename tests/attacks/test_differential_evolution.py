"""The engine of differential evolution: draws, mutants, bounds, duplicates, and a state that can be saved."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from lightning_robust.attacks.differential_evolution import (
    STRATEGIES,
    check_settings,
    children,
    fingerprints,
    novel,
    partners,
    repaired,
    survivors,
)
from lightning_robust.attacks.evolution_state import EvolutionState
from lightning_robust.errors import UserError

KEYS = torch.arange(1, 4) * 0x1234567


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_partners_are_all_different_and_never_the_parent(count: int) -> None:
    found = torch.stack(partners(KEYS, 7, count, 8), 2)
    assert found.shape == (3, 7, count)
    assert found.min() >= 0
    assert found.max() < 7
    for population in found.tolist():
        for place, others in enumerate(population):
            assert len({place, *others}) == count + 1


def test_partners_in_the_smallest_population_are_all_the_others() -> None:
    found = torch.stack(partners(KEYS, 4, 3, 8), 2)
    for population in found.tolist():
        for place, others in enumerate(population):
            assert sorted([place, *others]) == [0, 1, 2, 3]


def test_partners_are_drawn_uniformly() -> None:
    keys = torch.arange(4000) * 0x9E3779B97F4A7C1
    found = torch.stack(partners(keys, 6, 3, 16), 2)[:, 2]  # of the candidate in place 2
    triples = Counter(map(tuple, found.tolist()))
    assert len(triples) == 5 * 4 * 3
    expected = 4000 / 60
    chi_squared = sum((seen - expected) ** 2 / expected for seen in triples.values())
    assert chi_squared < 100  # 59 degrees of freedom: above 98 in one of a thousand


def test_populations_and_generations_draw_apart() -> None:
    first = torch.stack(partners(KEYS, 50, 3, 8), 2)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, torch.stack(partners(KEYS, 50, 3, 16), 2))
    assert torch.equal(first[1:2], torch.stack(partners(KEYS[1:2], 50, 3, 8), 2))


def by_hand(strategy: str, x: torch.Tensor, best: torch.Tensor, r: list[torch.Tensor], f: float) -> torch.Tensor:
    """The formulas as the literature writes them."""
    return {
        "rand1": lambda: r[0] + f * (r[1] - r[2]),
        "rand2": lambda: r[0] + f * (r[1] - r[3]) + f * (r[2] - r[4]),
        "best1": lambda: best + f * (r[0] - r[1]),
        "best2": lambda: best + f * (r[0] - r[2]) + f * (r[1] - r[3]),
        "current_to_best1": lambda: x + f * (best - x) + f * (r[0] - r[1]),
        "rand_to_best1": lambda: r[0] + f * (best - r[0]) + f * (r[1] - r[2]),
    }[strategy]()


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_mutants_are_those_of_the_formulas(strategy: str) -> None:
    vectors, fitness = torch.rand(3, 8, 5, dtype=torch.float64), torch.rand(3, 8)
    made = children(vectors, fitness, KEYS, 2, strategy=strategy, f=0.7, crossover=1, bounds="free")
    drawn = partners(KEYS, 8, STRATEGIES[strategy].partners, 16)
    for row in range(3):
        best = vectors[row, fitness[row].argmax()]
        for place in range(8):
            others = [vectors[row, each[row, place]] for each in drawn]
            torch.testing.assert_close(made[row, place], by_hand(strategy, vectors[row, place], best, others, 0.7))


def test_crossover_takes_its_share_and_one_entry_at_least() -> None:
    vectors = torch.rand(3, 200, 10, dtype=torch.float64)
    settings = {"strategy": "rand1", "f": 0.5, "bounds": "free"}
    for crossover, share in ((0.0, 0.1), (0.3, 0.3 + 0.7 * 0.1), (1.0, 1.0)):
        made = children(vectors, torch.zeros(3, 200), KEYS, 1, crossover=crossover, **settings)
        taken = made != vectors
        assert taken.any(2).all()
        assert float(taken.double().mean()) == pytest.approx(share, abs=0.02)
        whole = children(vectors, torch.zeros(3, 200), KEYS, 1, crossover=1.0, **settings)
        assert torch.equal(made[taken], whole[taken])


def test_bounds() -> None:
    vectors = torch.tensor([[[-0.25, 0.5, 1.25, 2.5, -1.75]]], dtype=torch.float64)
    key = KEYS[:1]
    assert torch.equal(repaired(vectors, key, "free", 0), vectors)
    assert repaired(vectors, key, "clip", 0).tolist() == [[[0, 0.5, 1, 1, 0]]]
    assert repaired(vectors, key, "reflect", 0).tolist() == [[[0.25, 0.5, 0.75, 0.5, 0.25]]]
    drawn = repaired(vectors, key, "resample", 0)
    assert drawn[0, 0, 1] == 0.5
    assert ((drawn >= 0) & (drawn < 1)).all()
    assert len(set(drawn.flatten().tolist())) == 5


def test_fingerprints_tell_descriptions_apart() -> None:
    numbers = torch.cartesian_prod(*[torch.arange(9)] * 5)
    assert len(fingerprints(numbers).unique()) == 9**5
    assert torch.equal(fingerprints(numbers.view(9, -1, 5)).flatten(), fingerprints(numbers))
    assert (fingerprints(numbers) != 0).all()  # 0 stands for nothing in a state


def test_novel_finds_what_is_new_and_the_likes_of_the_rest() -> None:
    known = torch.tensor([[5, 6], [7, 7]])
    codes = torch.tensor([[1, 5, 1, 2], [5, 7, 8, 8]])
    new, like = novel(known, codes)
    # in row 0 the first 1 and the 2, in row 1 the 5 (which only row 0 knows) and the first 8
    assert new.tolist() == [0, 3, 4, 6]
    assert like.tolist() == [[4, 0, 4, 7], [8, 2, 10, 10]]
    new, like = novel(known[:, :0], codes)
    assert new.tolist() == [0, 1, 3, 4, 5, 6]
    assert like.tolist() == [[0, 1, 0, 3], [4, 5, 6, 6]]


def test_a_child_that_is_as_fit_survives() -> None:
    assert survivors(torch.tensor([1.0, 1, 1]), torch.tensor([0.9, 1, 1.1])).tolist() == [False, True, True]


def a_state() -> EvolutionState:
    whole, wide = torch.arange(3), torch.arange(24.0).view(2, 4, 3)
    return EvolutionState(
        settings="rand1", generation=7, keys=KEYS, rows=torch.tensor([0, 2]), vectors=wide, fitness=wide[..., 0],
        codes=torch.arange(8).view(2, 4), met=torch.zeros(2, 8, dtype=torch.int64), met_fitness=torch.zeros(2, 8),
        best=torch.rand(3, 3), best_fitness=torch.rand(3), best_class=whole, changed=whole > 0, confirmed=whole > 1,
        generations=whole, queries=whole,
    )  # fmt: skip


def test_a_state_is_saved_as_plain_tensors(tmp_path: Path) -> None:
    state = a_state()
    torch.save(state.state_dict(), tmp_path / "state.pt")
    values = torch.load(tmp_path / "state.pt", weights_only=True)
    again = EvolutionState.from_state_dict(values).to(torch.device("cpu"))
    for name, value in state.state_dict().items():
        assert torch.equal(getattr(again, name), value) if isinstance(value, torch.Tensor) else value == values[name]
    again.vectors += 1
    assert torch.equal(values["vectors"], state.vectors), "a state shares memory with what it was read from"
    del values["rows"]
    with pytest.raises(UserError, match="rows"):
        EvolutionState.from_state_dict(values)


def test_what_is_remembered_is_found_again() -> None:
    state = a_state()
    codes = torch.tensor([[3 << 32, 11 << 32, 4 << 32, 5 << 32], [3 << 32, 4 << 32, 5 << 32, 6 << 32]])
    fitness = torch.arange(8.0).view(2, 4) + 100
    state.remember(slice(0, 2), codes, fitness)
    known, theirs = state.known(slice(0, 2))
    assert known.shape == theirs.shape == (2, 12)
    for row in range(2):
        kept = dict(zip(known[row, 4:].tolist(), theirs[row, 4:].tolist(), strict=True))
        for code, value in zip(codes[row].tolist(), fitness[row].tolist(), strict=True):
            # 3 and 11 lead to one of eight places: the last that came has it
            assert (code in kept) == (not (row == 0 and code == 3 << 32))
            assert kept.get(code, value) == value
    state.leave(torch.tensor([True, False]))
    assert state.rows.tolist() == [2]
    assert len(state.vectors) == len(state.fitness) == len(state.codes) == len(state.met) == len(state.met_fitness) == 1


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"strategy": "rand3"}, "strategy='rand3'"),
        ({"population": 3}, "needs 4"),
        ({"population": 5, "strategy": "rand2"}, "needs 6"),
        ({"population": 3, "strategy": "best1"}, "needs 4"),
        ({"generations": 0}, "generations=0"),
        ({"f": 0}, "f=0"),
        ({"f": 2.5}, "f=2.5"),
        ({"f": float("nan")}, "f=nan"),
        ({"crossover": 1.5}, "crossover=1.5"),
    ],
)
def test_bad_settings(wrong: dict[str, object], sentence: str) -> None:
    good = {"population": 6, "generations": 1, "f": 0.5, "strategy": "rand1", "crossover": 1.0}
    check_settings("OnePixel", **good)
    with pytest.raises(UserError, match=sentence):
        check_settings("OnePixel", **{**good, **wrong})

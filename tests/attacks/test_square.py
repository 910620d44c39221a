"""Square: the promise, the official code's strength, and that it asks no more than it has to."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from certificate import margins
from conformance import CHECKS, CLASSES, SHAPE, Setting, Trained, evaluate, make_batch, make_model
from test_accounting import Counting
from test_conformance import COSTLY, EPS, MASK, bind
from torch import Tensor, nn

from lightning_robust.attacks.base import Problem
from lightning_robust.attacks.square import Square
from lightning_robust.attacks.squares import Squares
from lightning_robust.attacks.threat_model import ThreatModel
from lightning_robust.errors import UserError

THEIR_NORM = {"linf": "Linf", "l2": "L2", "l1": "L1"}
DIGITS_EPS = {"linf": 0.12, "l2": 0.6, "l1": 1.5}


def theirs(model: nn.Module, norm: str, eps: float, **settings: Any) -> Any:
    square = pytest.importorskip("pyautoattack.square")
    return square.SquareAttack(model, norm=THEIR_NORM[norm], eps=eps, **settings)


def robust_accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())


# -- the promise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", list(EPS))
def test_promise(norm: str, targeted: bool, masked: bool) -> None:
    setting = Setting(norm, EPS[norm], MASK if masked else None, targeted)
    run = bind(Square(eps=EPS[norm], norm=norm, queries=10, look_ahead=targeted), setting)
    for name, check in CHECKS.items():
        if name not in COSTLY:
            check(run, setting)


@pytest.mark.parametrize("check", sorted(COSTLY))
def test_promise_around_the_model(check: str) -> None:
    setting = Setting("linf", 0.05)
    CHECKS[check](bind(Square(eps=0.05, queries=8), setting), setting)


@pytest.mark.parametrize("masks", ["one", "each its own", "each channel"])
@pytest.mark.parametrize("norm", list(EPS))
def test_the_mask_is_kept_and_used(norm: str, masks: str) -> None:
    images = torch.full((3, *SHAPE), 0.5)
    mask = torch.zeros({"one": (1, 1, 8, 8), "each its own": (3, 1, 8, 8), "each channel": (3, 3, 8, 8)}[masks])
    mask[0, :, 5:7, 4:] = 1
    if masks != "one":
        mask[1, :, 0, 0] = mask[2, 0, 7, :2] = 1
    brightest = Square(eps=EPS[norm], norm=norm, queries=200)(_grey_or_bright, images, torch.zeros(3).long(), mask=mask)
    delta = brightest - images
    assert torch.equal(delta * (1 - mask), torch.zeros_like(delta))
    reached = (delta * mask).flatten(1).sum(1)
    # all masked values at the upper end of the budget (the image can do no more)
    values = mask.expand(3, -1, -1, -1).sum((1, 2, 3)) * (1 if masks == "each channel" else 3)
    most = {"linf": EPS["linf"] * values, "l2": EPS["l2"] * values.sqrt(), "l1": torch.full((3,), EPS["l1"])}[norm]
    most = torch.minimum(most, 0.5 * values)
    assert bool((reached > 0.6 * most).all())


def _grey_or_bright(images: Tensor) -> Tensor:
    """Never fooled, and the margin falls with brightness."""
    return torch.stack([1e4 - images.flatten(1).sum(1), torch.zeros(len(images))], 1)


def test_an_empty_mask_costs_the_start_alone() -> None:
    model = Counting(make_model())
    images, labels = make_batch(model.inner)
    result = Square(eps=0.3, queries=50).run(model, images, labels, mask=torch.zeros(8, 8), rounding=False)
    assert torch.equal(result.images, images)
    assert bool((result.queries == 2).all())
    assert model.images == 2 * len(images)


# -- the algorithm -----------------------------------------------------------------------------------------------------


def squares(norm: str, eps: float = 0.1, shape: tuple[int, ...] = (2, 3, 16, 16)) -> Squares:
    images = torch.full(shape, 0.5, dtype=torch.float64)
    zeros = torch.zeros(len(images), dtype=torch.int64)
    return Squares(Problem(lambda images: images, images, zeros, None, None, zeros), ThreatModel(norm, eps))


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_sizes_follow_the_official_schedule(norm: str, rescale: bool) -> None:
    official = theirs(make_model(), norm, 0.1, n_queries=2500, resc_schedule=rescale)
    attack = Square(norm=norm, queries=2500, rescale_schedule=rescale)
    for done in range(2500):
        side = round((official.p_selection(done) * 32 * 24) ** 0.5)
        side = max(side, 1) if norm == "linf" else max(side, 3)
        if norm == "l2" and side % 2 == 0:
            side += 1
        assert attack.side(done, 32, 24) == min(side, 24)


@pytest.mark.parametrize("side", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_the_shape_of_a_square_is_the_official_one(norm: str, side: int) -> None:
    expected = theirs(make_model(), norm, 0.1, device="cpu").eta(side)
    upright, lying = squares(norm)._bump(side).float()
    assert torch.allclose(upright, expected, atol=1e-6) or torch.allclose(lying, expected, atol=1e-6)
    assert torch.equal(upright, lying.T)


def test_linf_proposals_are_squares_at_the_ends_of_the_budget() -> None:
    both = squares("linf", shape=(2, 3, 16, 16))
    rows = torch.tensor([0, 1]).repeat(1000)
    points = both.problem.images[rows]
    torch.manual_seed(0)
    moved = both.propose(points, rows, torch.rand(2000, both.draws, dtype=torch.float64), 5) - points
    assert torch.allclose(moved.abs()[moved != 0], torch.tensor(0.1, dtype=torch.float64))
    covered = moved.ne(0).all(1)
    assert bool((covered.flatten(1).sum(1) == 25).all())
    assert bool((covered.any(1).sum(1) == 5).all())
    assert bool((covered.any(2).sum(1) == 5).all())
    assert covered.any(0).all()  # every place is reached, the last row and column too
    assert len({tuple(each) for each in moved.flatten(2).sum(2).sign().tolist()}) == 8  # signs of the three channels


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_l2_and_l1_proposals_spend_the_budget(norm: str) -> None:
    both = squares(norm, eps=0.5)
    rows = torch.tensor([0, 1]).repeat(100)
    torch.manual_seed(0)
    points = both.start(rows, torch.rand(200, *both.start_draws, dtype=torch.float64))
    for side in (9, 5, 3):
        order = 2 if norm == "l2" else 1
        size = (points - 0.5).flatten(1).norm(p=order, dim=1)
        assert torch.allclose(size, torch.full_like(size, 0.5), atol=1e-5)
        proposed = both.propose(points, rows, torch.rand(200, both.draws, dtype=torch.float64), side)
        assert bool((proposed != points).flatten(1).any(1).all())
        points = proposed


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("norm", list(DIGITS_EPS))
def test_as_strong_as_the_official_code(norm: str, rescale: bool, digits: Trained) -> None:
    model, images, labels = digits.model, digits.images[:160], digits.labels[:160]
    official = theirs(model, norm, DIGITS_EPS[norm], n_queries=400, resc_schedule=rescale)
    expected = robust_accuracy(model, official.perturb(images, labels), labels)
    attack = Square(norm=norm, eps=DIGITS_EPS[norm], queries=400, rescale_schedule=rescale)
    assert 0.2 < expected < 0.9
    assert robust_accuracy(model, attack(model, images, labels), labels) <= expected + 0.005


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_targeted_as_strong_as_the_official_code(norm: str, digits: Trained) -> None:
    model, images, labels = digits.model, digits.images[:160], digits.labels[:160]
    targets = (labels + 1) % 10
    official = theirs(model, norm, 2 * DIGITS_EPS[norm], n_queries=400, targeted=True)
    expected = robust_accuracy(model, official.perturb(images, targets), targets)
    attack = Square(norm=norm, eps=2 * DIGITS_EPS[norm], queries=400)
    found = robust_accuracy(model, attack(model, images, labels, targets=targets), targets)
    assert 0.1 < expected < 0.95
    assert found >= expected - 0.005


def test_more_queries_restarts_and_budget_fool_more(digits: Trained) -> None:
    model, images, labels = digits.model, digits.images[:100], digits.labels[:100]

    def fooled(**settings: Any) -> Tensor:
        return Square(**{"eps": 0.1, "queries": 100, **settings}).run(model, images, labels, rounding=False).success

    plain = fooled()
    again = fooled(restarts=3)
    assert bool((again | ~plain).all())
    assert again.sum() > plain.sum()
    assert fooled(queries=800).sum() > plain.sum()
    assert fooled(eps=0.2).sum() > plain.sum()
    assert not torch.equal(fooled(seed=1), plain)


@pytest.mark.parametrize("loss", ["margin", "ce"])
def test_what_withstands_comes_back_with_a_better_loss(loss: str, digits: Trained) -> None:
    model, images, labels = digits.model, digits.images[:100], digits.labels[:100]
    result = Square(eps=0.05, queries=100, loss=loss).run(model, images, labels)
    kept = ~result.success
    with torch.no_grad():
        before, after = (nn.functional.cross_entropy(model(x)[kept], labels[kept]) for x in (images, result.images))
    assert kept.sum() > 20
    assert after > 2 * before


# -- black box ---------------------------------------------------------------------------------------------------------


def test_a_function_without_gradients_is_attacked(digits: Trained) -> None:
    model, images, labels = digits.model, digits.images[:64], digits.labels[:64]
    weights = [each.numpy() for each in (model[-1].weight, model[-1].bias)]
    features = copy.deepcopy(model[:-1])

    def numbers(images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not images.requires_grad
        seen = features((images * 32).round() / 32).numpy()
        return torch.from_numpy(np.asarray(seen @ weights[0].T + weights[1]))

    result = Square(eps=0.12, queries=300).run(numbers, images, labels)
    assert result.success.sum() > 20
    with torch.no_grad():
        assert torch.equal(numbers(result.images).argmax(1) != labels, result.success)


# -- the account -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_queries_are_the_points_asked_about(norm: str, look_ahead: bool) -> None:
    images, labels = make_batch(make_model(), 12)
    labels = torch.where(torch.arange(12) % 4 == 0, (labels + 1) % CLASSES, labels)
    model = Counting(make_model())
    attack = Square(eps=EPS[norm], norm=norm, queries=40, restarts=2, look_ahead=look_ahead)
    result = attack.run(model, images, labels, rounding=False)
    assert int(result.queries.sum()) == model.images
    assert torch.equal(result.queries[::4], torch.ones(3, dtype=torch.int64))
    assert not result.iterations[::4].any()
    if not look_ahead:
        assert bool((result.queries <= 1 + 2 * 40).all())
        assert bool((result.queries <= result.iterations + 3).all())
    stayed = ~result.success
    assert bool((result.iterations[stayed] == 2 * 39).all())


def test_known_clean_logits_save_their_pass() -> None:
    model = make_model()
    images, labels = make_batch(model)
    attack = Square(eps=0.05, queries=10)
    plain = attack.run(model, images, labels)
    known = attack.run(model, images, labels, clean_logits=evaluate(model, images))
    assert torch.equal(known.images, plain.images)
    assert torch.equal(known.queries, plain.queries - 1)


def test_a_proposal_that_changes_nothing_is_not_asked_about() -> None:
    model = Counting(make_model())
    images = torch.zeros(4, *SHAPE)  # black: downwards nothing moves
    result = Square(eps=0.02, queries=300).run(model, images, evaluate(model.inner, images).argmax(1), rounding=False)
    left = ~result.success
    assert left.any()
    assert bool((result.queries[left] < 280).all())
    assert bool((result.iterations[left] == 299).all())


@pytest.mark.parametrize("norm", list(EPS))
def test_look_ahead_gives_the_same_in_fewer_passes(norm: str) -> None:
    model = make_model(torch.float64)
    images, labels = make_batch(model, 5, torch.float64)
    passes: list[int] = []
    model.register_forward_pre_hook(lambda module, given: passes.append(len(given[0])))
    results = []
    for look_ahead in (False, True):
        passes.clear()
        attack = Square(eps=EPS[norm] / 3, norm=norm, queries=200, restarts=2, look_ahead=look_ahead)
        results.append((attack.run(model, images, labels), len(passes)))
    (plain, many), (ahead, few) = results
    torch.testing.assert_close(ahead.images, plain.images, rtol=0, atol=1e-9)
    assert torch.equal(ahead.success, plain.success)
    assert torch.equal(ahead.iterations, plain.iterations)
    assert (~plain.success).any()
    assert few < 2 * many / 3
    assert bool((ahead.queries >= plain.queries).all())


def test_progress_rises_to_its_end() -> None:
    model = make_model()
    images, labels = make_batch(model)
    told: list[tuple[int, int]] = []
    Square(eps=0.001, queries=30, restarts=2).run(
        model, images, labels, progress=lambda done, total: told.append((done, total))
    )
    assert told == sorted(told)
    assert told[-1] == (60, 60)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 8}, "eps=8 is larger than the pixel range"),
        ({"norm": "l0"}, "norm='l0' does not exist here"),
        ({"queries": 0}, "queries=0: at least one"),
        ({"restarts": 0}, "restarts=0"),
        ({"p_init": 0}, "p_init=0 is a share"),
        ({"p_init": 1.2}, "p_init=1.2 is a share"),
        ({"loss": "dlr"}, "loss='dlr' does not exist: choose margin or ce"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Square(**settings)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 7), (1, 4, 9), (2, 31, 5)])
@pytest.mark.parametrize("norm", list(EPS))
def test_odd_shapes(norm: str, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    images = torch.rand(3, *shape)
    model = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 3))
    result = Square(eps=0.3, norm=norm, queries=60).run(model, images, model(images).argmax(1))
    assert float(result.norms[norm].max()) <= 0.3 + 1e-6


# -- on real networks --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.timeout(3000)
def test_on_a_provably_robust_network(mnist: Trained) -> None:
    model, images, labels = mnist
    certified = margins(model, images, labels, 0.1) > 0
    expected = robust_accuracy(model, theirs(model, "linf", 0.1, n_queries=2000).perturb(images, labels), labels)
    result = Square(eps=0.1, queries=2000).run(model, images, labels)
    found = robust_accuracy(model, result.images, labels)
    assert found <= expected + 0.005
    # image by image: what is certified withstands, and the attack leaves little more than that
    assert not result.success[certified].any()
    share = float(certified.double().mean())
    assert share <= found <= share + 0.015


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.timeout(3000)
def test_on_a_natural_network(cifar: Trained) -> None:
    model, images, labels = cifar.model, cifar.images[:100], cifar.labels[:100]
    # its squares are the same for all images of a batch, and its result varies by a point or two between seeds
    expected = sum(
        robust_accuracy(model, theirs(model, "linf", 2 / 255, n_queries=500, seed=seed).perturb(images, labels), labels)
        for seed in range(3)
    )
    found = robust_accuracy(model, Square(eps=2 / 255, queries=500)(model, images, labels), labels)
    assert 0.3 < found <= expected / 3 + 0.005
    found = robust_accuracy(model, Square(eps=8 / 255, queries=1000)(model, images, labels), labels)
    assert found <= 0.02

"""Random noise: the promise, where its points lie, and that neither chunks nor neighbours change them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance import CHECKS, CLASSES, SHAPE, Setting, Trained, evaluate, make_batch, make_model
from test_accounting import Counting
from test_conformance import COSTLY, EPS, MASK, bind
from torch import Tensor

from lightning_robust.attacks import PGD
from lightning_robust.attacks.random_noise import RandomNoise
from lightning_robust.errors import UserError


@pytest.mark.parametrize("kind", ["uniform", "sign"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", list(EPS))
def test_promise(norm: str, targeted: bool, masked: bool, kind: str) -> None:
    setting = Setting(norm, EPS[norm], MASK if masked else None, targeted)
    run = bind(RandomNoise(eps=EPS[norm], norm=norm, draws=8, kind=kind, max_batch=16), setting)
    for name, check in CHECKS.items():
        if name not in COSTLY:
            check(run, setting)


@pytest.mark.parametrize("check", sorted(COSTLY))
def test_promise_around_the_model(check: str) -> None:
    setting = Setting("linf", 0.05)
    CHECKS[check](bind(RandomNoise(eps=0.05, draws=8), setting), setting)


class Seen:
    """A model that is never fooled and keeps what it is shown."""

    def __init__(self) -> None:
        self.images: list[Tensor] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.images.append(images)
        return torch.tensor([1.0, 0.0]).expand(len(images), 2) + 0 * images.flatten(1)[:, :1]


@pytest.mark.parametrize("norm", list(EPS))
def test_points_fill_the_ball(norm: str) -> None:
    images = torch.full((1, *SHAPE), 0.5)
    labels = torch.zeros(1, dtype=torch.int64)
    for kind in ("uniform", "sign"):
        model = Seen()
        RandomNoise(eps=0.1, norm=norm, draws=800, kind=kind, max_batch=100)(model, images, labels)
        delta = torch.cat(model.images[1:]) - 0.5
        assert len(delta) == 800
        different = len(torch.unique(delta[:, 0, 0, 0]))
        assert different == 2 if kind == "sign" else different > 700  # float32 next to 0.5 is coarse
        order = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
        size = delta.flatten(1).norm(p=order, dim=1)
        assert bool((size > 0.09).all())  # nearly all of a ball of 192 dimensions is near its surface
        assert bool((size <= 0.1 + 1e-6).all())
        assert float(delta.mean().abs()) < 0.02 * float(delta.abs().mean())
        if kind == "sign":
            length = delta.abs().flatten()
            assert torch.allclose(length, length[0].expand_as(length))
        elif norm == "linf":
            assert float(delta.abs().mean()) == pytest.approx(0.05, rel=0.02)


def test_the_whole_budget_goes_where_the_mask_lets_it() -> None:
    model = Seen()
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, 0, 0] = mask[1, :, :, 3] = 1
    labels = torch.zeros(2, dtype=torch.int64)
    RandomNoise(eps=0.2, norm="l2", draws=5, kind="sign")(model, torch.full((2, *SHAPE), 0.5), labels, mask=mask)
    delta = (torch.cat(model.images[1:]) - 0.5).flatten(1)
    assert torch.allclose(delta.norm(dim=1), torch.full((10,), 0.2))
    assert delta.ne(0).sum(1).tolist() == [3] * 5 + [24] * 5


@pytest.mark.parametrize("kind", ["uniform", "sign"])
def test_chunks_do_not_change_the_result(kind: str, digits: Trained) -> None:
    images, labels = digits.images[:50].double(), digits.labels[:50]
    model = digits.model.double()
    try:
        results = [
            RandomNoise(eps=0.3, draws=60, kind=kind, max_batch=size).run(model, images, labels, rounding=False)
            for size in (1000, 64, 7)
        ]
    finally:
        model.float()
    assert 0 < int(results[0].success.sum()) < 50
    for result in results[1:]:
        torch.testing.assert_close(result.images, results[0].images, rtol=0, atol=1e-9)
        assert torch.equal(result.success, results[0].success)
        assert torch.equal(result.iterations, results[0].iterations)


def test_the_first_point_that_fools_is_returned(digits: Trained) -> None:
    images, labels = digits.images[:50], digits.labels[:50]
    few = RandomNoise(eps=0.3, draws=20).run(digits.model, images, labels)
    many = RandomNoise(eps=0.3, draws=200).run(digits.model, images, labels)
    assert many.success.sum() > few.success.sum()
    assert torch.equal(many.images[few.success], few.images[few.success])
    assert torch.equal(many.iterations[few.success], few.iterations[few.success])


def test_passes_are_no_larger_than_allowed_and_queries_are_counted() -> None:
    images, labels = make_batch(make_model(), 12)
    labels = torch.where(torch.arange(12) % 4 == 0, (labels + 1) % CLASSES, labels)
    model = Counting(make_model())
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    known = evaluate(model.inner, images)
    result = RandomNoise(eps=0.2, draws=33, max_batch=5).run(model, images, labels, clean_logits=known, rounding=False)
    assert max(sizes) <= 5
    assert int(result.queries.sum()) == model.images
    assert not result.queries[::4].any()
    assert bool((result.iterations <= result.queries).all())
    assert bool((result.iterations[~result.success] == 33).all())


def test_gradients_beat_noise_and_corners_beat_the_inside(digits: Trained) -> None:
    model, images, labels = digits.model, digits.images[:128], digits.labels[:128]
    share = {
        attack: float(attack.run(model, images, labels).success.double().mean())
        for attack in (
            RandomNoise(eps=0.12, draws=100),
            RandomNoise(eps=0.12, draws=100, kind="sign"),
            PGD(eps=0.12, steps=10),
        )
    }
    uniform, corners, pgd = share.values()
    assert uniform < corners < pgd


def test_probabilities_are_fine_and_no_gradient_is_asked_for(digits: Trained, recwarn: pytest.WarningsRecorder) -> None:
    def model(images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return digits.model(images.round(decimals=1)).softmax(1)

    assert RandomNoise(eps=0.3, draws=50).run(model, digits.images[:20], digits.labels[:20]).success.any()
    assert not recwarn


def test_progress_rises_to_its_end() -> None:
    told: list[tuple[int, int]] = []
    images = torch.full((2, *SHAPE), 0.5)
    RandomNoise(draws=50, max_batch=16).run(
        Seen(), images, torch.zeros(2).long(), progress=lambda done, total: told.append((done, total))
    )
    assert told == sorted(told)
    assert told[-1] == (50, 50)
    assert RandomNoise().draws == 10_000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": -1}, "negative"),
        ({"norm": "l0"}, "norm='l0' does not exist here"),
        ({"draws": 0}, "draws=0: at least one"),
        ({"max_batch": 0}, "max_batch=0"),
        ({"kind": "gauss"}, "kind='gauss' does not exist: choose uniform or sign"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RandomNoise(**settings)

"""OptMargin: the promise, what its neighbourhoods are, its account, and the vote that it was made to break."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance import CHECKS, CLASSES, Run, Setting, Trained, evaluate, make_batch, make_model
from torch import Tensor, nn

from lightning_robust.attacks import CW, OptMargin, accelerate
from lightning_robust.attacks.base import AttackResult
from lightning_robust.attacks.randomness import image_keys, mix_seed, uniform
from lightning_robust.defenses import RegionBased
from lightning_robust.errors import UserError

QUICK = {"steps": 8, "binary_search_steps": 2, "initial_const": 1.0, "lr": 0.05}
SETTINGS = {"steps": 60, "binary_search_steps": 3, "initial_const": 1.0, "lr": 0.03}
COSTLY = {"compiled model", "DDP-wrapped model", "under bf16 autocast"}


def bind(attack: OptMargin, setting: Setting) -> Run:
    def run(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        targets = (labels + 1) % CLASSES if setting.targeted else None
        return attack.run(model, images, labels, targets=targets, mask=setting.mask).images

    return run


@pytest.mark.parametrize(("eps", "targeted"), [(None, False), (None, True), (0.8, False)])
def test_promise(eps: float | None, targeted: bool) -> None:
    setting = Setting("l2", torch.inf if eps is None else eps, None, targeted)
    settings = {**QUICK, "steps": 16, "initial_const": 10.0} if targeted else QUICK
    broken = {}
    for name, check in CHECKS.items():
        if name in COSTLY:
            continue
        try:
            check(bind(OptMargin(radius=0.005, surrogates=3, eps=eps, **settings), setting), setting)
        except AssertionError as error:
            broken[name] = str(error)
    assert not broken


# -- the neighbourhood -------------------------------------------------------------------------------------------------


def neighbours(attack: OptMargin, result: AttackResult, images: Tensor) -> Tensor:
    """The points ``(N, surrogates - 1, C, H, W)`` x + δ + v: v are corners of the cube, each image's own."""
    keys = image_keys(images, mix_seed(attack.seed))
    corners = [
        torch.where(uniform(keys, images.shape, images.dtype, stream=number) < 0.5, 1.0, -1.0)
        for number in range(1, attack.surrogates)
    ]
    radius = float(attack.radius)
    return torch.stack([(result.images + radius * corner).clamp(0, 1) for corner in corners], dim=1)


@pytest.mark.parametrize("targeted", [False, True])
def test_where_it_succeeds_all_its_neighbours_fool(digits: Trained, targeted: bool) -> None:
    images, labels = digits.images[:30], digits.labels[:30]
    targets = (labels + 3) % 10
    attack = OptMargin(radius=0.1, surrogates=8, seed=5, **SETTINGS)
    result = attack.run(digits.model, images, labels, targets=targets if targeted else None)
    assert result.success.double().mean() > 0.9
    wrong = evaluate(digits.model, images).argmax(1) != labels
    searched = result.success if targeted else result.success & ~wrong
    near = neighbours(attack, result, images)[searched]
    found = evaluate(digits.model, near.flatten(0, 1)).argmax(1).view(near.shape[:2])
    goal = (targets if targeted else labels)[searched, None]
    assert bool(((found == goal) if targeted else (found != goal)).all())
    assert torch.equal(result.images[~result.success], images[~result.success])
    # which is more than a point at the boundary has
    plain = CW(**SETTINGS).run(digits.model, images, labels, targets=targets if targeted else None)
    near = neighbours(attack, plain, images)[searched]
    found = evaluate(digits.model, near.flatten(0, 1)).argmax(1).view(near.shape[:2])
    assert float(((found == goal) if targeted else (found != goal)).double().mean()) < 0.95


def test_confidence_is_a_lead_that_all_neighbours_have(digits: Trained) -> None:
    images, labels = digits.images[:20], digits.labels[:20]
    attack = OptMargin(radius=0.05, surrogates=5, confidence=2, **SETTINGS)
    result = attack.run(digits.model, images, labels)
    assert result.success.all()
    todo = evaluate(digits.model, images).argmax(1) == labels
    near = neighbours(attack, result, images)[todo]
    logits = evaluate(digits.model, near.flatten(0, 1))
    true = labels[todo].repeat_interleave(4)[:, None]
    lead = logits.scatter(1, true, -torch.inf).amax(1) - logits.gather(1, true)[:, 0]
    assert float(lead.min()) >= 2 - 1e-4


def test_it_fools_the_vote_of_a_region_and_cw_does_not(digits: Trained) -> None:
    """He, Li & Song's claim: a minimal perturbation is outvoted by its neighbourhood, theirs is not."""
    images, labels = digits.images[:40], digits.labels[:40]
    right = evaluate(digits.model, images).argmax(1) == labels
    images, labels = images[right], labels[right]
    radius = 0.15
    vote = RegionBased(digits.model, radius=radius, votes=100)
    plain = CW(**SETTINGS).run(digits.model, images, labels)
    margin = OptMargin(radius=radius, **SETTINGS).run(digits.model, images, labels)
    assert plain.success.all()
    assert margin.success.double().mean() > 0.95
    fooled = {
        name: float((vote(found.images).argmax(1) != labels).double().mean())
        for name, found in (("clean", CW(eps=0.0).run(digits.model, images, labels)), ("cw", plain), ("om", margin))
    }
    assert fooled["clean"] < 0.1
    assert fooled["cw"] < 0.4
    assert fooled["om"] > 0.9
    # at a distortion of the same order
    size = [float(found.norms["l2"][margin.success].mean()) for found in (plain, margin)]
    assert size[0] < size[1] < 2.5 * size[0]


def test_a_larger_cube_costs_more_distortion(digits: Trained) -> None:
    images, labels = digits.images[:20], digits.labels[:20]
    found = [OptMargin(radius=r, surrogates=6, **SETTINGS).run(digits.model, images, labels) for r in (0.02, 0.1, 0.2)]
    all_three = torch.stack([result.success for result in found]).all(0)
    assert all_three.double().mean() > 0.8
    sizes = [float(result.norms["l2"][all_three].mean()) for result in found]
    assert sizes[0] < sizes[1] < sizes[2]


# -- what it depends on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_the_result_does_not_depend_on_the_chunks(chunk: int) -> None:
    model = make_model(torch.float64).eval()
    images, labels = make_batch(model, dtype=torch.float64)
    attack = OptMargin(radius=0.01, surrogates=5, **QUICK)
    expected = attack.run(model, images, labels)
    found = attack.replace(chunk=chunk).run(model, images, labels)
    torch.testing.assert_close(found.images, expected.images, rtol=0, atol=1e-9)
    assert torch.equal(found.queries, expected.queries)


def test_neighbours_in_the_batch_and_in_the_mask_play_no_part() -> None:
    model = make_model(torch.float64).eval()
    images, labels = make_batch(model, dtype=torch.float64)
    attack = OptMargin(radius=0.01, surrogates=4, **QUICK)
    mask = torch.zeros(8, 8)
    mask[:, :5] = 1
    together = attack.run(model, images, labels, mask=mask)
    assert torch.equal(together.images[..., 5:], images[..., 5:])
    for row in (0, 3):
        alone = attack.run(model, images[row : row + 1], labels[row : row + 1], mask=mask)
        torch.testing.assert_close(alone.images[0], together.images[row], rtol=0, atol=1e-9)
        assert int(alone.queries[0]) == int(together.queries[row])


def test_another_seed_is_another_neighbourhood(digits: Trained) -> None:
    images, labels = digits.images[:8], digits.labels[:8]
    attack = OptMargin(radius=0.1, surrogates=4, **SETTINGS)
    once = attack(digits.model, images, labels)
    assert torch.equal(attack(digits.model, images, labels), once)
    other = attack.replace(seed=1)(digits.model, images, labels)
    assert not torch.equal(other, once)
    assert torch.equal(other, attack(digits.model, images, labels, seed=1))


def test_a_stand_in_loses_no_success(digits: Trained) -> None:
    images, labels = digits.images[:30], digits.labels[:30]
    attack = OptMargin(radius=0.05, surrogates=5, **SETTINGS)
    result = attack.run(digits.model, images, labels, stand_in=accelerate(digits.model))
    assert torch.equal(evaluate(digits.model, result.images).argmax(1) != labels, result.success)
    assert result.success.all()


# -- its account -------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Counts the images that pass through, and notes which are different."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.images, self.largest = inner, 0, 0
        self.different: set[bytes] = set()

    def forward(self, images: Tensor) -> Tensor:
        self.images += len(images)
        self.largest = max(self.largest, len(images))
        self.different.update(image.numpy().tobytes() for image in images.detach())
        return self.inner(images)


@pytest.mark.parametrize("known", [False, True], ids=["", "clean logits known"])
def test_queries_are_the_points_at_which_the_model_was_asked(digits: Trained, known: bool) -> None:
    images, labels = digits.images[:12], digits.labels[:12]
    labels = torch.where(torch.arange(12) % 4 == 0, (labels + 1) % 10, labels)
    wrong = evaluate(digits.model, images).argmax(1) != labels
    model, copies = Counting(digits.model), 5
    logits = evaluate(digits.model, images) if known else None
    attack = OptMargin(radius=0.1, surrogates=copies, steps=30, binary_search_steps=3, initial_const=1, chunk=16)
    result = attack.run(model, images, labels, rounding=False, clean_logits=logits)
    queries = int(result.queries.sum())
    # a hit is passed through once, what was taken for one wrongly twice
    assert len(model.different) <= queries <= model.images <= 1.5 * queries
    assert model.largest <= 16
    first = 0 if known else 1
    assert bool((result.queries[wrong] == first).all())
    assert not result.iterations[wrong].any()
    # each look is at all of an image's points: the clean image's first, 29 steps of 3 rounds, and 6 on the way back
    assert bool(((result.queries[~wrong] - first) % copies == 0).all())
    assert int(result.queries.max()) <= first + copies * (1 + 3 * 29 + 6)
    assert int(result.iterations.max()) <= 3 * 30


def test_success_is_what_the_model_says_and_a_budget_is_kept_to(digits: Trained) -> None:
    images, labels = digits.images[:40], digits.labels[:40]
    attack = OptMargin(radius=0.05, surrogates=5, **SETTINGS)
    free = attack.run(digits.model, images, labels)
    bound = float(free.norms["l2"].median())
    held = attack.replace(eps=bound).run(digits.model, images, labels)
    assert torch.equal(evaluate(digits.model, held.images).argmax(1) != labels, held.success)
    assert torch.equal(held.images[~held.success], images[~held.success])
    assert float(held.norms["l2"].max()) <= bound + 1e-6
    assert float((held.success == (free.norms["l2"] <= bound)).double().mean()) > 0.9
    assert int(held.queries.sum()) < int(free.queries.sum())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"radius": 0}, "OptMargin: radius=0: give pixel units above 0"),
        ({"radius": 8}, "OptMargin: radius=8"),
        ({"radius": "wide"}, "radius='wide' is not a number"),
        ({"surrogates": 1}, "OptMargin: surrogates=1: the image itself is one.*CW"),
        ({"chunk": 0}, "OptMargin: chunk=0: at least one point"),
        ({"confidence": -1}, "OptMargin: confidence=-1.*0 or more"),
        ({"steps": 0}, "OptMargin: steps=0: at least one step"),
        ({"binary_search_steps": 0}, "OptMargin: binary_search_steps=0: at least one round"),
        ({"lr": 0.0}, "OptMargin: lr=0.0 never moves"),
        ({"initial_const": 0}, "OptMargin: initial_const=0.*begin above 0"),
        ({"eps": -1}, "negative"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        OptMargin(**settings)


class _Broken(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([(images.flatten(1).sum(1) * 0).sqrt(), images.flatten(1).sum(1) * 0 - 1], dim=1)


def test_a_gradient_that_is_not_finite_is_no_robustness() -> None:
    with pytest.raises(UserError, match="gradient is NaN"):
        OptMargin()(_Broken(), torch.rand(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64))

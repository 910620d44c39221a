"""What an attack says about its work is what it did, and it does no more than it has to."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance import CLASSES, evaluate, make_batch, make_model
from torch import Tensor, nn

from lightning_robust.attacks import APGD, FGSM, PGD, External
from lightning_robust.attacks.kl_pgd import KLPGD


class Counting(nn.Module):
    """Counts the images that pass through, and how many of them are different."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.images = inner, 0
        self.different: set[bytes] = set()

    def forward(self, images: Tensor) -> Tensor:
        self.images += len(images)
        self.different.update(image.numpy().tobytes() for image in images.detach())
        return self.inner(images)


ATTACKS: list[Any] = [
    PGD(eps=0.05, steps=4),
    PGD(eps=0.05, steps=4, random_start=False),
    PGD(eps=0.05, steps=3, restarts=3),
    PGD(eps=0.05, steps=4, stop_at_success=False),
    PGD(eps=0.05, steps=3, restarts=2, stop_at_success=False),
    FGSM(eps=0.05),
    APGD(eps=0.05, steps=5),
    APGD(eps=0.05, steps=5, restarts=2),
    APGD(eps=0.05, steps=5, stop_at_success=False),
    APGD(eps=0.05, steps=5, loss="dlr_targeted", n_targets=2),
    KLPGD(eps=0.05, steps=4),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_queries_are_the_points_at_which_the_model_was_asked(attack: Any) -> None:
    images, labels = make_batch(make_model(), 16)
    labels = torch.where(torch.arange(16) % 4 == 0, (labels + 1) % CLASSES, labels)
    model = Counting(make_model())
    result = attack.run(model, images, labels, rounding=False)
    if not attack.stop_at_success and isinstance(attack, PGD) and attack.restarts == 1:
        # nothing in the attack needs to know about success: run() asks once at the end, for its account
        model.images -= len(images)
        model.different -= {image.numpy().tobytes() for image in result.images}
    queries = int(result.queries.sum())
    if attack.stop_at_success:
        # a pass may be repeated for the few images that need a gradient
        assert len(model.different) <= queries <= model.images
        assert queries - len(model.different) <= len(images)  # a start may be the clean image itself
    else:
        assert queries == model.images
    assert bool((result.iterations <= result.queries).all())


@pytest.mark.parametrize("attack", [a for a in ATTACKS if a.stop_at_success], ids=str)
def test_what_is_misclassified_costs_one_pass_or_none(attack: Any) -> None:
    model = Counting(make_model())
    images, labels = make_batch(model.inner)
    labels = (labels + 1) % CLASSES
    result = attack.run(model, images, labels, rounding=False)
    assert model.images == len(images)
    assert result.success.all()
    assert not result.iterations.any()
    model.images = 0
    attack.run(model, images, labels, rounding=False, clean_logits=evaluate(model.inner, images))
    assert model.images == 0


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_known_clean_logits_change_the_cost_and_not_the_result(attack: Any) -> None:
    model = make_model()
    images, labels = make_batch(model, 16)
    labels[::4] = (labels[::4] + 1) % CLASSES
    plain = attack.run(model, images, labels)
    known = attack.run(model, images, labels, clean_logits=evaluate(model, images))
    torch.testing.assert_close(known.images, plain.images)
    assert torch.equal(known.success, plain.success)
    assert bool((known.queries <= plain.queries).all())


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_success_is_what_the_model_says(attack: Any) -> None:
    model = make_model()
    images, labels = make_batch(model, 24)
    result = attack.run(model, images, labels)
    assert torch.equal(result.success, evaluate(model, result.images).argmax(1) != labels)
    rounded = evaluate(model, (result.images * 255).round() / 255).argmax(1) != labels
    assert torch.equal(result.success_8bit, rounded & result.success)
    assert not attack.run(model, images, labels, rounding=False).success_8bit.any()
    assert torch.equal(attack(model, images, labels), result.images)


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_progress_rises_to_its_end(attack: Any) -> None:
    model = make_model()
    images, labels = make_batch(model)
    told: list[tuple[int, int]] = []
    attack.run(model, images, labels, progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert all(0 < done <= total for done, total in told)
    assert len({total for _, total in told}) == 1
    if not attack.stop_at_success:
        assert told[-1][0] == told[-1][1]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("make", [PGD, APGD])
def test_stopping_changes_the_cost_and_not_the_success(make: type[PGD] | type[APGD], norm: str) -> None:
    model = make_model()
    images, labels = make_batch(model, 32)
    eps = {"linf": 0.02, "l2": 0.2, "l1": 1.0}[norm]
    early = make(eps=eps, norm=norm, steps=5).run(model, images, labels)
    late = make(eps=eps, norm=norm, steps=5, stop_at_success=False).run(model, images, labels)
    assert 0 < int(late.success.sum()) < 32
    assert not bool((late.success & ~early.success).any())
    assert early.queries.sum() < late.queries.sum() + 32
    # an image that withstands takes the same way in both
    withstand = ~early.success
    torch.testing.assert_close(early.images[withstand], late.images[withstand])


def test_restarts_only_add_successes() -> None:
    model = make_model()
    images, labels = make_batch(model, 64)
    for make in (PGD, APGD):
        once, often = (make(eps=0.015, steps=3, restarts=n).run(model, images, labels) for n in (1, 6))
        assert not bool((once.success & ~often.success).any())
        assert torch.equal(once.images[once.success], often.images[once.success])


def test_of_several_runs_without_stopping_the_strongest_is_kept() -> None:
    model = make_model().eval()
    images, labels = make_batch(model, 32)

    def loss(adversarial: Tensor) -> Tensor:
        return F.cross_entropy(evaluate(model, adversarial), labels, reduction="none")

    attack = PGD(eps=0.015, steps=2, step_size=0.005, stop_at_success=False)
    one, many = attack(model, images, labels), attack.replace(restarts=5)(model, images, labels)
    fooled = [evaluate(model, adversarial).argmax(1) != labels for adversarial in (one, many)]
    assert not bool((fooled[0] & ~fooled[1]).any())
    same = fooled[0] == fooled[1]
    assert bool((loss(many)[same] >= loss(one)[same] - 1e-6).all())
    assert loss(many).mean() > loss(one).mean()


@pytest.mark.parametrize("make", [PGD, APGD])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_seeds(make: type[PGD] | type[APGD], norm: str) -> None:
    model = make_model()
    images, labels = make_batch(model)
    attack = make(eps=0.3, norm=norm, steps=1, stop_at_success=False, seed=5)
    first = attack(model, images, labels)
    assert torch.equal(attack(model, images, labels, seed=5), first)
    assert torch.equal(attack.replace(seed=6)(model, images, labels), attack(model, images, labels, seed=6))
    assert not torch.equal(attack(model, images, labels, seed=6), first)
    assert torch.equal(attack.run(model, images, labels, seed=6).images, attack(model, images, labels, seed=6))


def test_the_gradient_at_the_clean_image_comes_along_where_it_was_computed() -> None:
    model = make_model()
    images, labels = make_batch(model)
    result = PGD(eps=0.05, random_start=False, stop_at_success=False).run(model, images, labels)
    model.eval()
    images.requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(model(images), labels, reduction="sum"), images)
    assert result.clean_gradient is not None
    torch.testing.assert_close(result.clean_gradient, expected)
    assert PGD(eps=0.05).run(model, images.detach(), labels).clean_gradient is None


def test_targeted_attacks_reach_their_targets() -> None:
    model = make_model()
    images, labels = make_batch(model, 16)
    targets = (labels + 2) % CLASSES
    for attack in (PGD(eps=0.3, steps=20), APGD(eps=0.3, steps=20), APGD(eps=0.3, steps=20, loss="dlr_targeted")):
        result = attack.run(model, images, labels, targets=targets)
        assert torch.equal(result.success, evaluate(model, result.images).argmax(1) == targets)
        assert result.success.double().mean() > 0.8


def test_an_attack_is_its_settings() -> None:
    attack = PGD(eps="8/255", step_size="2/255")
    assert attack == PGD(eps="8/255", step_size="2/255")
    assert attack != PGD(eps="4/255", step_size="2/255")
    assert attack.length == 2 / 255
    assert PGD(eps=0.1, steps=10).length == pytest.approx(0.025)
    assert FGSM(eps=0.1).length == pytest.approx(0.1)
    assert FGSM(eps=0.1, steps=4).length == pytest.approx(0.025)
    settings = {f.name: getattr(attack, f.name) for f in fields(attack) if f.init}
    assert PGD(**settings) == attack
    assert all(isinstance(value, (str, int, float, bool, type(None))) for value in settings.values())
    assert attack.replace(steps=3).steps == 3


def test_someone_else_s_attack_keeps_our_promise() -> None:
    """torchattacks' PGD with four times the budget: what comes out is held to ours, and the generator is put back."""
    torchattacks = pytest.importorskip("torchattacks")
    model = make_model()
    images, labels = make_batch(model)
    attack = External(function=lambda m, x, y: torchattacks.PGD(m, eps=0.2, alpha=0.1, steps=3)(x, y), eps=0.05)
    state = torch.get_rng_state()
    with torch.inference_mode():
        result = attack.run(model, images, labels)
    assert torch.equal(state, torch.get_rng_state())
    assert (result.images - images).abs().max() <= 0.05 + 1e-6
    assert torch.equal(result.images, attack(model, images, labels))
    assert not torch.equal(result.images, attack(model, images, labels, seed=1))
    assert torch.equal(attack.replace(seed=1)(model, images, labels), attack(model, images, labels, seed=1))


@pytest.mark.parametrize("attack", [PGD(eps=0.05, steps=4), APGD(eps=0.05, steps=4)], ids=str)
def test_no_backward_pass_is_spent_on_images_that_leave(attack: Any) -> None:
    """One image of sixteen goes on: it alone is differentiated, along the way that it would have taken alone."""
    model = make_model(torch.float64).eval()
    images, labels = make_batch(model, 16, torch.float64)
    sizes: list[int] = []

    class Watched(nn.Module):
        def forward(self, points: Tensor) -> Tensor:
            logits = model(points)
            # all but the first image are fooled as soon as they have moved
            distance = (points - images[1:2]).flatten(1).abs().amax(1)
            moved = (distance > 0) & (distance < 0.06)
            if points.requires_grad:
                logits.register_hook(lambda gradient: sizes.append(len(gradient)))
            return torch.where(moved[:, None], -logits, logits)

    batch = torch.cat([images[:1], images[1:2].expand(15, -1, -1, -1)])
    names = torch.cat([labels[:1], labels[1:2].expand(15)])
    result = attack.run(Watched().eval(), batch, names)
    assert bool(result.success[1:].all())
    assert sizes
    assert max(sizes) == 1
    torch.testing.assert_close(result.images[0], attack(model, images[:1], labels[:1])[0])


def test_an_attack_does_not_import_the_compiler() -> None:
    """It would take a second and 100 MB, for nothing where no model is compiled."""
    code = (
        "import sys, torch; from lightning_robust.attacks import PGD, accelerate;"
        "model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3));"
        "PGD(steps=1).run(model, torch.rand(2, 3, 2, 2), torch.tensor([0, 1]), stand_in=accelerate(model));"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

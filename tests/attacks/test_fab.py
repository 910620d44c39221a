"""FAB: the official code, closed forms, and every promise kept."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conformance import CHECKS, CLASSES, SHAPE, Setting, Trained, evaluate, make_batch, make_model
from test_conformance import COSTLY, bind, by_run, by_stand_in
from torch import Tensor, nn

from lightning_robust.attacks import EOT, fab
from lightning_robust.attacks.fab import FAB
from lightning_robust.attacks.hyperplane import smallest_move
from lightning_robust.errors import UserError

MASK = torch.zeros(SHAPE[1:]).index_fill(1, torch.arange(5), 1)  # the five columns on the left
EPS = {"linf": 0.2, "l2": 3.0, "l1": 40.0}
ORDER = {"linf": torch.inf, "l2": 2, "l1": 1}
THEIR_NORM = {"linf": "Linf", "l2": "L2", "l1": "L1"}
NORMS = list(EPS)

# -- promises ---------------------------------------------------------------------------------------------------------


def _cases() -> Iterator[Any]:
    for norm, targeted, masked, bounded in itertools.product(EPS, (False, True), (False, True), (False, True)):
        eps = EPS[norm] if bounded else None
        setting = Setting(norm, EPS[norm] if bounded else torch.inf, MASK if masked else None, targeted)
        name = f"{norm}{'-targeted' * targeted}{'-mask' * masked}{'-eps' * bounded}"
        towards = None if bounded == masked else 2
        attack = FAB(norm=norm, steps=6, restarts=1 + bounded, eps=eps, targeted_classes=towards)
        yield pytest.param(attack, setting, id=name)


CASES = list(_cases())


@pytest.mark.parametrize(("attack", "setting"), CASES)
def test_promise(attack: FAB, setting: Setting) -> None:
    run = bind(attack, setting)
    for name, check in CHECKS.items():
        if name not in COSTLY:
            check(run, setting)


@pytest.mark.parametrize("check", sorted(COSTLY))
@pytest.mark.parametrize(("attack", "setting"), [CASES[-1]])
def test_promise_around_the_model(check: str, attack: FAB, setting: Setting) -> None:
    CHECKS[check](bind(attack, setting), setting)


@pytest.mark.parametrize("through", [by_run, by_stand_in])
def test_promise_of_run(through: Any) -> None:
    setting = Setting("linf", 0.2)
    for name, check in CHECKS.items():
        if name not in COSTLY:
            check(through(FAB(eps=0.2, steps=6, targeted_classes=3), setting), setting)


# -- against the official code ----------------------------------------------------------------------------------------


def predict(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).argmax(1)


def official(norm: str, trained: Trained, eps: float | None, **settings: Any) -> Tensor:
    """What pyautoattack finds; it reads the budget as what to be content with."""
    make = pytest.importorskip("pyautoattack.fab_pt").FABAttack_PT
    attack = make(trained.model, norm=THEIR_NORM[norm], eps=1e9 if eps is None else eps, device="cpu", **settings)
    return attack.perturb(trained.images, trained.labels)


def robust_accuracy(norm: str, trained: Trained, found: Tensor, eps: float) -> float:
    size = (found - trained.images).flatten(1).norm(p=ORDER[norm], dim=1)
    fooled = (predict(trained.model, found) != trained.labels) & (size <= eps + 1e-6)
    return float((~fooled).double().mean())


def compare_robust_accuracy(norm: str, trained: Trained, eps: float, steps: int, towards: int | None) -> float:
    theirs = official(norm, trained, eps, n_iter=steps, targeted=towards is not None, n_target_classes=towards or 9)
    expected = robust_accuracy(norm, trained, theirs, eps)
    result = FAB(norm=norm, eps=eps, steps=steps, targeted_classes=towards).run(*trained)
    ours = robust_accuracy(norm, trained, result.images, eps)
    assert ours == pytest.approx(1 - float(result.success.double().mean()))
    assert ours <= expected + 0.005
    return ours


def compare_norms(norm: str, trained: Trained, steps: int) -> None:
    theirs = official(norm, trained, None, n_iter=steps)
    result = FAB(norm=norm, steps=steps).run(*trained)
    fooled = predict(trained.model, theirs) != trained.labels
    assert result.success.sum() >= fooled.sum()
    both = fooled & result.success & (predict(trained.model, trained.images) == trained.labels)
    assert both.sum() >= 0.1 * len(trained.images)
    expected = (theirs - trained.images).flatten(1).norm(p=ORDER[norm], dim=1)[both].mean()
    assert result.norms[norm][both].mean() <= 1.005 * expected


@pytest.mark.parametrize("towards", [None, 4])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.12), ("l2", 0.6), ("l1", 2.0)])
def test_robust_accuracy_of_the_official_code(norm: str, eps: float, towards: int | None, digits: Trained) -> None:
    some = Trained(digits.model, digits.images[:200], digits.labels[:200])
    assert 0.02 < compare_robust_accuracy(norm, some, eps, 20, towards) < 0.95


@pytest.mark.parametrize("norm", NORMS)
def test_as_near_as_the_official_code(norm: str, digits: Trained) -> None:
    compare_norms(norm, Trained(digits.model, digits.images[:200], digits.labels[:200]), 15)


@pytest.mark.real_data
@pytest.mark.parametrize("norm", NORMS)
def test_as_near_as_the_official_code_on_a_robust_network(norm: str, mnist: Trained) -> None:
    compare_norms(norm, mnist, 20)


@pytest.mark.real_data
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("linf", 0.13), ("l2", 1.5)])
def test_robust_accuracy_of_the_official_code_on_a_robust_network(norm: str, eps: float, mnist: Trained) -> None:
    assert 0.2 < compare_robust_accuracy(norm, mnist, eps, 20, 9) < 0.98
    compare_robust_accuracy(norm, mnist, eps, 20, None)


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.5 / 255), ("linf", 1 / 255), ("l2", 0.1), ("l1", 2.0)])
def test_robust_accuracy_of_the_official_code_on_a_natural_network(norm: str, eps: float, cifar: Trained) -> None:
    assert 0.02 < compare_robust_accuracy(norm, cifar, eps, 15, 9) < 0.9


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_as_near_as_the_official_code_on_a_natural_network(norm: str, cifar: Trained) -> None:
    compare_norms(norm, cifar, 10)


# -- what the algorithm is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("towards", [None, 3])
@pytest.mark.parametrize("norm", NORMS)
def test_it_finds_the_nearest_boundary_of_a_linear_model(norm: str, towards: int | None) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4)).double()
    # near the edges of the box, so that it plays a part
    images = torch.rand(20, 3, 4, 4, dtype=torch.float64) ** 3
    labels = predict(model, images)
    weight, logits = model[1].weight.detach(), model(images).detach()
    expected = torch.stack(
        [
            smallest_move(
                images,
                (weight[k] - weight[labels]).view_as(images),
                logits.gather(1, labels[:, None])[:, 0] - logits[:, k],
                norm,
            )
            .flatten(1)
            .norm(p=ORDER[norm], dim=1)
            .where(labels != k, torch.inf)
            for k in range(4)
        ]
    ).amin(0)
    result = FAB(norm=norm, steps=30, targeted_classes=towards).run(model, images, labels)
    assert result.success.all()
    assert (result.norms[norm] >= expected * (1 - 1e-9)).all()
    # untargeted, the class is chosen without a look at the box, as in the paper
    assert (result.norms[norm] <= expected * (1.01 if towards else 1.1)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_a_targeted_run_ends_at_the_target(norm: str, digits: Trained) -> None:
    model, images, labels = digits.model, digits.images[:100], digits.labels[:100]
    targets = (labels + 3) % 10
    result = FAB(norm=norm, steps=20).run(model, images, labels, targets=targets)
    assert result.success.double().mean() > 0.9
    assert (predict(model, result.images)[result.success] == targets[result.success]).all()
    untargeted = FAB(norm=norm, steps=20).run(model, images, labels)
    both = result.success & untargeted.success
    assert result.norms[norm][both].mean() > untargeted.norms[norm][both].mean()


@pytest.mark.parametrize("norm", NORMS)
def test_steps_restarts_classes_and_the_final_search_do_not_hurt(
    norm: str, digits: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = Trained(digits.model, digits.images[:100], digits.labels[:100])
    base = FAB(norm=norm, steps=8)

    def size(attack: FAB) -> Tensor:
        result = attack.run(*some)
        return torch.where(result.success, result.norms[norm], torch.inf)

    room = 1.0101  # to leave the boundary may take a hundredth more
    once = size(base)
    assert (size(FAB(norm=norm, steps=8, restarts=3)) <= room * once).all()
    assert size(FAB(norm=norm, steps=30)).clamp_max(9).mean() <= once.clamp_max(9).mean()
    one, nine = (size(FAB(norm=norm, steps=8, targeted_classes=k)) for k in (1, 9))
    assert (nine <= room * one).all()
    monkeypatch.setattr(fab, "_FINAL_STEPS", 0)
    without = size(base)
    assert (once <= room * without).all()
    assert once.clamp_max(9).mean() < without.clamp_max(9).mean()


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_are_half_as_far_as_what_is_known(norm: str, digits: Trained) -> None:
    images, labels = digits.images[:40], digits.labels[:40]
    # away from the edges, where clipping would shorten the start
    images = 0.3 + 0.4 * images
    attack = FAB(norm=norm, steps=1, restarts=2)
    first = FAB(norm=norm, steps=1).run(digits.model, images, labels)
    asked: list[Tensor] = []

    class Recording(nn.Module):
        def forward(self, points: Tensor) -> Tensor:
            asked.append(points.detach().clone())
            return digits.model(points)

    attack.run(Recording(), images, labels, rounding=False)
    calls = 3 + (fab._FINAL_STEPS if first.success.any() else 0)  # clean, gradient, first step, final search
    rows = (predict(digits.model, images) == labels).nonzero()[:, 0]
    starts = asked[calls]
    assert len(starts) == len(rows)
    known = torch.where(first.success, first.norms[norm], {"linf": 0.3, "l2": 1.0, "l1": 5.0}[norm])[rows]
    size = (starts - images[rows]).flatten(1).norm(p=ORDER[norm], dim=1)
    torch.testing.assert_close(size, known / 2, rtol=1e-3, atol=1e-5)


def test_the_scale_of_the_logits_does_not_matter(digits: Trained) -> None:
    """Distilled networks have gradients whose squares underflow."""

    class Scaled(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return digits.model(images) * 1e-25

    images, labels = digits.images[:32], digits.labels[:32]
    for norm in NORMS:
        attack = FAB(norm=norm, steps=6)
        expected, result = attack.run(digits.model, images, labels), attack.run(Scaled(), images, labels)
        assert (result.success == expected.success).double().mean() > 0.95
        both = result.success & expected.success
        assert result.norms[norm][both].mean() == pytest.approx(float(expected.norms[norm][both].mean()), rel=0.01)


def test_averages_over_equal_draws_change_nothing(digits: Trained) -> None:
    images, labels = digits.images[:32], digits.labels[:32]
    for towards in (None, 2):
        attack = FAB(norm="l2", steps=5, targeted_classes=towards)
        plain = attack.run(digits.model, images, labels)
        averaged = EOT(attack=attack, samples=2).run(digits.model, images, labels)
        assert (averaged.success == plain.success).double().mean() > 0.95
        assert averaged.norms["l2"].mean() == pytest.approx(float(plain.norms["l2"].mean()), rel=0.01)


# -- what it costs ----------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Counts the images that pass through, how many are different, and the images of backward passes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.forwards, self.backwards = inner, 0, 0
        self.different: set[bytes] = set()

    def forward(self, images: Tensor) -> Tensor:
        self.forwards += len(images)
        self.different.update(image.numpy().tobytes() for image in images.detach())
        logits = self.inner(images)
        if logits.requires_grad:
            logits.register_hook(self._backward)
        return logits

    def _backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("attack", [FAB(steps=6), FAB(norm="l2", steps=6, targeted_classes=2, restarts=2)], ids=str)
def test_queries_are_the_points_at_which_the_model_was_asked(attack: FAB, known: bool) -> None:
    images, labels = make_batch(make_model(), 16)
    labels = torch.where(torch.arange(16) % 4 == 0, (labels + 1) % CLASSES, labels)
    model = Counting(make_model())
    clean_logits = evaluate(model.inner, images) if known else None
    model.forwards = 0
    model.different.clear()
    result = attack.run(model, images, labels, rounding=False, clean_logits=clean_logits)
    queries = int(result.queries.sum())
    assert len(model.different) <= queries <= model.forwards
    # every run towards another class starts at the clean image
    assert queries - len(model.different) <= len(images) * (attack.targeted_classes or 1)
    runs = attack.restarts * (attack.targeted_classes or 1)
    wrong = torch.arange(16) % 4 == 0
    assert (result.iterations[~wrong] == 6 * runs).all()
    assert not result.iterations[wrong].any()
    assert (result.queries[wrong] == (0 if known else 1)).all()
    # one gradient a step, and a second forward pass only where a step has fooled the model
    if attack.targeted_classes:
        assert model.forwards <= int((2 * result.iterations).sum()) + 8 * 16 * runs
        assert model.backwards <= int(1.5 * result.iterations.sum()) + 2 * 16 * runs


def test_what_is_within_the_budget_leaves(digits: Trained) -> None:
    model = Counting(digits.model)
    images, labels = digits.images[:100], digits.labels[:100]
    easy = FAB(eps=0.5, steps=20, targeted_classes=9).run(model, images, labels, rounding=False)
    assert easy.success.all()
    assert easy.iterations.double().mean() < 5
    assert model.forwards < 15 * 100
    hard = FAB(eps=1e-4, steps=20, targeted_classes=2).run(digits.model, images, labels, rounding=False)
    right = predict(digits.model, images) == labels
    assert (hard.iterations[right] == 40).all()
    assert torch.equal(hard.images[right], images[right])


def test_little_memory_gives_the_same_images(digits: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    # float64: in another batch sums round otherwise, and a path along the boundary shows it
    model, images, labels = digits.model.double(), digits.images[:10].double(), digits.labels[:10]
    try:
        expected = FAB(steps=5)(model, images, labels)
        monkeypatch.setattr(fab, "_GRADIENT_VALUES", 1)  # one image at a time
        torch.testing.assert_close(FAB(steps=5)(model, images, labels), expected, rtol=0, atol=1e-9)
    finally:
        digits.model.float()


def test_progress(digits: Trained) -> None:
    told: list[tuple[int, int]] = []
    FAB(steps=3, targeted_classes=2, restarts=2).run(
        digits.model, digits.images[:8], digits.labels[:8], progress=lambda done, total: told.append((done, total))
    )
    assert told[-1] == (12, 12)
    assert told == sorted(told)
    assert len(told) == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "l0"}, "norm='l0'.*choose one of linf, l2, l1"),
        ({"steps": 0}, "steps=0: at least one step"),
        ({"restarts": 0}, "restarts=0: at least one run"),
        ({"targeted_classes": 0}, "targeted_classes=0: give the number"),
        ({"alpha_max": 0}, "alpha_max=0 is a share"),
        ({"alpha_max": 1.5}, "alpha_max=1.5 is a share"),
        ({"eta": 0.9}, "eta=0.9 would stop short"),
        ({"beta": 1}, "beta=1 is a share"),
        ({"eps": 8}, "did you mean 8/255"),
        ({"eps": -1}, "negative"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FAB(**settings)

"""DeepFool: what the original finds, in fewer passes, with every promise kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conformance import CHECKS, CLASSES, SHAPE, Setting, Trained, evaluate, make_batch, make_model
from test_conformance import COSTLY, bind, by_run, by_stand_in
from torch import Tensor, nn

from lightning_robust.attacks import EOT, deepfool
from lightning_robust.attacks.deepfool import DeepFool
from lightning_robust.errors import UserError

MASK = torch.zeros(SHAPE[1:]).index_fill(1, torch.arange(5), 1)  # the five columns on the left
EPS = {"l2": 3.0, "linf": 0.2}
ORDER = {"l2": 2, "linf": torch.inf}


def _cases() -> Iterator[Any]:
    for norm, targeted, masked, bounded in itertools.product(EPS, (False, True), (False, True), (False, True)):
        eps = EPS[norm] if bounded else None
        setting = Setting(norm, EPS[norm] if bounded else torch.inf, MASK if masked else None, targeted)
        name = f"{norm}{'-targeted' * targeted}{'-mask' * masked}{'-eps' * bounded}"
        yield pytest.param(DeepFool(norm=norm, steps=20, eps=eps), setting, id=name)


CASES = list(_cases())


@pytest.mark.parametrize(("attack", "setting"), CASES)
def test_promise(attack: DeepFool, setting: Setting) -> None:
    run = bind(attack, setting)
    for name, check in CHECKS.items():
        if name not in COSTLY:
            check(run, setting)


@pytest.mark.parametrize("check", sorted(COSTLY))
@pytest.mark.parametrize(("attack", "setting"), [CASES[0]])
def test_promise_around_the_model(check: str, attack: DeepFool, setting: Setting) -> None:
    CHECKS[check](bind(attack, setting), setting)


@pytest.mark.parametrize("through", [by_run, by_stand_in])
def test_promise_of_run(through: Callable[..., Any]) -> None:
    setting = Setting("l2", torch.inf)
    for name, check in CHECKS.items():
        if name not in COSTLY:
            check(through(DeepFool(), setting), setting)


# -- against other implementations ------------------------------------------------------------------------------------


def by_foolbox(norm: str, model: nn.Module, images: Tensor, labels: Tensor, **settings: Any) -> Tensor:
    foolbox = pytest.importorskip("foolbox")
    make = {"l2": foolbox.attacks.L2DeepFoolAttack, "linf": foolbox.attacks.LinfDeepFoolAttack}[norm]
    return make(**settings)(foolbox.PyTorchModel(model, bounds=(0, 1)), images, labels, epsilons=None)[1]


def predict(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).argmax(1)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize(("overshoot", "candidates"), [(0.02, 10), (0.0, 4)])
def test_without_passing_classes_over_it_gives_the_images_of_foolbox(
    norm: str, overshoot: float, candidates: int, digits: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepfool, "_STEEPER", torch.inf)
    monkeypatch.setattr(deepfool, "_NUDGE", dict.fromkeys(EPS, (1e-4, 1e-4)))  # foolbox has one for all norms
    model, images, labels = digits.model, digits.images[:128], digits.labels[:128]
    expected = by_foolbox(norm, model, images, labels, overshoot=overshoot, candidates=candidates)
    result = DeepFool(norm=norm, overshoot=overshoot, candidates=candidates).run(model, images, labels)
    right = predict(model, images) == labels
    assert result.success.all()
    # its candidates are the largest logits, the first of which it takes for the label: alike on correct images
    torch.testing.assert_close(result.images[right], expected[right], rtol=0, atol=1e-5)


def compare_with_foolbox(norm: str, trained: Trained, ours: Tensor, atol: float = 0.02) -> None:
    model, images, labels = trained
    theirs = by_foolbox(norm, model, images, labels)
    fooled = [predict(model, found) != labels for found in (ours, theirs)]
    assert fooled[0].sum() >= fooled[1].sum() - 0.005 * len(images)
    both = fooled[0] & fooled[1] & (predict(model, images) == labels)
    assert both.sum() >= 0.3 * len(images)
    size = [float((found - images)[both].flatten(1).norm(p=ORDER[norm], dim=1).mean()) for found in (ours, theirs)]
    assert size[0] <= (1 + atol) * size[1]


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_as_near_as_foolbox_on_digits(norm: str, digits: Trained) -> None:
    some = Trained(digits.model, digits.images[:300], digits.labels[:300])
    compare_with_foolbox(norm, some, DeepFool(norm=norm)(*some))


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_as_near_as_foolbox_on_a_natural_network(norm: str, cifar: Trained) -> None:
    ours = DeepFool(norm=norm)(*cifar)
    assert (predict(cifar.model, ours) != cifar.labels).all()
    compare_with_foolbox(norm, cifar, ours, atol=0.001)


@pytest.mark.real_data
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_as_near_as_foolbox_on_a_robust_network(norm: str, mnist: Trained) -> None:
    compare_with_foolbox(norm, mnist, DeepFool(norm=norm)(*mnist))


# -- what the algorithm is --------------------------------------------------------------------------------------------


def linear(classes: int = 4, spread: float = 0.02) -> tuple[nn.Module, Tensor, Tensor]:
    """A linear classifier, images far from the edges of the box, and their predictions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, classes)).double()
        images = 0.5 + spread * torch.randn(12, 3, 4, 4, dtype=torch.float64)
    return model, images, predict(model, images)


def boundary_distances(model: nn.Module, images: Tensor, labels: Tensor, norm: str) -> Tensor:
    """To the boundary with each class, ``(N, K)``; infinity for the label."""
    weight = model[1].weight.detach()
    logits = model(images).detach()
    gaps = logits.gather(1, labels[:, None]) - logits
    apart = (weight[None] - weight[labels][:, None]).norm(p={"l2": 2, "linf": 1}[norm], dim=2)
    return (gaps / apart).scatter(1, labels[:, None], torch.inf)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("overshoot", [0.0, 0.02])
def test_one_step_reaches_the_nearest_boundary_of_a_linear_model(norm: str, overshoot: float) -> None:
    model, images, labels = linear()
    result = DeepFool(norm=norm, overshoot=overshoot).run(model, images, labels)
    nearest = boundary_distances(model, images, labels, norm).amin(1)
    expected = (1 + overshoot) * (nearest + {"l2": 1e-4, "linf": 1e-6}[norm])
    torch.testing.assert_close(result.norms[norm], expected, rtol=1e-9, atol=1e-12)
    assert result.success.all()
    assert (result.iterations == 1).all()
    assert (result.queries == 2).all()  # the clean image and the result


def test_candidates_are_the_likely_classes() -> None:
    model, images, _ = linear(classes=8, spread=0.1)
    model[1].weight.data *= torch.linspace(0.2, 2, 8)[:, None]  # steep classes may be near without being likely
    labels = predict(model, images)
    distances = boundary_distances(model, images, labels, "l2")
    second = model(images).topk(2, dim=1).indices[:, 1]
    assert 0 < (distances.argmin(1) != second).sum() < 12
    two = DeepFool(candidates=2).run(model, images, labels)
    expected = distances.gather(1, second[:, None])[:, 0]
    # on the way to the second class another one may be crossed, but the way is that to the second
    torch.testing.assert_close(two.norms["l2"], 1.02 * (expected + 1e-4))
    every = DeepFool(candidates=None).run(model, images, labels)
    torch.testing.assert_close(every.norms["l2"], 1.02 * (distances.amin(1) + 1e-4))


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_targeted_run_ends_at_the_target(norm: str, digits: Trained) -> None:
    model, images, labels = digits.model, digits.images[:200], digits.labels[:200]
    targets = (labels + 3) % 10
    result = DeepFool(norm=norm).run(model, images, labels, targets=targets)
    assert result.success.double().mean() > 0.98
    assert (predict(model, result.images)[result.success] == targets[result.success]).all()
    untargeted = DeepFool(norm=norm).run(model, images, labels)
    assert result.norms[norm].mean() > untargeted.norms[norm].mean()


def test_no_overshoot_is_nearer(digits: Trained) -> None:
    result = [DeepFool(overshoot=overshoot).run(*digits) for overshoot in (0.0, 0.02)]
    assert all(r.success.all() for r in result)
    assert result[0].norms["l2"].mean() < result[1].norms["l2"].mean()


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_scale_of_the_logits_does_not_matter(norm: str, digits: Trained) -> None:
    """Distilled networks have gradients whose squares underflow."""

    class Scaled(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return digits.model(images) * 1e-25

    images, labels = digits.images[:64], digits.labels[:64]
    expected = DeepFool(norm=norm).run(digits.model, images, labels)
    result = DeepFool(norm=norm).run(Scaled(), images, labels)
    assert result.success.all()
    torch.testing.assert_close(result.norms[norm], expected.norms[norm], rtol=1e-3, atol=1e-6)


def test_a_budget_only_judges(digits: Trained) -> None:
    free = DeepFool().run(*digits)
    eps = float(free.norms["l2"].median())
    held = DeepFool(eps=eps).run(*digits)
    assert torch.equal(held.success, free.norms["l2"] <= eps + 1e-6)
    assert torch.equal(held.images[~held.success], digits.images[~held.success])
    assert torch.equal(held.images[held.success], free.images[held.success])


def test_averages_over_equal_draws_change_nothing(digits: Trained) -> None:
    model, images, labels = digits.model, digits.images[:32], digits.labels[:32]
    labels = torch.where(torch.arange(32) % 8 == 0, (labels + 1) % 10, labels)
    plain = DeepFool().run(model, images, labels)
    averaged = EOT(attack=DeepFool(), samples=2).run(model, images, labels)
    torch.testing.assert_close(averaged.images, plain.images, rtol=0, atol=1e-4)
    assert torch.equal(averaged.queries, 2 * plain.queries)


# -- what it costs ----------------------------------------------------------------------------------------------------


class Passes(nn.Module):
    """Counts the images of forward and of backward passes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.forwards, self.backwards = inner, 0, 0

    def forward(self, images: Tensor) -> Tensor:
        self.forwards += len(images)
        logits = self.inner(images)
        if logits.requires_grad:
            logits.register_hook(self._backward)
        return logits

    def _backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_fewer_passes_than_all_classes_would_take(norm: str, digits: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Passes(digits.model)
    result = DeepFool(norm=norm).run(model, *digits[1:], rounding=False)
    ours = model.forwards, model.backwards
    # the plain way: at every point one forward pass and, unless it fools, nine backward passes
    asked = int(result.queries.sum())
    steps = int(result.iterations.sum())
    assert asked == steps + len(digits.images)
    assert ours[0] + ours[1] < 0.75 * (asked + 9 * steps)
    monkeypatch.setattr(deepfool, "_STEEPER", torch.inf)
    exact = DeepFool(norm=norm).run(model, *digits[1:], rounding=False)
    assert result.norms[norm].mean() <= 1.01 * exact.norms[norm].mean()
    assert result.success.sum() >= exact.success.sum()


def test_known_clean_logits_save_queries_and_change_nothing() -> None:
    model = make_model()
    images, labels = make_batch(model, 16)
    labels = torch.where(torch.arange(16) % 4 == 0, (labels + 1) % CLASSES, labels)
    plain = DeepFool().run(model, images, labels)
    told = DeepFool().run(model, images, labels, clean_logits=evaluate(model, images))
    torch.testing.assert_close(told.images, plain.images)
    assert torch.equal(told.iterations, plain.iterations)
    wrong = torch.arange(16) % 4 == 0
    assert (plain.queries[wrong] == 1).all()
    assert (told.queries[wrong] == 0).all()
    assert torch.equal(told.queries[~wrong], plain.queries[~wrong])


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_little_memory_gives_the_same_images(norm: str, digits: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, labels = digits.model, digits.images[:24], digits.labels[:24]
    expected = DeepFool(norm=norm)(model, images, labels)
    monkeypatch.setattr(deepfool, "_GRADIENT_VALUES", 1)  # one image at a time
    torch.testing.assert_close(DeepFool(norm=norm)(model, images, labels), expected, rtol=0, atol=1e-5)


def test_where_everything_is_flat_it_gives_up_at_once() -> None:
    class Flat(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.nn.functional.pad(images.flatten(1).sum(1, keepdim=True) * 0, (0, 4)) - torch.arange(5.0)

    model = Passes(Flat())
    images, _ = make_batch(make_model())
    result = DeepFool().run(model, images, torch.zeros(len(images), dtype=torch.int64), rounding=False)
    assert not result.success.any()
    assert torch.equal(result.images, images)
    assert model.forwards <= 2 * len(images)


def test_progress_and_steps(digits: Trained) -> None:
    told: list[tuple[int, int]] = []
    result = DeepFool(steps=2).run(*digits, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]
    assert result.iterations.max() == 2
    assert not result.success.all()
    assert torch.equal(result.success, predict(digits.model, result.images) != digits.labels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "l1"}, "norm='l1': choose l2 or linf"),
        ({"steps": 0}, "steps=0: at least one step"),
        ({"overshoot": -0.1}, "overshoot=-0.1: give 0 or more"),
        ({"overshoot": float("nan")}, "overshoot=nan"),
        ({"candidates": 1}, "candidates=1: the label is one of them"),
        ({"eps": -1}, "negative"),
        ({"norm": "linf", "eps": 8}, "did you mean 8/255"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DeepFool(**settings)

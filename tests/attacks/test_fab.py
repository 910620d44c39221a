"""FAB and its projections: against scipy, the official code and closed forms, with every promise kept."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conformance import CHECKS, CLASSES, SHAPE, Setting, Trained, evaluate, make_batch, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from test_conformance import COSTLY, bind, by_run, by_stand_in
from torch import Tensor, nn

from lightning_robust.attacks import EOT, fab
from lightning_robust.attacks.fab import FAB
from lightning_robust.attacks.hyperplane import nearest, slopes, smallest_move
from lightning_robust.errors import UserError

MASK = torch.zeros(SHAPE[1:]).index_fill(1, torch.arange(5), 1)  # the five columns on the left
EPS = {"linf": 0.2, "l2": 3.0, "l1": 40.0}
ORDER = {"linf": torch.inf, "l2": 2, "l1": 1}
THEIR_NORM = {"linf": "Linf", "l2": "L2", "l1": "L1"}
NORMS = list(EPS)

# -- projections ------------------------------------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def cifar(real_data: Path) -> Trained:
    """The published ResNet-20 and 100 test images of CIFAR-10."""
    from PIL import Image

    from lightning_robust.models import create_network

    weights = real_data / "weights/pytorch_resnet_cifar10/resnet20-12fca82f.th"
    model = create_network("resnet20", 10, (3, 32, 32), weights=weights, mean="imagenet").eval().requires_grad_(False)
    images = np.asarray(Image.open(real_data / "cifar10/test_images.png")).reshape(-1, 32, 32, 3)[:100]
    labels = torch.from_numpy(np.load(real_data / "cifar10/test_labels.npz")["labels"][:100]).long()
    return Trained(model, torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 255, labels)


@pytest.fixture(scope="module")
def mnist(real_data: Path) -> Trained:
    """A provably robust network (ε = 0.1) and 200 test images of MNIST."""
    from torchvision.datasets import MNIST

    from lightning_robust.models import create_network

    model = create_network("small_cnn", 10, (1, 28, 28), weights=real_data / "weights/convex_adversarial/mnist.pth")
    data = MNIST(str(real_data), train=False)
    return Trained(model.eval().requires_grad_(False), data.data[:200, None].float() / 255, data.targets[:200])


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

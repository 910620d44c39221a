"""JSMA against the paper's algorithm written out by hand, and against torchattacks; its budgets; its account."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import CHECKS, CLASSES, SHAPE, Run, Setting, Trained, evaluate, make_batch, make_model
from torch import Tensor, nn

from lightning_robust.attacks import EOT, Temperature, accelerate
from lightning_robust.attacks.jsma import JSMA
from lightning_robust.errors import UserError

MASK = torch.zeros(SHAPE[1:]).index_fill(1, torch.arange(3), 1)  # the three columns on the left
COSTLY = {"compiled model", "DDP-wrapped model", "under bf16 autocast", "as before after an exception"}


def changed(adversarial: Tensor, images: Tensor) -> Tensor:
    """Features that differ, image by image."""
    return (adversarial != images).flatten(1).sum(1)


# -- the promise of every attack ---------------------------------------------------------------------------------------


def bind(attack: JSMA | EOT, setting: Setting, **options: Any) -> Run:
    def run(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        targets = (labels + 1) % CLASSES if setting.targeted else None
        return attack.run(model, images, labels, targets=targets, mask=setting.mask, **options).images

    return run


# name: attack, budget in pixels, and (targeted, masked) to try it with
ATTACKS: dict[str, tuple[JSMA, float, list[tuple[bool, bool]]]] = {
    "default": (JSMA(gamma=0.08), math.inf, [(False, False), (False, True), (True, False), (True, True)]),
    "down": (JSMA(theta=-1, max_features=10), 10, [(False, False), (True, True)]),
    "pixels": (JSMA(eps=4, gamma=0.2), 4, [(False, True), (True, False)]),
    "small steps": (JSMA(theta=0.5, max_features=6), 6, [(False, False), (True, True)]),
    "softmax": (JSMA(output="softmax", temperature=2.0), math.inf, [(False, True), (True, False)]),
    "least likely": (JSMA(target="least_likely", gamma=0.05), math.inf, [(False, False)]),
    "all": (JSMA(target="all", theta=0.7, max_features=4), 4, [(False, True)]),
}


@pytest.mark.parametrize(
    ("name", "targeted", "masked"), [(name, *how) for name, (_, _, ways) in ATTACKS.items() for how in ways]
)
def test_promise(name: str, targeted: bool, masked: bool) -> None:
    attack, eps, _ = ATTACKS[name]
    setting = Setting("l0", eps, MASK if masked else None, targeted)
    broken = {}
    for check_name, check in CHECKS.items():
        if check_name in COSTLY:
            continue
        try:
            check(bind(attack, setting), setting)
        except AssertionError as error:
            broken[check_name] = str(error)
    assert not broken


@pytest.mark.parametrize("check", sorted(COSTLY))
def test_promise_around_the_model(check: str) -> None:
    setting = Setting("l0", 6)
    CHECKS[check](bind(JSMA(max_features=6), setting), setting)


def test_promise_with_a_stand_in() -> None:
    setting = Setting("l0", math.inf)

    def run(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return JSMA(gamma=0.05).run(model, images, labels, stand_in=accelerate(model)).images

    for name, check in CHECKS.items():
        if name not in COSTLY:
            check(run, setting)


# -- the same as written out by hand -----------------------------------------------------------------------------------


def by_hand(
    model: nn.Module, image: Tensor, target: int, attack: JSMA, mask: Tensor, fooled: int | None = None
) -> tuple[Tensor, bool]:
    """The paper's algorithm on one image: the whole Jacobian, all pairs; stops at the target, or off the label."""
    theta, total = float(attack.theta), attack.budget(image.numel())
    point = image.clone()
    while True:
        prediction = int(model(point[None]).argmax())
        if prediction == target if fooled is None else prediction != fooled:
            return point, True

        def outputs(flat: Tensor) -> Tensor:
            logits = model(flat.view(1, *image.shape))[0]
            return (logits / attack.temperature).softmax(0) if attack.output == "softmax" else logits

        jacobian = torch.autograd.functional.jacobian(outputs, point.flatten()).view(-1, image.numel())
        alpha = jacobian[target]
        # the sum of all probabilities is one: rounding aside, their gradients cancel
        beta = -alpha if attack.output == "softmax" else jacobian.sum(0) - alpha
        flat, used = point.flatten(), (point != image).flatten()
        open_ = flat < 1 - attack.saturation if theta > 0 else flat > attack.saturation
        open_ &= mask.expand_as(image).flatten() != 0
        if int(used.sum()) + 2 > total:
            open_ &= used
        alphas, betas = alpha[:, None] + alpha, beta[:, None] + beta
        good = (alphas > 0) & (betas < 0) if theta > 0 else (alphas < 0) & (betas > 0)
        good &= open_[:, None] & open_ & ~torch.eye(len(flat), dtype=torch.bool)
        if not good.any():
            return point, False
        best = int(torch.where(good, -alphas * betas, -1).argmax())
        for feature in (best // len(flat), best % len(flat)):
            flat[feature] = (flat[feature] + theta).clamp(0, 1)
        point = flat.view_as(image)


SETTINGS = [
    {"max_features": 16},
    {"theta": -1, "max_features": 16},
    {"theta": 0.4, "max_features": 9},
    {"theta": -0.7, "gamma": 0.1, "saturation": 0.0},
    {"max_features": 7, "masked": True},
    {"output": "softmax", "max_features": 16},
    {"output": "softmax", "max_features": 16, "temperature": 5.0, "theta": -1},
]


@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_it_is_the_algorithm_written_out_by_hand(settings: dict[str, Any], targeted: bool, digits: Trained) -> None:
    # float64, so that rounding does not send the two along different paths
    model = copy.deepcopy(digits.model).double()
    images, labels = digits.images[:16].double(), digits.labels[:16]
    right = model(images).argmax(1) == labels
    images, labels = images[right], labels[right]
    mask = torch.ones(8, 8)
    settings = dict(settings)
    if settings.pop("masked", False):
        mask[:, ::2] = 0
    attack = JSMA(target="next", **settings)
    targets = (labels + 1) % 10
    result = attack.run(model, images, labels, targets=targets if targeted else None, mask=mask)
    for row, (image, label, target) in enumerate(zip(images, labels, targets, strict=True)):
        expected, success = by_hand(model, image, int(target), attack, mask, None if targeted else int(label))
        assert bool(result.success[row]) == success
        torch.testing.assert_close(result.images[row], expected, rtol=0, atol=1e-12)
    assert result.success.any()


# -- torchattacks ------------------------------------------------------------------------------------------------------


def compare(model: nn.Module, images: Tensor, labels: Tensor, features: int) -> tuple[float, float]:
    """Both at one budget and step; torchattacks, untold, goes for (label + 1) % 10.

    Returns:
        the share of images that come out the same, and the success of torchattacks.
    """
    torchattacks = pytest.importorskip("torchattacks")
    targets = (labels + 1) % 10
    # it makes ⌈γF/2⌉ steps
    theirs = torchattacks.JSMA(model, theta=1.0, gamma=(features - 0.5) / images[0].numel())(images.clone(), labels)
    hit = evaluate(model, theirs).argmax(1) == targets
    result = JSMA(max_features=features).run(model, images, labels, targets=targets)
    assert int(result.success.sum()) >= int(hit.sum())
    both = result.success & hit
    mean = [float(changed(of, images)[both].double().mean()) for of in (result.images, theirs)]
    assert mean[0] <= mean[1]
    assert int(changed(result.images, images).max()) <= features
    return float((result.images == theirs).flatten(1).all(1).double().mean()), float(hit.double().mean())


def test_torchattacks_on_digits(digits: Trained) -> None:
    same, success = compare(digits.model, digits.images[:160], digits.labels[:160], 16)
    assert same == 1
    assert 0.5 < success < 1


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.parametrize("robust", [False, True])
def test_torchattacks_on_mnist(real_data: Path, robust: bool) -> None:
    """The paper's 112 features, on a provably robust network and on the same trained naturally for a few seconds."""
    from torchvision.datasets import MNIST

    from lightning_robust.models import create_network

    weights = real_data / "weights/convex_adversarial/mnist.pth" if robust else None
    model = create_network("small_cnn", 10, (1, 28, 28), weights=weights)
    if not robust:
        train = MNIST(str(real_data), train=True)
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
        for rows in torch.randint(0, 60000, (150, 64)):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(train.data[rows, None].float() / 255), train.targets[rows])
            loss.backward()
            optimizer.step()
    data = MNIST(str(real_data), train=False)
    images, labels = data.data[:100, None].float() / 255, data.targets[:100]
    same, success = compare(model.eval(), images, labels, 112)
    assert same >= 0.95  # where two pairs are as good, to rounding, the two may take different ones
    assert success > (0.05 if robust else 0.7)


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_torchattacks_on_cifar10(cifar: Trained) -> None:
    """100 images; the budget is small since torchattacks takes seconds an image."""
    same, success = compare(*cifar, 40)
    assert same >= 0.9
    assert success > 0.05


# -- what a run without targets goes for -------------------------------------------------------------------------------


def test_a_run_without_targets_ends_as_soon_as_the_label_changes(digits: Trained) -> None:
    images, labels = digits.images[:100], digits.labels[:100]
    for target in ("second", "least_likely", "next"):
        result = JSMA(target=target, max_features=16).run(digits.model, images, labels)
        predicted = evaluate(digits.model, result.images).argmax(1)
        assert torch.equal(result.success, predicted != labels)
        assert result.success.double().mean() > 0.8
    assert bool((predicted != (labels + 1) % 10)[result.success].any())  # another class than it went for counts


def test_the_class_that_it_goes_for(digits: Trained) -> None:
    images, labels = digits.images[:60], digits.labels[:60]
    logits = evaluate(digits.model, images)
    right = logits.argmax(1) == labels
    images, labels, logits = images[right], labels[right], logits[right]
    goals = {"second": logits.topk(2).indices[:, 1], "least_likely": logits.argmin(1), "next": (labels + 1) % 10}
    for target, goal in goals.items():
        # one step, and the label rarely changes by that: where it goes is all there is to see
        attack = JSMA(target=target, theta=0.05, max_features=2)
        free = attack.run(digits.model, images, labels)
        told = attack.run(digits.model, images, labels, targets=goal)
        same = ~free.success & ~told.success
        assert same.sum() > 30
        assert torch.equal(free.images[same], told.images[same])


def test_next_knows_how_many_classes_there_are() -> None:
    """torchattacks takes (label + 1) % 10, whatever the number of classes."""
    model = make_model().eval()
    images, labels = make_batch(model, 24)
    attack = JSMA(target="next", max_features=2, theta=0.02)
    free = attack.run(model, images, labels)
    told = attack.run(model, images, labels, targets=(labels + 1) % CLASSES)
    same = ~free.success & ~told.success
    assert bool((labels[same] == CLASSES - 1).any())
    assert torch.equal(free.images[same], told.images[same])


def test_all_keeps_the_attempt_with_the_fewest_features(digits: Trained) -> None:
    model = copy.deepcopy(digits.model).double()
    images, labels = digits.images[:12].double(), digits.labels[:12]
    right = model(images).argmax(1) == labels
    images, labels = images[right], labels[right]
    attack = JSMA(target="all", max_features=6)
    result = attack.run(model, images, labels)
    order = model(images).argsort(dim=1, descending=True)
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        attempts = [
            by_hand(model, image, int(goal), attack, torch.ones(8, 8), int(label))
            for goal in order[row]
            if goal != label
        ]
        fooled = [attempt for attempt, success in attempts if success]
        assert bool(result.success[row]) == bool(fooled)
        # of equal ones the first; the first attempt where all fail
        expected = min(fooled, key=lambda attempt: int((attempt != image).sum())) if fooled else attempts[0][0]
        torch.testing.assert_close(result.images[row], expected, rtol=0, atol=1e-12)
    assert int(result.success.sum()) > 0


@pytest.mark.parametrize("theta", [1, 0.4])
def test_all_is_not_weaker_than_one(theta: float, digits: Trained) -> None:
    images, labels = digits.images[:60], digits.labels[:60]
    attack = JSMA(theta=theta, max_features=8)
    one, every = (attack.replace(target=target).run(digits.model, images, labels) for target in ("second", "all"))
    assert not bool((one.success & ~every.success).any())
    assert every.success.sum() > one.success.sum()
    assert bool((changed(every.images, images) <= changed(one.images, images))[one.success].all())
    assert torch.equal(every.images[~every.success], one.images[~every.success])
    assert bool((every.queries >= one.queries).all())


# -- budgets -----------------------------------------------------------------------------------------------------------


class Stubborn(nn.Module):
    """Class 0 whatever happens, with gradients by which pairs are always to be had."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.rand(3, 192, generator=torch.Generator().manual_seed(0)) + 0.1)

    def forward(self, images: Tensor) -> Tensor:
        logits = images.flatten(1) @ (self.weights * torch.tensor([[-1.0], [1.0], [-1.0]])).T
        return logits + torch.tensor([1000.0, 0, -1000])


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({}, 26),  # 0.145 of 192 is 27.84, and features change in pairs
        ({"gamma": 1.0}, 192),
        ({"gamma": 0.05}, 8),
        ({"max_features": 12}, 12),
        ({"max_features": 13}, 12),
    ],
)
def test_a_failure_comes_back_with_the_features_it_changed(settings: dict[str, Any], most: int) -> None:
    images = torch.rand(3, 3, 8, 8) * 0.9
    result = JSMA(**settings).run(Stubborn(), images, torch.zeros(3, dtype=torch.int64))
    assert not result.success.any()
    assert changed(result.images, images).tolist() == [most] * 3
    assert bool((result.images[result.images != images] == 1).all())


@pytest.mark.parametrize("features", [12, 13])
def test_in_small_steps_the_features_of_the_budget_are_changed_to_their_end(features: int) -> None:
    images = torch.rand(8, 3, 8, 8) * 0.9
    attack = JSMA(theta=0.3, max_features=features)
    result = attack.run(Stubborn(), images, torch.zeros(8, dtype=torch.int64))
    assert not result.success.any()
    # a pair of one that has changed and one that has not may leave room for a single one
    assert bool((changed(result.images, images) <= features).all())
    assert bool((changed(result.images, images) >= features - 1).all())
    short = (result.images != images) & (result.images < 0.99)
    assert bool((short.flatten(1).sum(1) <= 1).all())  # one may be left without a partner


def test_features_go_on_in_small_steps_until_they_are_at_their_end() -> None:
    images = torch.zeros(1, 3, 8, 8)
    result = JSMA(max_features=4, theta="0.1").run(Stubborn(), images, torch.tensor([0]))
    assert result.iterations.tolist() == [20]
    assert sorted(result.images.flatten().tolist())[-5:] == pytest.approx([0, 1, 1, 1, 1])


@pytest.mark.parametrize("theta", [1, 0.5])
def test_a_budget_of_pixels(theta: float) -> None:
    images = torch.rand(4, 3, 8, 8) * 0.9
    labels = torch.zeros(4, dtype=torch.int64)
    result = JSMA(theta=theta, eps=5, gamma=0.5).run(Stubborn(), images, labels)
    pixels = (result.images != images).any(1).flatten(1).sum(1)
    assert bool((pixels <= 5).all())
    assert bool((pixels >= 4).all())
    # the channels of a pixel that has changed come with it
    assert bool((changed(result.images, images) > pixels).all())
    both = JSMA(theta=theta, eps=5, max_features=6).run(Stubborn(), images, labels)
    assert set(changed(both.images, images).tolist()) <= {5, 6}


def test_what_is_at_its_end_or_outside_the_mask_stays() -> None:
    labels = torch.tensor([0])
    white = torch.ones(1, 3, 8, 8)
    white[..., :4] = 0.995
    for saturation, open_ in ((0.01, 0), (0.001, 96)):
        result = JSMA(gamma=1, saturation=saturation).run(Stubborn(), white, labels)
        assert changed(result.images, white).tolist() == [open_]
    black = torch.zeros(1, 3, 8, 8)
    assert not changed(JSMA(theta=-1).run(Stubborn(), black, labels).images, black).any()
    mask = torch.zeros(8, 8)
    mask[0, 0] = 1
    result = JSMA(gamma=1).run(Stubborn(), black, labels, mask=mask)
    assert changed(result.images, black).tolist() == [2]  # of the three channels of one pixel
    mask = torch.zeros(1, 3, 8, 8)
    mask[0, 0, 0, 0] = 1
    assert not changed(JSMA(gamma=1).run(Stubborn(), black, labels, mask=mask).images, black).any()


def test_the_threat_model() -> None:
    assert not JSMA().threat_model.bounded
    assert JSMA().threat_model.norm == "l0"
    assert not JSMA(max_features=112).threat_model.bounded
    assert JSMA(max_features=112, eps=30).threat_model.radius == 30
    assert JSMA().budget(784) == 113  # in pairs: 112, the paper's
    assert JSMA(gamma=0.29).budget(100) == 29


# -- defensive distillation --------------------------------------------------------------------------------------------


def test_the_temperature_of_the_training_undoes_distillation(digits: Trained) -> None:
    """Logits a hundredfold: the softmax saturates, and its gradients underflow to zero (arXiv 1607.04311)."""
    images, labels = digits.images[:60], digits.labels[:60]
    distilled = Temperature(digits.model, 0.01)
    hidden = JSMA(output="softmax", target="least_likely", max_features=16)
    masked = hidden.run(distilled, images, labels)
    found = hidden.replace(temperature=100.0).run(distilled, images, labels)
    plain = hidden.run(digits.model, images, labels)
    assert float(masked.success.double().mean()) < 0.2
    assert float(found.success.double().mean()) > 0.95
    torch.testing.assert_close(found.images, plain.images)
    # logits have no such trouble
    logits = JSMA(max_features=16)
    torch.testing.assert_close(logits(distilled, images, labels), logits(digits.model, images, labels))


# -- account and cost --------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Counts forward passes, the images in them and the different ones; and the images of backward passes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.passes, self.images, self.backward = inner, 0, 0, 0
        self.different: set[bytes] = set()

    def forward(self, images: Tensor) -> Tensor:
        self.passes, self.images = self.passes + 1, self.images + len(images)
        self.different.update(image.numpy().tobytes() for image in images.detach())
        logits = self.inner(images)
        if images.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, gradient: Tensor) -> None:
        self.backward += len(gradient)


@pytest.mark.parametrize("attack", [JSMA(), JSMA(output="softmax"), JSMA(theta=0.4), JSMA(target="all")], ids=str)
def test_queries_and_iterations(attack: JSMA) -> None:
    images, labels = make_batch(make_model(), 12)
    labels = torch.where(torch.arange(12) % 4 == 0, (labels + 1) % CLASSES, labels)
    model = Counting(make_model())
    result = attack.run(model, images, labels, rounding=False)
    queries = int(result.queries.sum())
    assert queries <= model.images
    if attack.target == "all":
        return
    # every point once: the clean image, and where each step led
    assert torch.equal(result.queries, result.iterations + 1)
    assert queries == len(model.different)
    if attack.theta == 1:
        assert torch.equal(2 * result.iterations, changed(result.images, images))


def test_a_step_is_one_forward_and_two_backward_passes() -> None:
    model = Counting(Stubborn())
    images = torch.rand(4, 3, 8, 8) * 0.9
    JSMA(max_features=10).run(model, images, torch.zeros(4, dtype=torch.int64), rounding=False)
    assert (model.passes, model.images, model.backward) == (6, 24, 40)
    model = Counting(Stubborn())
    JSMA(max_features=10, output="softmax", temperature=1e3).run(
        model, images, torch.zeros(4, dtype=torch.int64), rounding=False
    )
    assert (model.passes, model.images, model.backward) == (6, 24, 20)


def test_known_clean_logits_and_misclassified_images() -> None:
    model = make_model()
    images, labels = make_batch(model, 12)
    labels[::3] = (labels[::3] + 1) % CLASSES
    for attack in (JSMA(), JSMA(target="all", max_features=10)):
        plain = attack.run(model, images, labels)
        known = attack.run(model, images, labels, clean_logits=evaluate(model, images))
        assert torch.equal(known.images, plain.images)
        assert torch.equal(known.success, plain.success)
        assert bool((known.queries <= plain.queries).all())
        assert not known.queries[::3].any()
        assert torch.equal(plain.images[::3], images[::3])
        assert bool(plain.success[::3].all())


def test_progress_rises() -> None:
    images, labels = make_batch(make_model())
    for attack in (JSMA(), JSMA(target="all", theta=0.5)):
        told: list[tuple[int, int]] = []
        attack.run(make_model(), images, labels, progress=lambda *step, told=told: told.append(step))
        assert told
        assert told == sorted(told)
        assert all(0 < done <= total for done, total in told)
        assert len({total for _, total in told}) == 1


def test_an_average_over_randomness(digits: Trained) -> None:
    class Random(nn.Module):
        def draws(self, samples: int) -> list[Any]:
            return [digits.model, lambda images: digits.model(images.flip(0).flip(0)), Temperature(digits.model, 2.0)]

        def forward(self, images: Tensor) -> Tensor:
            return digits.model(images)

    images, labels = digits.images[:20], digits.labels[:20]
    for output in ("logits", "softmax"):
        attack = JSMA(output=output, max_features=16)
        result = EOT(attack=attack, samples=3).run(Random(), images, labels)
        assert torch.equal(result.success, evaluate(digits.model, result.images).argmax(1) != labels)
        assert result.success.double().mean() >= attack.run(digits.model, images, labels).success.double().mean() - 0.1


def test_large_images_take_little_memory() -> None:
    """Of 3 × 224 × 224, in a process of its own, whose peak is looked at."""
    code = """
import torch
from pathlib import Path
from torch import nn
from lightning_robust.attacks.jsma import JSMA
def kib(field):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(field))
model = nn.Sequential(nn.Conv2d(3, 8, 7, 4), nn.ReLU(), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(8 * 6 * 6, 10))
images = torch.rand(4, 3, 224, 224)
with torch.no_grad():
    labels = model(images).argmax(1)
before = kib("VmRSS")
result = JSMA(max_features=12).run(model, images, labels, targets=(labels + 1) % 10)
assert result.iterations.max() > 1
print(kib("VmHWM") - before)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert int(done.stdout) < 512 * 1024


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"theta": 0}, "theta=0: it is a change"),
        ({"theta": 2}, "theta=2"),
        ({"theta": "x"}, "theta='x' is not a number"),
        ({"gamma": 0}, "gamma=0 is a share"),
        ({"gamma": 14.5}, "gamma=14.5 is a share"),
        ({"max_features": 1}, "max_features=1: features change in pairs"),
        ({"target": "random"}, "target='random' does not exist: choose one of second, least_likely, next, all"),
        ({"output": "probs"}, "output='probs' does not exist"),
        ({"output": "softmax", "temperature": 0}, "temperature=0: it is a positive number"),
        ({"temperature": 100}, "changes nothing with output='logits': set output='softmax'"),
        ({"saturation": 1}, "saturation=1 is a distance"),
        ({"eps": 1}, "eps=1 is a number of pixels"),
        ({"eps": -3}, "eps=-3"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        JSMA(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 0.001}, "gamma=0.001 of 192 features is fewer than the two of a step"),
        ({"max_features": 193}, "193 pixels are to change|max_features=193, but the images have 192"),
        ({"eps": 100}, "100 pixels are to change"),
    ],
)
def test_settings_that_do_not_fit_the_images(settings: dict[str, Any], message: str) -> None:
    images, labels = make_batch(make_model())
    with pytest.raises(UserError, match=message):
        JSMA(**settings)(make_model(), images, labels)


def test_a_gradient_that_is_no_number() -> None:
    """The root of zero has an infinite slope."""

    def model(images: Tensor) -> Tensor:
        flat = images.flatten(1)
        return torch.stack([flat.sum(1), (flat - flat).sum(1).sqrt(), -flat.sum(1)], 1)

    images = torch.rand(2, 3, 4, 4)
    with pytest.raises(UserError, match="gradient is NaN"):
        JSMA()(model, images, torch.tensor([0, 0]))


def test_one_class_is_too_few() -> None:
    with pytest.raises(UserError, match="one class"):
        JSMA()(lambda images: images.flatten(1).sum(1, keepdim=True), torch.rand(2, 1, 4, 4), torch.tensor([0, 0]))


def test_more_features_than_pixels_may_change_where_a_pixel_has_several() -> None:
    images, labels = torch.full((1, 3, 8, 8), 0.5), torch.tensor([0])
    result = JSMA(max_features=100).run(Stubborn(), images, labels)  # of 64 pixels
    assert int((result.images != images).sum()) == 100

"""AutoAttack: the promise, the official code's verdicts, who fooled what, and its warnings."""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from certificate import margins
from conformance import CHECKS, CLASSES, Setting, Trained, evaluate, make_batch, make_model
from test_accounting import Counting
from test_conformance import COSTLY, EPS, MASK, bind, by_stand_in
from test_square import robust_accuracy
from torch import Tensor, nn

from lightning_robust.attacks import (
    APGD,
    EOT,
    PGD,
    Attack,
    Outcome,
    Problem,
    ThreatModel,
    accelerate,
    autoattack_targets,
)
from lightning_robust.attacks.autoattack import AutoAttack, AutoAttackResult
from lightning_robust.attacks.fab import FAB
from lightning_robust.attacks.square import Square
from lightning_robust.errors import UserError

DIGITS_EPS = {"linf": 0.12, "l2": 0.6, "l1": 1.5}
THEIR_NORM = {"linf": "Linf", "l2": "L2", "l1": "L1"}


def short(norm: str = "linf", eps: float = 0.05, steps: int = 3, queries: int = 8) -> AutoAttack:
    """Version "standard" with few steps."""
    settings: dict[str, Any] = {"eps": eps, "norm": norm}
    attacks = [
        APGD(steps=steps, **settings),
        APGD(steps=steps, loss="dlr_targeted", n_targets=2, **settings),
        FAB(steps=steps, targeted_classes=2, **settings),
        Square(queries=queries, look_ahead=True, rescale_schedule=False, **settings),
    ]
    return AutoAttack(version="custom", attacks=attacks, **settings)


# -- the promise -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:AutoAttack")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", list(EPS))
def test_promise(norm: str, targeted: bool, masked: bool) -> None:
    setting = Setting(norm, EPS[norm], MASK if masked else None, targeted)
    run = bind(short(norm, EPS[norm]), setting)
    for name, check in CHECKS.items():
        if name not in COSTLY:
            check(run, setting)


@pytest.mark.filterwarnings("ignore:AutoAttack")
@pytest.mark.parametrize("check", sorted(COSTLY))
def test_promise_around_the_model(check: str) -> None:
    setting = Setting("linf", 0.05)
    CHECKS[check](bind(short(), setting), setting)


@pytest.mark.filterwarnings("ignore:AutoAttack")
def test_promise_with_a_stand_in_and_with_averages() -> None:
    settings = {"eps": 0.05, "norm": "linf"}
    averaged = AutoAttack(version="custom", attacks=[EOT(attack=APGD(steps=3, **settings), samples=2)], **settings)
    setting = Setting("linf", 0.05)
    for run in (by_stand_in(short(), setting), bind(averaged, setting)):
        for name, check in CHECKS.items():
            if name not in COSTLY:
                check(run, setting)


# -- versions ----------------------------------------------------------------------------------------------------------


def test_versions_are_the_official_ones() -> None:
    ce, dlr, targeted = ({"steps": 100, "loss": loss} for loss in ("ce", "dlr", "dlr_targeted"))
    fab, square = {"steps": 100}, {"queries": 5000, "p_init": 0.8, "restarts": 1, "rescale_schedule": False}
    expected: dict[str, dict[str, dict[str, Any]]] = {
        "standard": {
            "apgd-ce": {**ce, "restarts": 1},
            "apgd-t": {**targeted, "restarts": 1, "n_targets": 9},
            "fab-t": {**fab, "restarts": 1, "targeted_classes": 9},
            "square": square,
        },
        "plus": {
            "apgd-ce": {**ce, "restarts": 5},
            "apgd-dlr": {**dlr, "restarts": 5},
            "fab": {**fab, "restarts": 5, "targeted_classes": None},
            "square": square,
            "apgd-t": {**targeted, "restarts": 1, "n_targets": 9},
            "fab-t": {**fab, "restarts": 1, "targeted_classes": 9},
        },
        "rand": {"apgd-ce": {**ce, "restarts": 1}, "apgd-dlr": {**dlr, "restarts": 1}},
    }
    for version, attacks in expected.items():
        members = AutoAttack(version=version, eps=0.1).members
        assert list(members) == list(attacks)
        for name, settings in attacks.items():
            attack = members[name]
            if version == "rand":
                assert isinstance(attack, EOT)
                assert attack.samples == 20
                attack = attack.attack
            assert attack.threat_model == ThreatModel("linf", 0.1)
            assert {key: getattr(attack, key) for key in settings} == settings
    in_l1 = AutoAttack(norm="l1", eps=12).members
    assert in_l1["apgd-ce"] == APGD(eps=12, norm="l1", restarts=5, warm_up=True)
    assert in_l1["apgd-t"] == APGD(eps=12, norm="l1", loss="dlr_targeted", n_targets=5, warm_up=True)


def test_own_lists_of_attacks() -> None:
    attack = AutoAttack(eps=0.1, version="custom", attacks=["apgd-ce", PGD(eps=0.1), PGD(eps=0.1, steps=3), "fab"])
    assert list(attack.members) == ["apgd-ce", "PGD", "PGD-2", "fab"]
    assert attack == AutoAttack(**{each.name: getattr(attack, each.name) for each in dataclasses.fields(attack)})
    assert hash(attack) == hash(attack.replace())
    larger = attack.replace(eps=0.2)
    assert {each.threat_model.radius for each in larger.members.values()} == {0.2}
    assert AutoAttack(eps=0.1).replace(eps=0.2, norm="l2").members["square"] == Square(
        eps=0.2, norm="l2", rescale_schedule=False, look_ahead=True
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 8}, "eps=8 is larger than the pixel range"),
        ({"norm": "l0"}, "norm='l0' does not exist here"),
        ({"version": "best"}, "version='best' does not exist: choose standard"),
        ({"attacks": ["square"]}, "would be ignored: set version='custom'"),
        ({"version": "custom"}, "needs attacks"),
        ({"version": "custom", "attacks": []}, "needs attacks"),
        ({"version": "custom", "attacks": "square"}, "needs attacks, a list"),
        ({"version": "custom", "attacks": ["apgd"]}, "attack 'apgd' does not exist: choose from apgd-ce"),
        ({"version": "custom", "attacks": [PGD(eps=0.1)]}, "PGD has norm linf and eps 0.1, AutoAttack linf and 0.0313"),
        ({"version": "custom", "attacks": [FAB()]}, "FAB has norm linf and eps inf"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AutoAttack(**settings)


# -- who fools what ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fools(Attack):
    """Says that it fools images of some brightness, and how many it was given."""

    below: float
    given: list[int] = dataclasses.field(default_factory=list)
    seed: int = 0

    @property
    def threat_model(self) -> ThreatModel:
        return ThreatModel("linf", 0.1)

    def perturb(self, problem: Problem) -> Outcome:
        self.given.append(len(problem.images))
        counts = torch.full_like(problem.labels, 2)
        hit = problem.images.mean((1, 2, 3)) < self.below
        images = torch.where(hit[:, None, None, None], (problem.images - 0.01).clamp(0, 1), problem.images - 0.02)
        return Outcome(images.clamp(0, 1), counts, counts, hit)


def test_each_attack_gets_what_is_left_and_the_first_success_counts() -> None:
    attacks = [Fools(below=0.3), Fools(below=0.2), Fools(below=0.5)]
    attack = AutoAttack(eps=0.1, version="custom", attacks=attacks)
    images = torch.linspace(0.05, 0.95, 10)[:, None, None, None].expand(10, 3, 4, 4).contiguous()
    labels = torch.zeros(10, dtype=torch.int64)
    labels[9] = 1
    told: list[tuple[int, int]] = []
    result = attack.run(
        lambda images: torch.tensor([2.0, 0.0]).expand(len(images), 2),
        images,
        labels,
        progress=lambda done, total: told.append((done, total)),
    )
    assert isinstance(result, AutoAttackResult)
    assert result.fooled_by.tolist() == [1, 1, 1, 3, 3, -1, -1, -1, -1, 0]
    assert result.stages == ("clean", "Fools", "Fools-2", "Fools-3")
    assert result.robust_accuracy == pytest.approx({"clean": 0.9, "Fools": 0.6, "Fools-2": 0.6, "Fools-3": 0.4})
    assert [each.given for each in attacks] == [[9], [6], [6]]
    assert torch.equal(result.success, result.fooled_by >= 0)
    moved = result.norms["linf"]
    assert torch.allclose(moved[:5], torch.tensor(0.01))
    assert not moved[5:].any()  # what withstands, or needs no attack, is unchanged
    assert result.queries.tolist() == [3, 3, 3, 7, 7, 7, 7, 7, 7, 1]
    assert told == [(100, 300), (200, 300), (300, 300)]


def test_the_account_on_a_trained_network(digits: Trained) -> None:
    model, images, labels = digits.model, digits.images[:80], digits.labels[:80]
    attack = short(eps=0.1, steps=5, queries=50)
    told: list[tuple[int, int]] = []
    result = attack.run(model, images, labels, progress=lambda done, total: told.append((done, total)))
    assert torch.equal(model(result.images).argmax(1) != labels, result.success)
    accuracy = list(result.robust_accuracy.values())
    assert accuracy == sorted(accuracy, reverse=True)
    assert accuracy[-1] == pytest.approx(1 - float(result.success.double().mean()))
    assert 0 < accuracy[-1] < accuracy[0]
    assert told == sorted(told)
    assert told[-1] == (400, 400)
    assert torch.equal(attack(model, images, labels), result.images)
    alone = attack.members["APGD"].run(model, images, labels).success
    assert float((alone & ~result.success).double().mean()) <= 0.02  # from another random start
    assert not torch.equal(attack.run(model, images, labels, seed=5).images, result.images)


def test_queries_are_counted_and_checks_are_few() -> None:
    images, labels = make_batch(make_model(), 20)
    labels = torch.where(torch.arange(20) % 4 == 0, (labels + 1) % CLASSES, labels)
    model = Counting(make_model())
    settings: dict[str, Any] = {"eps": 0.01, "norm": "linf"}
    attacks = [APGD(steps=3, **settings), Square(queries=9, **settings)]
    result = AutoAttack(version="custom", attacks=attacks, **settings).run(model, images, labels, rounding=False)
    checks = 5 * 15
    assert len(model.different) <= int(result.queries.sum()) <= model.images - checks
    model.images = 0
    wrong = (labels + 1) % CLASSES
    wrong[::4] = labels[::4]
    AutoAttack(eps=0.01).run(model, images, wrong, rounding=False)
    assert model.images == len(images)  # nothing to attack: one pass, and no checks


@pytest.mark.filterwarnings("ignore:AutoAttack")
def test_successes_on_a_stand_in_are_confirmed_one_attack_after_the_other(digits: Trained) -> None:
    class Fragile(nn.Module):
        """Right about clean images alone."""

        def __init__(self) -> None:
            super().__init__()
            self.seen = digits.images[:40].flatten(1)

        def forward(self, images: Tensor) -> Tensor:
            away = torch.cdist(images.flatten(1), self.seen).amin(1, keepdim=True)
            return digits.model(images) - 1e3 * away * torch.eye(10)[digits.model(images).argmax(1)]

    model, images, labels = digits.model, digits.images[:40], digits.labels[:40]
    attack = short(eps=0.12, steps=8, queries=30)
    plain = attack.run(model, images, labels)
    misled = attack.run(model, images, labels, stand_in=Fragile())
    assert torch.equal(model(misled.images).argmax(1) != labels, misled.success)
    assert torch.equal(misled.success, misled.fooled_by >= 0)
    assert abs(int(misled.success.sum()) - int(plain.success.sum())) <= 2
    folded = attack.run(model, images, labels, stand_in=accelerate(model))
    assert abs(int(folded.success.sum()) - int(plain.success.sum())) <= 1


def test_targeted_runs_reach_their_targets(digits: Trained) -> None:
    model, images, labels = digits.model, digits.images[:60], digits.labels[:60]
    targets = (labels + 1) % 10
    result = short(eps=0.25, steps=10, queries=50).run(model, images, labels, targets=targets)
    assert torch.equal(model(result.images).argmax(1) == targets, result.success)
    assert 5 < int(result.success.sum()) < 60


# -- against the official code -----------------------------------------------------------------------------------------


def official(model: nn.Module, norm: str, eps: float, steps: int = 100, queries: int = 5000) -> Any:
    """pyautoattack's "standard"; its steps can be had shorter."""
    theirs = pytest.importorskip("pyautoattack.autoattack")
    attack = theirs.AutoAttack(model, norm=THEIR_NORM[norm], eps=eps, seed=0)
    if steps != 100:
        settings = {"n_iter": steps, "norm": THEIR_NORM[norm], "eps": eps, "device": "cpu", "seed": 0}
        attack.apgd = theirs.APGDAttack(model, logger=attack.logger, **settings)
        attack.apgd_targeted = theirs.APGDAttack_targeted(model, n_target_classes=2, logger=attack.logger, **settings)
        attack.fab.n_iter, attack.fab.n_target_classes = steps, 2
        attack.square.n_queries = queries
    return attack


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_as_strong_as_the_official_code_with_few_steps(norm: str, digits: Trained) -> None:
    model, images, labels = digits.model, digits.images[:300], digits.labels[:300]
    eps = DIGITS_EPS[norm]
    theirs = official(model, norm, eps, steps=15, queries=150).run_standard_evaluation(images, labels)[0]
    expected = robust_accuracy(model, theirs, labels)
    assert 0.1 < expected < 0.9
    result = short(norm, eps, steps=15, queries=150).run(model, images, labels)
    assert result.robust_accuracy["Square"] <= expected + 0.005
    fast = short(norm, eps, steps=15, queries=150).run(model, images, labels, stand_in=accelerate(model))
    assert fast.robust_accuracy["Square"] <= expected + 0.005


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_as_strong_as_the_official_code(norm: str, digits: Trained) -> None:
    model, images, labels = digits
    theirs = official(model, norm, DIGITS_EPS[norm]).run_standard_evaluation(images, labels)[0]
    result = AutoAttack(norm=norm, eps=DIGITS_EPS[norm]).run(model, images, labels)
    assert result.robust_accuracy["square"] <= robust_accuracy(model, theirs, labels) + 0.005


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.timeout(3000)
def test_on_a_provably_robust_network(mnist: Trained) -> None:
    model, images, labels = mnist
    certified = margins(model, images, labels, 0.1)
    theirs = official(model, "linf", 0.1).run_standard_evaluation(images, labels)[0]
    result = AutoAttack(eps=0.1).run(model, images, labels)
    found = result.robust_accuracy["square"]
    assert found <= robust_accuracy(model, theirs, labels) + 0.005
    # image by image: what is certified withstands, and the attack leaves little more than that
    assert not result.success[certified > 0].any()
    share = float((certified > 0).double().mean())
    assert share <= found <= share + 0.01
    fast = AutoAttack(eps=0.1).run(model, images, labels, stand_in=accelerate(model, dtype=torch.bfloat16))
    assert not fast.success[certified > 0].any()
    assert fast.robust_accuracy["square"] <= found + 0.005


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.timeout(7200)
def test_on_a_natural_network(cifar: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, labels = cifar.model, cifar.images[:100], cifar.labels[:100]
    # its own check of zero gradients stumbles over the strides of this network's gradients
    theirs = pytest.importorskip("pyautoattack.autopgd_base")
    monkeypatch.setattr(theirs, "check_zero_gradients", lambda grad, logger=None: None)
    stand_in = accelerate(model, dtype=torch.bfloat16)
    found = official(model, "linf", 1 / 255).run_standard_evaluation(images, labels)[0]
    expected = robust_accuracy(model, found, labels)
    assert 0.05 < expected < 0.5
    for run in ({}, {"stand_in": stand_in}):
        result = AutoAttack(eps="1/255").run(model, images, labels, **run)
        assert result.robust_accuracy["square"] <= expected + 0.005
    assert AutoAttack(eps="8/255").run(model, images, labels, stand_in=stand_in).success.all()


# -- warnings ----------------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module, answer: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.answer = inner, answer

    def forward(self, images: Tensor) -> Tensor:
        return self.answer(self.inner, images)


def noisy(model: nn.Module, images: Tensor) -> Tensor:
    return model(images + 0.01 * torch.randn_like(images))


def optimising(model: nn.Module, images: Tensor) -> Tensor:
    with torch.enable_grad():
        moved = images.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(model(moved).logsumexp(1).sum(), moved)
    return model(images + 0.001 * gradient)


def flat(model: nn.Module, images: Tensor) -> Tensor:
    return 0 * model(images) + model(images.detach())


def messages(attack: Attack, model: nn.Module, images: Tensor, labels: Tensor) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attack(model, images, labels)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda model, images: model(images), []),
        (noisy, ["differ from call to call.*use version='rand'"]),
        (lambda model, images: model(images).softmax(1), ["look like probabilities"]),
        (optimising, ["computes gradients while it predicts"]),
        (
            flat,
            [r"\d\d of 30 images have a gradient of zero where APGD starts", r"Square, .*, fooled \d+ of 30 images"],
        ),
    ],
    ids=["plain", "random", "probabilities", "dynamic", "masked"],
)
def test_models_that_mislead_an_evaluation_are_warned_of(
    answer: Callable[[nn.Module, Tensor], Tensor], words: list[str], digits: Trained
) -> None:
    with torch.no_grad():
        right = digits.model(digits.images).argmax(1) == digits.labels
    images, labels = digits.images[right][:30], digits.labels[right][:30]
    settings: dict[str, Any] = {"eps": 0.1, "norm": "linf"}
    attacks = [APGD(steps=15, loss="dlr", **settings), Square(queries=200, **settings)]
    attack = AutoAttack(version="custom", attacks=attacks, **settings)
    found = messages(attack, Wrapped(digits.model, answer).eval(), images, labels)
    assert len(set(found)) == len(words)
    for pattern in words:
        assert any(re.search(pattern, each) for each in found)


def test_the_version_for_random_models_runs_on_one_without_a_warning(digits: Trained) -> None:
    torch.manual_seed(0)
    model = Wrapped(digits.model, noisy).eval()
    settings: dict[str, Any] = {"eps": 0.2, "norm": "linf"}
    assert not messages(AutoAttack(version="rand", **settings), model, digits.images[:6], digits.labels[:6])
    result = AutoAttack(version="rand", **settings).run(model, digits.images[:6], digits.labels[:6])
    assert result.robust_accuracy["apgd-dlr"] < 0.5
    # an average around it has dealt with the randomness already
    inner = AutoAttack(version="custom", attacks=[APGD(steps=2, **settings)], **settings)
    assert not messages(EOT(attack=inner, samples=3), model, digits.images[:6], digits.labels[:6])


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_too_few_classes_for_a_loss(classes: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, classes))
    images, _ = make_batch(make_model())
    labels = evaluate(model, images).argmax(1)
    settings: dict[str, Any] = {"eps": 0.001, "norm": "linf"}
    attacks: list[Any] = [
        APGD(steps=2, loss="dlr", **settings),
        EOT(attack=APGD(steps=2, loss="dlr_targeted", **settings), samples=2),
        FAB(steps=2, targeted_classes=9, **settings),
    ]
    found = messages(AutoAttack(version="custom", attacks=attacks, **settings), model, images, labels)
    expected = {
        2: [
            "2 classes, and the DLR loss needs at least 3: APGD raises the margin",
            "2 classes, and the targeted DLR loss needs at least 4: EOT raises the margin",
        ],
        3: ["3 classes, and the targeted DLR loss needs at least 4: EOT raises the DLR loss"],
        4: [],
    }[classes]
    assert len(found) == len(expected)
    for words, message in zip(expected, found, strict=True):
        assert words in message


# -- runs towards several classes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["apgd-t", "fab-t"])
def test_runs_side_by_side_are_those_one_after_the_other(
    name: str, digits: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(digits.model).double()
    images, labels = digits.images[:24].double(), digits.labels[:24]
    settings: dict[str, Any] = {"eps": 0.08, "norm": "linf"}
    inner: Attack = (
        APGD(loss="dlr_targeted", n_targets=4, steps=8, **settings)
        if name == "apgd-t"
        else FAB(targeted_classes=4, steps=6, **settings)
    )
    attack = AutoAttack(version="custom", attacks=[inner], **settings)
    results = []
    passes: list[int] = []
    model.register_forward_pre_hook(lambda module, given: passes.append(len(given[0])))
    for room in (1, 64 * 60, 2**18):
        passes.clear()
        monkeypatch.setattr(autoattack_targets, "_ROOM", {"cpu": room})
        results.append((attack.run(model, images, labels), len(passes)))
    (one, many), *others = results
    assert 0 < int(one.success.sum()) < 24
    for result, few in others:
        torch.testing.assert_close(result.images, one.images, rtol=0, atol=1e-9)
        assert torch.equal(result.success, one.success)
        assert few < many
        assert bool((result.queries >= one.queries).all())
    # and as many are fooled as by the attack itself (APGD: from other starts)
    alone = inner.run(model, images, labels)
    assert abs(int(alone.success.sum()) - int(one.success.sum())) <= (1 if name == "apgd-t" else 0)

"""Every attack of ours keeps every promise, in every norm, targeted or not, with and without a mask."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance import CHECKS, CLASSES, SHAPE, Run, Setting
from torch import Tensor, nn

from lightning_robust.attacks import APGD, FGSM, PGD, Attack, External, accelerate
from lightning_robust.attacks.kl_pgd import KLPGD, NormalStartPGD

EPS = {"linf": 0.05, "l2": 0.8, "l1": 4.0}
MASK = torch.zeros(SHAPE[1:]).index_fill(1, torch.arange(3), 1)  # the three columns on the left

# Compiling takes a second each time, and neither norm nor mask plays a part in these.
COSTLY = {"compiled model", "DDP-wrapped model", "under bf16 autocast", "as before after an exception"}


def bind(attack: Attack, setting: Setting, **options: Any) -> Run:
    """The attack as the conformance suite calls it."""

    def run(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        targets = (labels + 1) % CLASSES if setting.targeted else None
        return attack(model, images, labels, targets=targets, mask=setting.mask, **options)

    return run


def by_run(attack: Attack, setting: Setting, **options: Any) -> Run:
    """The same through :meth:`Attack.run`, whose account is checked on the way."""

    def run(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        targets = (labels + 1) % CLASSES if setting.targeted else None
        result = attack.run(model, images, labels, targets=targets, mask=setting.mask, **options)
        delta = result.images - images
        torch.testing.assert_close(result.norms["linf"], delta.flatten(1).abs().amax(1))
        torch.testing.assert_close(result.norms["l2"], delta.flatten(1).square().sum(1).sqrt())
        torch.testing.assert_close(result.norms["l1"], delta.flatten(1).abs().sum(1))
        assert result.success.dtype == torch.bool
        assert not bool((result.success_8bit & ~result.success).any())
        assert result.iterations.shape == result.queries.shape == (len(images),)
        return result.images

    return run


def by_stand_in(attack: Attack, setting: Setting, **options: Any) -> Run:
    """Search on a folded copy, confirm on the model."""

    def run(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return by_run(attack, setting, stand_in=accelerate(model), **options)(model, images, labels)

    return run


def _signed_noise(model: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Someone else's attack: uses the global generator and keeps no budget."""
    with torch.enable_grad():
        moved = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(moved).logsumexp(1).sum(), moved)
    return images + gradient.sign() * torch.rand(images.shape[1:], dtype=images.dtype) * 9


def _cases() -> Iterator[Any]:
    """Every attack × norm × targeted × mask × stop_at_success that exists."""
    full: dict[str, Callable[..., Attack]] = {
        "PGD": lambda **kw: PGD(steps=3, **kw),
        "APGD": lambda **kw: APGD(steps=4, **kw),
    }
    some: dict[str, Callable[..., Attack]] = {
        "FGSM": lambda **kw: FGSM(**kw),
        "PGD-margin-restarts": lambda **kw: PGD(steps=2, restarts=2, loss="margin", **kw),
        "PGD-dlr-clean-start": lambda **kw: PGD(steps=2, random_start=False, loss="dlr", **kw),
        "APGD-dlr": lambda **kw: APGD(steps=4, loss="dlr", **kw),
        "APGD-dlr_targeted": lambda **kw: APGD(steps=4, loss="dlr_targeted", n_targets=2, **kw),
        "APGD-margin-clean-start": lambda **kw: APGD(steps=3, loss="margin", random_start=False, **kw),
        "NormalStartPGD": lambda **kw: NormalStartPGD(steps=2, **kw),
    }
    for name, make in full.items():
        for norm, targeted, masked, stop in itertools.product(EPS, (False, True), (False, True), (False, True)):
            setting = Setting(norm, EPS[norm], MASK if masked else None, targeted, stop)
            yield case(name, make(eps=EPS[norm], norm=norm, stop_at_success=stop), setting)
    for (name, make), (norm, targeted, masked, stop) in itertools.product(
        some.items(), (("linf", False, False, True), ("l2", True, True, False), ("l1", False, True, True))
    ):
        setting = Setting(norm, EPS[norm], MASK if masked else None, targeted, stop)
        yield case(name, make(eps=EPS[norm], norm=norm, stop_at_success=stop), setting)
    for stop in (False, True):
        attack = KLPGD(eps=0.05, steps=3, stop_at_success=stop)
        yield case("KLPGD", attack, Setting("linf", 0.05, None, False, stop))
    for norm in EPS:
        yield case(
            "External",
            External(function=_signed_noise, eps=EPS[norm], norm=norm),
            Setting(norm, EPS[norm], MASK, stop_at_success=False),
        )


def case(name: str, attack: Attack, setting: Setting) -> Any:
    words = [name, setting.norm, "targeted" if setting.targeted else "untargeted"]
    words += ["mask"] * (setting.mask is not None) + ["stop"] * setting.stop_at_success
    return pytest.param(attack, setting, id="-".join(words))


CASES = list(_cases())


@pytest.mark.parametrize(("attack", "setting"), CASES)
def test_promise(attack: Attack, setting: Setting) -> None:
    run = bind(attack, setting)
    broken = {}
    for name, check in CHECKS.items():
        # someone else's attack draws from a generator, for the whole batch at once
        if name in COSTLY or (isinstance(attack, External) and name == "independent of the batch"):
            continue
        try:
            check(run, setting)
        except AssertionError as error:
            broken[name] = str(error)
    assert not broken


@pytest.mark.parametrize("check", sorted(COSTLY))
@pytest.mark.parametrize(
    ("attack", "setting"),
    [
        c
        for c in CASES
        if c.id
        in (
            "PGD-linf-untargeted-stop",
            "PGD-l2-targeted-mask",
            "APGD-linf-untargeted",
            "APGD-dlr_targeted-l1-untargeted-mask-stop",
            "KLPGD-linf-untargeted",
            "External-l2-untargeted-mask",
        )
    ],
)
def test_promise_around_the_model(check: str, attack: Attack, setting: Setting) -> None:
    CHECKS[check](bind(attack, setting), setting)


@pytest.mark.parametrize("through", [by_run, by_stand_in])
@pytest.mark.parametrize(
    "attack", [PGD(eps=0.05, steps=3), APGD(eps=0.05, steps=4), PGD(eps=0.05, steps=3, stop_at_success=False)]
)
def test_promise_of_run(through: Callable[..., Run], attack: PGD | APGD) -> None:
    setting = Setting("linf", 0.05, None, False, attack.stop_at_success)
    run = through(attack, setting)
    for name, check in CHECKS.items():
        if name == "compiled model":
            continue
        check(run, setting)


def _naive(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """PGD as it is often written: correct in mathematics, careless of everything around it."""
    model.eval()
    moved = images + 0.05 * (2 * torch.rand_like(images) - 1)
    for _ in range(3):
        moved = moved.detach().requires_grad_()
        F.cross_entropy(model(moved), labels).backward()
        moved = (moved + 0.02 * moved.grad.sign()).clamp(images - 0.05, images + 0.05).clamp(0, 1)
    model.train()
    return moved.detach()


BROKEN_BY_NAIVE = {
    "modes as before",
    ".grad and requires_grad as before",
    "as before after an exception",
    "global random state as before",
    "repeatable",
    "independent of the batch",
    "misclassified images unchanged",
    "int32 labels",
    "under no_grad",
    "in inference mode",
    "DDP-wrapped model",
    "normalised input refused",
}


@pytest.mark.parametrize("name", [name for name in CHECKS if name != "compiled model"])
def test_the_suite_finds_what_a_naive_attack_breaks(name: str) -> None:
    setting = Setting("linf", 0.05)
    try:
        CHECKS[name](_naive, setting)
    except (AssertionError, RuntimeError):
        assert name in BROKEN_BY_NAIVE
    else:
        assert name not in BROKEN_BY_NAIVE


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (lambda x: x + 0.06, "pixels up to"),
        (lambda x: (x + 0.051).clamp(0, 1), "linf norm"),
        (lambda x: x.clone().requires_grad_(), "graph"),
        (lambda x: x.double(), "type"),
        (lambda x: x[:1], "shape"),
        (lambda x: x * torch.nan, "finite"),
        (lambda x: x, "no image was changed"),
        (lambda x: x.sub_(0.04).clamp_(0, 1), "the caller's images"),
    ],
)
def test_the_suite_finds_a_broken_result(broken: Callable[[Tensor], Tensor], sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        CHECKS["result in ball, box and mask"](lambda model, images, labels: broken(images), Setting("linf", 0.05))

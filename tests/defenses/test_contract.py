"""What every defense promises, whatever it does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from defense_cases import DEFENSES, Trained, tiny
from torch import Tensor, nn

from lightning_robust.attacks import EOT, PGD, Randomized, accelerate, attacking
from lightning_robust.defenses import Defense, PixelDeflection, PixelShift, Randomization, RegionBased
from lightning_robust.errors import UserError

every = pytest.mark.parametrize("defense", DEFENSES.values(), ids=DEFENSES)
every_random = pytest.mark.parametrize(
    "defense", [d for d in DEFENSES.values() if d.random], ids=[name for name, d in DEFENSES.items() if d.random]
)


def images_of(count: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=dtype)


@every
def test_a_verdict_depends_on_the_image_and_the_seed_alone(defense: Defense) -> None:
    defended, images = defense.around(tiny().double()), images_of(dtype=torch.float64)
    before = torch.get_rng_state()
    together = defended(images)
    assert torch.equal(before, torch.get_rng_state())
    assert together.shape == (6, 5)
    assert torch.isfinite(together).all()
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    for split in (1, 4):
        apart = torch.cat([defended(part) for part in images[order].split(split)])
        torch.testing.assert_close(apart, together[order], rtol=0, atol=1e-9)


@every_random
def test_another_seed_is_another_draw(defense: Defense) -> None:
    defended, images = defense.around(tiny()), images_of()
    other = defended.with_seed(1)
    assert other.model is defended.model
    assert (defended.seed, other.seed) == (0, 1)
    assert not torch.equal(other(images), defended(images))
    assert torch.equal(other.with_seed(0)(images), defended(images))


@every_random
def test_without_a_seed_each_call_draws_anew(defense: Defense) -> None:
    defended, images = defense.around(tiny()).with_seed(None), images_of()
    torch.manual_seed(3)
    once, twice = defended(images), defended(images)
    assert not torch.equal(once, twice)
    torch.manual_seed(3)
    assert torch.equal(defended(images), once)


def test_a_vote_over_all_shifts_draws_nothing() -> None:
    defended, images = PixelShift(tiny(), mode="vote", seed=None), images_of()
    assert not defended.random
    assert torch.equal(defended(images), defended(images))


@every
def test_around_keeps_the_settings_and_shares_the_model(defense: Defense) -> None:
    model, other = tiny(), tiny()
    defended = defense.around(model)
    again = defended.around(other)
    assert defense.model is None
    assert defended.model is model
    assert again.model is other
    assert repr(defended) == repr(again)
    public = {k: v for k, v in vars(defense).items() if not k.startswith("_") and k != "training"}
    assert {k: vars(again)[k] for k in public} == public
    assert list(defended.state_dict()) == [f"model.{name}" for name in model.state_dict()]


@every
def test_without_a_model_it_says_how_to_give_one(defense: Defense) -> None:
    for ask in (lambda: defense(images_of()), lambda: defense.draws(3)):
        with pytest.raises(UserError, match=rf"{type(defense).__name__} has no classifier.*around\(model\)"):
            ask()


@every
def test_forward_carries_a_gradient(defense: Defense) -> None:
    defended, labels = defense.around(tiny().requires_grad_(False)), torch.arange(6) % 5
    images = images_of().requires_grad_()
    logits = defended(images)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), images)
    assert torch.isfinite(gradient).all()
    assert (gradient.flatten(1).abs().amax(1) > 0).all()
    # and what it says is what it says to everyone
    torch.testing.assert_close(logits.detach(), defended(images.detach()), rtol=0, atol=1e-6)
    with torch.no_grad():
        assert not defended(images).requires_grad


@every
def test_draws_are_differentiable_models(defense: Defense) -> None:
    defended, images = defense.around(tiny()), images_of()
    assert isinstance(defended, Randomized)
    draws = defended.draws(12)
    assert len(draws) == (12 if not isinstance(defense, PixelShift) else len(defense.shifts))
    found = []
    for draw in draws:
        points = images.clone().requires_grad_()
        logits = draw(points)
        (gradient,) = torch.autograd.grad(logits[:, 0].sum(), points)
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() > 0
        found.append(logits.detach())
    assert all(not torch.equal(found[0], other) for other in found[1:])
    assert len(defended.draws(3)) == 3
    with pytest.raises(UserError, match=r"draws\(0\)"):
        defended.draws(0)


@every
def test_draws_depend_on_the_image_alone(defense: Defense) -> None:
    defended, images = defense.around(tiny().double()), images_of(dtype=torch.float64)
    for draw in defended.draws(3):
        together = draw(images)
        torch.testing.assert_close(draw(images[2:4]), together[2:4], rtol=0, atol=1e-9)


@every
def test_attacks_leave_the_model_as_it_was(defense: Defense) -> None:
    model = tiny().train()
    model[0].eval()
    defended = defense.around(model)
    images, labels = images_of(), torch.arange(6) % 5
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in defended.modules()]
    attack = EOT(attack=PGD(eps=0.1, steps=2, random_start=False), samples=3)
    before = torch.get_rng_state()
    found = attack.run(defended, images, labels)
    assert torch.equal(before, torch.get_rng_state())
    assert [module.training for module in defended.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with torch.inference_mode():
        inside = attack.run(defended, images.clone(), labels.clone())
    assert torch.equal(inside.images, found.images)
    with attacking(defended) as lent, torch.no_grad():
        assert torch.equal(lent(found.images).argmax(1) != labels, found.success)


@every
def test_evaluation_in_inference_mode(defense: Defense) -> None:
    defended, images = defense.around(tiny()), images_of()
    expected = defended(images).detach()
    with torch.inference_mode():
        torch.testing.assert_close(defended(images.clone()), expected, rtol=0, atol=1e-6)


@every
def test_an_accelerated_copy_decides_alike(defense: Defense) -> None:
    defended, images, labels = defense.around(tiny()), images_of(), torch.arange(6) % 5
    fast = accelerate(defended)
    torch.testing.assert_close(fast(images), defended(images), rtol=1e-4, atol=1e-4)
    # a copy follows the weights, too
    with torch.no_grad():
        defended.model[7].bias.add_(torch.arange(5.0))
    fast.refresh()
    torch.testing.assert_close(fast(images), defended(images), rtol=1e-4, atol=1e-4)
    attack = PGD(eps=0.1, steps=3, random_start=False)
    result = attack.run(defended, images, labels, stand_in=fast)
    with torch.no_grad():
        assert torch.equal(defended(result.images).argmax(1) != labels, result.success)


@every
def test_a_copy_in_half_precision_is_refused_and_one_inside_is_not(defense: Defense) -> None:
    images = images_of()
    with pytest.raises(UserError, match=r"bfloat16.*give float32.*accelerate\(model, dtype=torch.bfloat16\)"):
        accelerate(defense.around(tiny()), dtype=torch.bfloat16)(images)
    inside = defense.around(accelerate(tiny(), dtype=torch.bfloat16))(images)
    assert inside.dtype == torch.float32
    assert torch.isfinite(inside).all()


@every
def test_a_defense_is_copied_and_pickled(defense: Defense) -> None:
    defended, images = defense.around(tiny()), images_of()
    expected = defended(images)
    for other in (copy.deepcopy(defended), pickle.loads(pickle.dumps(defended))):
        assert other.model is not defended.model
        assert torch.equal(other(images), expected)


@every
def test_gray_images_of_another_shape(defense: Defense) -> None:
    if isinstance(defense, Randomization):
        return  # of square images
    logits = defense.around(tiny(channels=1))(torch.rand(3, 1, 7, 12))
    assert torch.isfinite(logits).all()


def test_a_distributed_wrapper_is_taken_off() -> None:
    model = tiny()
    assert PixelShift(nn.DataParallel(model)).model is model
    assert PixelShift().around(nn.DataParallel(model)).model is model


def test_under_autocast_the_draws_are_the_same(digits: Trained) -> None:
    for defense in DEFENSES.values():
        defended = defense.around(digits.model)
        with torch.autocast("cpu", torch.bfloat16):
            logits = defended(digits.images[:60])
        agree = logits.argmax(1) == defended(digits.images[:60]).argmax(1)
        assert agree.double().mean() >= 0.9


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(3, 8, 8), r"shape \(3, 8, 8\)"),
        (torch.rand(0, 3, 8, 8), "non-empty"),
        (torch.randn(2, 3, 8, 8), r"outside \[0, 1\].*normalisation"),
        (torch.full((2, 3, 8, 8), torch.nan), r"outside \[0, 1\]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "uint8"),
        (torch.rand(2, 3, 8, 8).half(), "float16"),
    ],
)
def test_bad_images(images: Tensor, message: str) -> None:
    for defense in DEFENSES.values():
        with pytest.raises(UserError, match=message):
            defense.around(tiny())(images)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PixelShift(seed=1.5), "PixelShift: seed=1.5.*integer"),
        (lambda: PixelShift(seed=True), "seed=True"),
        (lambda: PixelShift().with_seed("a"), "seed='a'"),
        (lambda: PixelShift(lambda images: images), "a function is no model"),
        (lambda: PixelShift().around(3), "a int is no model"),
        (lambda: PixelShift(mode="both"), "mode='both': choose random or vote"),
        (lambda: PixelShift(shifts=4), "shifts=4: choose 8"),
        (lambda: RegionBased(radius=0), "radius=0: give pixel units"),
        (lambda: RegionBased(radius=8), "radius=8"),
        (lambda: RegionBased(radius="a/b"), "radius='a/b' is not a number"),
        (lambda: RegionBased(votes=0), "RegionBased: votes=0: give a whole number, 1 or more"),
        (lambda: RegionBased(max_batch=0), "max_batch=0"),
        (lambda: RegionBased(gradient_votes=0), "gradient_votes=0"),
        (lambda: Randomization(setting="svhn"), "setting='svhn': choose one of cifar, imagenet"),
        (lambda: Randomization(sizes=(32, 32)), "sizes=32: give a whole number, 33 or more"),
        (lambda: Randomization(sizes=32), "sizes=32: give the smallest size"),
        (lambda: Randomization(pad_to=33), "pad_to=33: give a whole number, 34 or more"),
        (lambda: Randomization(passes=0), "passes=0"),
        (lambda: Randomization(fill=-1), "fill=-1"),
        (lambda: PixelDeflection(deflections=0), "deflections=0"),
        (lambda: PixelDeflection(window=0), "window=0"),
        (lambda: PixelDeflection(sigma=-0.1), "sigma=-0.1"),
        (lambda: PixelDeflection(sigma=8), "sigma=8"),
        (lambda: PixelDeflection(cam="gradcam"), "cam='gradcam': choose geometric or rank, or none"),
        (lambda: PixelDeflection(cam_classes=0), "cam_classes=0"),
        (lambda: PixelDeflection(wavelet="bior2.2"), "wavelet='bior2.2': choose an orthogonal one"),
        (lambda: PixelDeflection(wavelet="db0"), "wavelet='db0'"),
        (lambda: PixelDeflection(sigma_unit="pixel"), "sigma_unit='pixel': choose image or channel"),
    ],
)
def test_bad_settings(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(("module", "settings"), [("captum", {"sigma": 0}), ("ptwt", {"cam": None})])
def test_a_missing_library_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, module: str, settings: dict[str, Any]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(UserError, match=rf"needs {module}, which is not installed: pip install 'lightning-robust\[def"):
        PixelDeflection(**settings)
    PixelDeflection(sigma=0, cam=None)  # which needs neither


def test_importing_the_defenses_imports_no_extra_library() -> None:
    import subprocess
    import sys

    code = "import sys, lightning_robust.defenses; sys.exit(any(m in sys.modules for m in ('captum', 'ptwt', 'pywt')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

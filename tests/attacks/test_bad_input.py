"""Every mistake is named in one sentence, before any work is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conformance import CLASSES, make_batch, make_model
from torch import Tensor, nn

from lightning_robust.attacks import (
    APGD,
    CW,
    EOT,
    FAB,
    FGSM,
    JSMA,
    KLPGD,
    PGD,
    Attack,
    AutoAttack,
    DeepFool,
    External,
    OnePixel,
    OptMargin,
    RandomNoise,
    Square,
)
from lightning_robust.errors import UserError


@pytest.mark.parametrize("attack", [PGD, FGSM, APGD])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 8}, "eps=8 is larger than the pixel range.*8/255"),
        ({"eps": -1}, "negative"),
        ({"eps": "8/x"}, "not a number"),
        ({"norm": "l7"}, "norm='l7' does not exist"),
        ({"steps": 0}, "steps=0: at least one step"),
        ({"restarts": 0}, "restarts"),
        ({"restarts": 2, "random_start": False}, "would repeat one run: set random_start"),
        ({"loss": "mse"}, "loss='mse' does not exist: choose"),
    ],
)
def test_settings_of_every_gradient_attack(attack: type[Attack], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        attack(**settings)


@pytest.mark.parametrize("attack", [PGD, FGSM])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step_size": 0}, "step_size=0 never moves.*2/255"),
        ({"step_size": -0.1}, "never moves"),
        ({"step_size": 2}, r"step_size=2 is larger than the pixel range \[0, 1\]: did you mean 2/255"),
        ({"step_size": "2/0"}, "step_size='2/0' is not a number"),
        ({"step_size": "nan"}, "not finite"),
    ],
)
def test_step_size(attack: type[Attack], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        attack(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "l2", "warm_up": True}, "warm_up is for norm=.l1"),
        ({"rho": 0}, "rho=0 is a share between 0 and 1"),
        ({"rho": 1.0}, "rho=1.0 is a share"),
        ({"n_targets": 0}, "n_targets"),
    ],
)
def test_settings_of_apgd(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        APGD(**settings)


def test_settings_are_keywords_and_attacks_are_frozen() -> None:
    with pytest.raises(TypeError):
        PGD(0.1)  # type: ignore[misc]
    with pytest.raises(AttributeError):
        PGD().steps = 3  # type: ignore[misc]


def _with(images: Tensor, value: float) -> Tensor:
    images = images.clone()
    images[1, 0, 2, 2] = value
    return images


ATTACKS = [PGD(steps=2), PGD(steps=2, random_start=False, stop_at_success=False), APGD(steps=2)]


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x[0], r"images of shape \(3, 8, 8\).*\(N, C, H, W\)"),
        (lambda x: x[:0], "non-empty"),
        (lambda x: (x * 255).byte(), r"torch.uint8.*float batch"),
        (lambda x: x * 255, r"images reach from 0 to 255, outside \[0, 1\].*normalisation.*inside the model"),
        (lambda x: x * 4 - 2, r"images reach from -2 to 2"),
        (lambda x: _with(x, 1.001), r"outside \[0, 1\]"),
        (lambda x: _with(x, float("nan")), "images hold NaN"),
        (lambda x: _with(x, float("inf")), "inf"),
        (lambda x: x.bfloat16(), "half precision cannot hold a budget.*float32"),
    ],
)
def test_images(attack: Attack, spoil: Callable[[Tensor], Tensor], message: str) -> None:
    model = make_model()
    images, labels = make_batch(model)
    with pytest.raises(UserError, match=message):
        attack(model, spoil(images), labels)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", ["labels", "targets"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda y: y[:-1], r"{name} of shape \(5,\).*one integer an image, here \(6,\)"),
        (lambda y: y[:, None], r"{name} of shape \(6, 1\)"),
        (lambda y: y.float(), "{name} of shape .* type torch.float32"),
        (lambda y: y > 0, "{name} of shape .* type torch.bool"),
        (lambda y: y - 10, "{name} hold -10: classes are numbered from 0"),
        (lambda y: y * 0 + CLASSES, r"{name} go up to 5 but the model has 5 classes \(0 to 4\)"),
    ],
)
def test_labels_and_targets(attack: Attack, name: str, spoil: Callable[[Tensor], Tensor], message: str) -> None:
    model = make_model()
    images, labels = make_batch(model)
    labels = labels * 0
    given = {"labels": labels, "targets": labels + 1}
    given[name] = spoil(labels)
    with pytest.raises(UserError, match=message.format(name=name)):
        attack(model, images, given["labels"], targets=given["targets"])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(8, 9), r"a mask of shape \(8, 9\) does not fit images of shape \(6, 3, 8, 8\)"),
        (torch.ones(8), "does not fit"),
        (torch.ones(5, 8, 8), "does not fit"),
        (torch.ones(6, 2, 8, 8), "does not fit"),
        (torch.ones(8, 8) / 2, "1 .may change. and 0 .may not., nothing between"),
        (torch.full((8, 8), torch.nan), "nothing between"),
    ],
)
def test_masks(mask: Tensor, message: str) -> None:
    model = make_model()
    images, labels = make_batch(model)
    with pytest.raises(UserError, match=message):
        PGD(steps=1)(model, images, labels, mask=mask)


@pytest.mark.parametrize(
    "shape", [(8, 8), (1, 8, 8), (6, 8, 8), (1, 1, 8, 8), (6, 3, 8, 8), (1, 3, 8, 8), (6, 1, 8, 8)]
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float64])
def test_masks_of_every_shape_that_fits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model = make_model()
    images, labels = make_batch(model)
    mask = (torch.rand(shape) < 0.3).to(dtype)
    for attack in (PGD(eps=0.1, steps=2, stop_at_success=False), APGD(eps=0.1, norm="l2", steps=3)):
        delta = attack(model, images, labels, mask=mask) - images
        whole = (mask[:, None] if mask.dim() == 3 else mask).expand_as(images).bool()
        assert not delta[~whole].any()
        assert delta[whole].any()


class _Giving(nn.Module):
    """A model that gives something else than logits."""

    def __init__(self, give: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.give = make_model(), give

    def forward(self, images: Tensor) -> Any:
        return self.give(self.inner(images))


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda z: (z, z), "gave a tuple"),
        (lambda z: z[:, 0], r"gave shape \(6,\) for 6 images: logits are \(N, classes\)"),
        (lambda z: z.sum(0, keepdim=True), r"gave shape \(1, 5\) for 6 images"),
        (lambda z: z * torch.nan, "gave NaN"),
        (lambda z: z[:, :2], "labels go up to .* but the model has 2 classes"),
        (lambda z: z.detach(), "does not depend on its input through differentiable operations"),
        (lambda z: torch.nn.functional.one_hot(z.argmax(1), CLASSES).float(), "differentiable"),
    ],
)
def test_models(attack: Attack, give: Callable[[Tensor], Any], message: str) -> None:
    model = make_model()
    images, _ = make_batch(model)
    labels = torch.full((len(images),), CLASSES - 1)
    model = _Giving(give)
    # what the model gets right, so that there is something left to attack
    if "differentiable" in message:
        labels = make_batch(model.inner)[1]
    with pytest.raises(UserError, match=message):
        attack(model, images, labels)


def test_a_compiled_model_that_ignores_its_input() -> None:
    """Its parameters still ask for gradients, so the output has a graph: just not to the images."""

    class Ignoring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.arange(5.0))

        def forward(self, images: Tensor) -> Tensor:
            return self.logits.expand(len(images), -1) + images.detach().sum() * 0

    images = torch.rand(2, 3, 8, 8)
    with pytest.raises(UserError, match="does not depend on its input"):
        PGD(steps=1)(torch.compile(Ignoring(), backend="eager"), images, torch.tensor([4, 4]))


@pytest.mark.parametrize(
    ("attack", "classes", "message"),
    [
        (PGD(loss="dlr"), 2, "at least 3 classes and the model has 2"),
        (APGD(loss="dlr"), 2, "at least 3 classes and the model has 2"),
        (APGD(loss="dlr_targeted"), 3, "at least 4 classes and the model has 3"),
    ],
)
def test_too_few_classes_for_dlr(attack: Attack, classes: int, message: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, classes))
    images = torch.rand(4, 3, 2, 2)
    with pytest.raises(UserError, match=message):
        attack(model, images, model(images).argmax(1))


class Net(nn.Module):
    """Three logits of three pixels; subclasses break them."""

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.flatten(1)[:, :3]
        return 9 * pixels - 4 * pixels.sum(1, keepdim=True)


class NaNGradient(Net):
    """Finite logits, but of a third of the images a gradient of NaN: 0 · ∞ at the root of zero."""

    def forward(self, images: Tensor) -> Tensor:
        broken = torch.arange(len(images)) % 3 == 0
        root = torch.where(broken[:, None], images.flatten(1)[:, :3] * 0, torch.ones(1)).sqrt()
        return super().forward(images) + root


class NaNOnTheWay(Net):
    """NaN as soon as a pixel is white, or has left the grid of 1/8 that the images are on."""

    def forward(self, images: Tensor) -> Tensor:
        off = ((images * 8 != (images * 8).round()) | (images == 1)).flatten(1).any(1)
        return super().forward(images).masked_fill(off[:, None], torch.nan)


def three_classes() -> tuple[Tensor, Tensor]:
    images = (torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 4 + 2).round() / 8
    images.flatten(1)[:, 0] = 0.875  # class 0, and not on the edge of the box
    images.flatten(1)[:, 1:3] = 0.5
    return images, torch.zeros(6, dtype=torch.int64)


GRADIENT = [
    FGSM(eps=0.1),
    *(PGD(norm=norm, eps=eps, steps=5) for norm, eps in (("linf", 0.1), ("l2", 0.5), ("l1", 2))),
    PGD(eps=0.1, random_start=False),
    PGD(eps=0.1, stop_at_success=False),
    *(APGD(norm=norm, eps=eps, steps=5) for norm, eps in (("linf", 0.1), ("l2", 0.5), ("l1", 2))),
    KLPGD(eps=0.1, steps=3),
    CW(steps=10, binary_search_steps=1),
    CW(norm="linf", steps=10),
    CW(norm="l0", steps=10),
    OptMargin(steps=10, binary_search_steps=1),
    DeepFool(),
    DeepFool(norm="linf"),
    *(FAB(norm=norm, steps=5) for norm in ("linf", "l2", "l1")),
    JSMA(max_features=4),
    EOT(attack=PGD(eps=0.1, steps=3), samples=2),
]


@pytest.mark.parametrize("attack", GRADIENT, ids=lambda attack: f"{type(attack).__name__}-{attack.threat_model.norm}")
def test_a_gradient_of_nan_is_no_robustness(attack: Attack) -> None:
    """Its sign is 0: the image would stay where it is and count as robust."""
    images, labels = three_classes()
    with pytest.raises(UserError, match="gradient is NaN"):
        attack(NaNGradient(), images, labels)


BLIND = [
    Square(eps=0.1, queries=20),
    RandomNoise(eps=0.1, draws=10),
    OnePixel(population=8, generations=2),
    AutoAttack(eps=0.1),
]


@pytest.mark.parametrize(
    "attack", [*GRADIENT, *BLIND], ids=lambda attack: f"{type(attack).__name__}-{attack.threat_model.norm}"
)
def test_logits_of_nan_are_no_success(attack: Attack) -> None:
    """The argmax of NaN is some class: the image would count as fooled."""
    images, labels = three_classes()
    with pytest.raises(UserError, match="NaN"):
        attack.run(NaNOnTheWay(), images, labels)


@pytest.mark.parametrize(
    "attack", [*GRADIENT, *BLIND], ids=lambda attack: f"{type(attack).__name__}-{attack.threat_model.norm}"
)
def test_a_target_that_is_the_label_is_refused(attack: Attack) -> None:
    images, labels = three_classes()
    targets = torch.tensor([1, 0, 2, 1, 0, 2])
    with pytest.raises(UserError, match="targets of the images 1, 4 are their labels"):
        attack.run(Net(), images, labels, targets=targets)


def test_external() -> None:
    images, labels = make_batch(make_model())
    with pytest.raises(UserError, match="give the targets to the other library"):
        External(function=lambda model, x, y: x)(make_model(), images, labels, targets=(labels + 1) % CLASSES)
    with pytest.raises(UserError, match=r"gave shape \(6, 3, 8, 4\)"):
        External(function=lambda model, x, y: x[..., :4])(make_model(), images, labels)
    with pytest.raises(UserError, match="eps=8"):
        External(function=lambda model, x, y: x, eps=8)

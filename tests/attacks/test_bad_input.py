"""Every mistake is named in one sentence, before any work is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conformance import CLASSES, make_batch, make_model
from torch import Tensor, nn

from lightning_robust.attacks import APGD, FGSM, PGD, Attack, External
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


def test_a_gradient_that_is_not_finite_is_named() -> None:
    """The root of zero has an infinite slope: what comes back would be NaN pixels."""

    class Root(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return (images.flatten(1)[:, :3] * 0).sqrt() + images.flatten(1)[:, :3]

    with pytest.raises(UserError, match="gradient is NaN"):
        PGD(norm="l2", eps=0.5, stop_at_success=False)(Root(), torch.rand(2, 3, 2, 2), torch.tensor([0, 1]))


def test_external() -> None:
    images, labels = make_batch(make_model())
    with pytest.raises(UserError, match="give the targets to the other library"):
        External(function=lambda model, x, y: x)(make_model(), images, labels, targets=labels)
    with pytest.raises(UserError, match=r"gave shape \(6, 3, 8, 4\)"):
        External(function=lambda model, x, y: x[..., :4])(make_model(), images, labels)
    with pytest.raises(UserError, match="eps=8"):
        External(function=lambda model, x, y: x, eps=8)

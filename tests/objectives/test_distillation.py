"""Distillation objectives against their formulas, written out."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_robust.errors import UserError
from lightning_robust.modules import ImageClassifier
from lightning_robust.objectives import ARD, AWP, RSLAD, Distillation, DistillationObjective, from_config, to_config

SMALL: dict[str, Any] = {"eps": 0.1, "step_size": 0.05, "steps": 3}


@pytest.fixture
def soft(batch: tuple[Tensor, Tensor]) -> Tensor:
    """A teacher's logits."""
    return 4 * torch.randn(len(batch[1]), 3, generator=torch.Generator().manual_seed(3))


def kl(teacher: Tensor, logits: Tensor) -> Tensor:
    p = teacher.softmax(1)
    return (p * (p.log() - logits.log_softmax(1))).sum(1).mean()


@pytest.mark.parametrize("temperature", [1.0, 5.0, 100.0])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_distillation(net: Any, batch: Any, soft: Tensor, temperature: float, weight: float) -> None:
    images, labels = batch
    objective = Distillation(hard_label_weight=weight)
    output = objective(net, images, labels, seed=0, teacher_logits=soft, temperature=temperature)
    assert net.passes == 1
    logits = net(images)
    wanted = F.cross_entropy(logits / temperature, (soft / temperature).softmax(1))
    wanted = (1 - weight) * wanted + weight * F.cross_entropy(logits / temperature, labels)
    torch.testing.assert_close(output.loss, wanted)
    assert torch.equal(output.logits, logits.detach())
    assert output.images_adv is None


def test_gradients_fall_with_the_temperature(soft: Tensor) -> None:
    """∂CE/∂z = (softmax(z/T) - softmax(teacher/T)) / T."""
    for temperature in (1.0, 10.0, 100.0):
        z = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
        images, labels = torch.rand(8, 1, 1, 1), torch.zeros(8, dtype=torch.int64)
        model = nn.Module()
        model.forward = lambda _, z=z: z  # type: ignore[method-assign, misc]
        output = Distillation()(model, images, labels, seed=0, teacher_logits=soft.double(), temperature=temperature)
        output.loss.backward()
        wanted = ((z / temperature).softmax(1) - (soft.double() / temperature).softmax(1)) / temperature / 8
        torch.testing.assert_close(z.grad, wanted.detach())


@pytest.mark.parametrize("alpha", [1.0, 0.7])
def test_ard(net: Any, batch: Any, soft: Tensor, alpha: float) -> None:
    images, labels = batch
    net.eval()  # BatchNorm's statistics would move from call to call
    objective = ARD(alpha=alpha, **SMALL)
    output = objective(net, images, labels, seed=5, teacher_logits=soft, temperature=30.0)
    wanted_images = objective.attack(net, images, labels, seed=5)
    assert torch.equal(output.images_adv, wanted_images)
    assert 0.09 < float((output.images_adv - images).abs().max()) <= 0.1 + 1e-6
    wanted = alpha * 900 * kl(soft / 30, net(wanted_images) / 30)
    if alpha < 1:
        wanted = wanted + (1 - alpha) * F.cross_entropy(net(images), labels)
    torch.testing.assert_close(output.loss, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (0.25, 2.0)])
def test_rslad(net: Any, batch: Any, soft: Tensor, weight: float, temperature: float) -> None:
    images, labels = batch
    net.eval()
    objective = RSLAD(hard_label_weight=weight, **SMALL)
    given = {"teacher_logits": soft, "temperature": temperature}
    output = objective(net, images, labels, seed=5, **given)
    clean, attacked = net(images), net(output.images_adv)
    wanted = kl(soft / temperature, clean / temperature) / 6 + 5 * kl(soft / temperature, attacked / temperature) / 6
    wanted = (1 - weight) * wanted + weight * F.cross_entropy(clean, labels)
    torch.testing.assert_close(output.loss, wanted)
    # the attack raises the divergence from the soft labels, labels play no part in it
    assert kl(soft, net(output.images_adv)) > kl(soft, net(images))
    other = objective(net, images, (labels + 1) % 3, seed=5, **given)
    assert torch.equal(other.images_adv, output.images_adv)
    assert not torch.equal(objective(net, images, labels, seed=6, **given).images_adv, output.images_adv)


def test_no_gradient_reaches_the_teacher(net: Any, batch: Any) -> None:
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    for objective in (Distillation(), ARD(**SMALL), RSLAD(**SMALL)):
        output = objective(net, *batch, seed=0, teacher_logits=teacher(batch[0]))
        output.loss.backward()
    assert teacher[1].weight.grad is None


def test_weights_are_perturbed_and_put_back(net: Any, batch: Any, soft: Tensor) -> None:
    before = [parameter.detach().clone() for parameter in net.parameters()]
    plain = RSLAD(**SMALL)(net.eval(), *batch, seed=0, teacher_logits=soft)
    output = RSLAD(awp=AWP(gamma=0.05), **SMALL)(net.eval(), *batch, seed=0, teacher_logits=soft)
    assert output.loss > plain.loss
    assert output.restore is not None
    output.restore()
    assert all(torch.equal(one, two) for one, two in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("objective", [Distillation(hard_label_weight=0.1), ARD(alpha=0.5, eps=0.1), RSLAD(steps=7)])
def test_config_and_budget(objective: DistillationObjective) -> None:
    config = to_config(objective)
    assert config["class_path"] == f"lightning_robust.objectives.{type(objective).__name__}"
    assert from_config(json.loads(json.dumps(config))) == objective
    scaled = objective.with_budget(0.5)
    if objective.attack is None:
        assert scaled is objective
    else:
        assert scaled.threat_model is not None
        assert scaled.threat_model.radius == pytest.approx(objective.attack.threat_model.radius / 2)
        assert dataclasses.replace(scaled, eps=objective.eps, step_size=objective.step_size) == objective  # type: ignore[attr-defined, type-var]


@pytest.mark.parametrize("objective", [Distillation(), ARD(**SMALL), RSLAD(**SMALL)])
def test_without_a_teacher(net: Any, batch: Any, soft: Tensor, objective: DistillationObjective) -> None:
    with pytest.raises(UserError, match=r"no teacher: set model\.class_path to DistilledClassifier"):
        objective(net, *batch, seed=0)
    with pytest.raises(UserError, match=r"teacher_logits of shape \(7, 3\) for 8 images"):
        objective(net, *batch, seed=0, teacher_logits=soft[:7])
    module = ImageClassifier(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), 3, (3, 8, 8), objective=objective)
    module.trainer = _Trainer()  # type: ignore[assignment]
    with pytest.raises(UserError, match="no teacher"):
        module.training_step(batch, 0)


class _Trainer:
    """As much of one as a training step looks at."""

    current_epoch = global_rank = 0
    world_size = 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Distillation(hard_label_weight=1.0), "hard_label_weight=1.0"),
        (lambda: Distillation(hard_label_weight=-0.1), "hard_label_weight=-0.1"),
        (lambda: ARD(alpha=1.5), "ARD: alpha=1.5 is a share"),
        (lambda: RSLAD(alpha=math.nan), "RSLAD: alpha=nan"),
        (lambda: RSLAD(steps=0), "steps=0"),
        (lambda: ARD(eps=-1), "eps"),
    ],
)
def test_settings_that_are_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()

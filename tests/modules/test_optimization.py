"""Optimizers and schedules against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_robust.errors import UserError
from lightning_robust.modules import OptimizerSettings, ScheduleSettings


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def test_sgd_steps_as_by_hand() -> None:
    """v ← μv + (g + λw), w ← w - η(g + μv) with Nesterov."""
    weight = nn.Parameter(torch.tensor([[2.0]], dtype=torch.float64))
    module = nn.Module()
    module.weight = weight
    settings = OptimizerSettings(name="sgd", lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.5)
    optimizer = settings.build(module)
    w, v = 2.0, 0.0
    for gradient in (1.0, -0.5, 0.25):
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        g = gradient + 0.5 * w
        v = 0.9 * v + g
        w -= 0.1 * (g + 0.9 * v)
        assert weight.item() == pytest.approx(w)


def test_adamw_decays_apart_from_the_gradient_and_adam_within() -> None:
    for name, wanted in (("adamw", 2.0 * (1 - 0.01 * 0.5) - 0.01), ("adam", 2.0 - 0.01)):
        module = nn.Module()
        module.weight = nn.Parameter(torch.tensor([[2.0]], dtype=torch.float64))
        optimizer = OptimizerSettings(name=name, lr=0.01, weight_decay=0.5).build(module)
        module.weight.grad = torch.ones_like(module.weight)
        optimizer.step()  # the first step of Adam is lr long
        assert module.weight.item() == pytest.approx(wanted, abs=1e-6)


def test_norm_and_bias_without_decay() -> None:
    whole = OptimizerSettings(weight_decay=0.1).build(net())
    assert [(len(group["params"]), group["weight_decay"]) for group in whole.param_groups] == [(6, 0.1)]
    split = OptimizerSettings(weight_decay=0.1, decay_norm_and_bias=False).build(net())
    assert [(len(group["params"]), group["weight_decay"]) for group in split.param_groups] == [(2, 0.1), (4, 0.0)]
    assert all(parameter.dim() > 1 for parameter in split.param_groups[0]["params"])


def test_frozen_parameters_are_left_out() -> None:
    model = net()
    model[0].requires_grad_(False)
    assert sum(len(group["params"]) for group in OptimizerSettings().build(model).param_groups) == 4
    with pytest.raises(UserError, match="no trainable parameters"):
        OptimizerSettings().build(model.requires_grad_(False))


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        (ScheduleSettings(name="constant"), [1] * 8),
        (ScheduleSettings(name="cosine"), [0.5 * (1 + math.cos(math.pi * (k + 0.5) / 8)) for k in range(8)]),
        (ScheduleSettings(name="piecewise", milestones=(0.5, 0.75)), [1] * 4 + [0.1] * 2 + [0.01] * 2),
        (ScheduleSettings(name="piecewise", milestones=(0.25,), factor=0.5), [1] * 2 + [0.5] * 6),
        (
            ScheduleSettings(name="cyclic", peak=0.5),
            [0.125, 0.375, 0.625, 0.875, 0.875, 0.625, 0.375, 0.125],
        ),
        (ScheduleSettings(name="constant", warmup=0.5), [0.125, 0.375, 0.625, 0.875, 1, 1, 1, 1]),
        (
            ScheduleSettings(name="cosine", warmup=0.25),
            [0.25, 0.75, *(0.5 * (1 + math.cos(math.pi * (k + 0.5) / 6)) for k in range(6))],
        ),
    ],
)
def test_schedules_over_eight_steps(schedule: ScheduleSettings, wanted: list[float]) -> None:
    optimizer = torch.optim.SGD(net().parameters(), lr=0.2)
    scheduler = schedule.build(optimizer, 8)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.2 * factor for factor in wanted])
    assert optimizer.param_groups[0]["lr"] >= 0  # one step more than planned does not go wrong


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimizerSettings(lr=0), "lr=0 never learns"),
        (lambda: OptimizerSettings(momentum=1), "momentum"),
        (lambda: OptimizerSettings(weight_decay=-1), "weight_decay"),
        (lambda: OptimizerSettings(name="lion").build(net()), "lion"),
        (lambda: OptimizerSettings(nesterov=True, momentum=0), "nesterov"),
        (lambda: ScheduleSettings(name="piecewise", milestones=(10, 15)), "shares of the training"),
        (lambda: ScheduleSettings(name="linear"), "linear"),
        (lambda: ScheduleSettings(peak=1), "peak"),
        (lambda: ScheduleSettings(warmup=1), "warmup"),
    ],
)
def test_bad_settings(make: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()  # type: ignore[operator]

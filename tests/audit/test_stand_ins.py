"""The gradient goes straight through what rounds, clips and detaches, and nothing else about the model changes."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_robust.audit.stand_ins import StraightThrough

IMAGES = torch.tensor([[0.0, 0.31, 0.5, 0.92, 1.0]])

Step = Callable[[Tensor], Tensor]
THROUGH: dict[str, Step] = {
    "round": lambda x: (8 * x).round() / 8,
    "round in place": lambda x: (8 * x).round_().div_(8),
    "clamp in place": lambda x: (1 * x).clamp_(0.1, 0.9),
    "cast": lambda x: (255 * x).byte().float() / 255,
    "detach": lambda x: x.detach() + 0,
    "detached and changed in place": lambda x: x.detach().mul_(2).div_(2),
    "clamp": lambda x: x.clamp(0.1, 0.9),
    "clip": lambda x: torch.clip(x, min=0.1, max=0.9),
}
AROUND: dict[str, Step] = {
    "numpy": lambda x: x + torch.from_numpy(x.detach().numpy().copy()) * 0.5,
    "an array": lambda x: x + torch.from_numpy(np.asarray(x.detach()).copy()) * 0.5,
    "a list": lambda x: x + torch.tensor(x.detach().tolist()) * 0.5,
    "a number": lambda x: x + x.detach().sum().item() * 0.5,
}


def gradient(step: Step) -> tuple[Tensor, Tensor]:
    images = IMAGES.clone().requires_grad_()
    result = StraightThrough(step)(images)
    return result.detach(), torch.autograd.grad(result.sum(), images)[0]


@pytest.mark.parametrize("name", THROUGH)
def test_what_cuts_the_gradient_off_passes_it_on(name: str) -> None:
    result, slope = gradient(THROUGH[name])
    torch.testing.assert_close(result, THROUGH[name](IMAGES))
    torch.testing.assert_close(slope, torch.ones_like(IMAGES))


@pytest.mark.parametrize("name", AROUND)
def test_what_leaves_pytorch_is_a_constant_and_no_mistake(name: str) -> None:
    result, slope = gradient(AROUND[name])
    torch.testing.assert_close(result, AROUND[name](IMAGES))
    torch.testing.assert_close(slope, torch.ones_like(IMAGES))


def test_a_clamp_with_one_bound_may_be_an_activation() -> None:
    for step in (lambda x: x.clamp(min=0.4), lambda x: x.clamp(0.4), lambda x: x.clamp(0.4, None)):
        _, slope = gradient(step)
        assert slope.tolist() == [[0, 0, 1, 1, 1]], inspect.getsource(step)


def test_the_image_itself_is_not_changed() -> None:
    images = IMAGES.clone().requires_grad_()
    StraightThrough(lambda x: x.detach().mul_(2))(images)
    assert torch.equal(images, IMAGES)

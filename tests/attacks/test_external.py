"""Attacks of other libraries, held to our promise."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from lightning_robust.attacks import External
from lightning_robust.errors import UserError


@pytest.fixture
def problem():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    return model, torch.rand(5, 3, 2, 2), torch.tensor([0, 1, 2, 0, 1])


def noisy(model, images, labels):
    """Steps far out of any budget, with every global generator there is."""
    drawn = torch.rand(1).item() + np.random.rand() + random.random()  # noqa: NPY002
    return images + 0.5 + 0 * drawn


def test_a_step_too_far_is_brought_back_into_ball_and_box(problem):
    model, images, labels = problem
    adversarial = External(function=noisy, eps="8/255")(model, images, labels)
    assert torch.allclose(adversarial, (images + 8 / 255).clamp(max=1), atol=1e-6)


def test_every_global_random_state_is_as_before(problem):
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    External(function=noisy)(*problem)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert random.getstate() == states[2]


def test_another_shape_and_targets_are_refused(problem):
    model, images, labels = problem
    with pytest.raises(UserError, match="shape"):
        External(function=lambda model, images, labels: images[:2])(model, images, labels)
    with pytest.raises(UserError, match="targets"):
        External(function=noisy)(model, images, labels, targets=labels)

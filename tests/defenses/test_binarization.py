"""Thresholding images: what it does, and that its gradient is a stand-in's."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from defense_cases import Trained, tiny
from torch import Tensor, nn

from lightning_robust.attacks import EOT, PGD, Transfer
from lightning_robust.defenses import Binarization
from lightning_robust.errors import UserError


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5])
def test_pixels_above_the_threshold_are_one_and_the_others_zero(threshold: float) -> None:
    images = torch.tensor([[[[0.0, 0.25, 0.26], [0.5, 0.51, 1.0]]]])
    out = Binarization(threshold=threshold).transform(images)
    assert torch.equal(out, (images > threshold).float())


def test_the_verdict_is_that_of_the_black_and_white_images() -> None:
    model, images = tiny(), torch.rand(6, 3, 8, 8)
    defended = Binarization(model, threshold=0.4)
    assert torch.equal(defended(images), model((images > 0.4).float()))
    assert not defended.random
    assert defended.draws(20) == [defended]
    with pytest.raises(UserError, match=r"draws\(0\)"):
        defended.draws(0)


def test_the_gradient_is_the_stand_ins() -> None:
    model, images = tiny().requires_grad_(False), torch.rand(4, 3, 8, 8)
    labels = torch.arange(4)

    def gradient(network: nn.Module, at: Tensor) -> Tensor:
        at = at.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(network(at), labels, reduction="sum"), at)[0]

    inner = gradient(model, (images > 0.5).float())
    torch.testing.assert_close(gradient(Binarization(model), images), inner)
    slope = torch.sigmoid((images - 0.5) / 0.1)
    expected = inner * slope * (1 - slope) / 0.1
    torch.testing.assert_close(gradient(Binarization(model, temperature=0.1), images), expected)


def test_copies_and_pickles_keep_settings_and_verdicts() -> None:
    images = torch.rand(4, 3, 8, 8)
    defended = Binarization(tiny(), threshold=0.3, temperature=0.2)
    for other in (copy.deepcopy(defended), pickle.loads(pickle.dumps(defended)), Binarization().around(tiny())):
        assert other.model is not defended.model
    again = Binarization(threshold=0.3, temperature=0.2).around(defended.model)
    assert repr(again) == repr(defended)
    assert torch.equal(pickle.loads(pickle.dumps(defended))(images), defended(images))
    assert torch.equal(again(images), defended(images))
    # the threshold that a copy goes by is its own
    again.threshold = 0.9
    assert not torch.equal(again(images), defended(images))
    assert list(defended.state_dict()) == [f"model.{name}" for name in defended.model.state_dict()]


def test_it_stops_what_is_made_for_the_classifier_and_not_who_knows_it(digits: Trained) -> None:
    """Digits have many grey pixels, and little is left against BPDA."""
    model, images, labels = digits.model, digits.images[:200], digits.labels[:200]
    defended = Binarization(model)
    attack = PGD(eps=0.3, steps=20)
    clean = accuracy(defended, images, labels)
    plain = Transfer(attack=attack, surrogate=model)(defended, images, labels)
    adaptive = attack(defended, images, labels)
    undefended = accuracy(model, attack(model, images, labels), labels)
    assert clean > 0.7
    assert undefended < 0.05
    assert accuracy(defended, adaptive, labels) < min(0.2, 0.7 * accuracy(defended, plain, labels))
    # one draw says all
    same = EOT(attack=attack, samples=5)(defended, images, labels)
    assert accuracy(defended, same, labels) < 0.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1}, r"threshold=1: give a pixel value from 0 to below 1"),
        ({"threshold": -0.1}, r"threshold=-0\.1"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"threshold": True}, "threshold=True"),
        ({"temperature": 0}, "temperature=0: give a positive number"),
        ({"temperature": "low"}, "temperature='low'"),
        ({"seed": 1.5}, "seed=1.5"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Binarization(**settings)


@pytest.mark.slow
@pytest.mark.real_data
def test_mnist(real_data: Path) -> None:
    """The observation of arXiv 1911.11946, and what an attacker who knows the threshold leaves of it."""
    from lightning_robust.datamodules import MNIST
    from lightning_robust.models import create_network

    data = MNIST(root=str(real_data), limit={"train": 6000}, val_size=0, batch_size=100)
    model = create_network("lenet5", 10, (1, 28, 28))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    loader = data.train_dataloader()
    for epoch in range(4):
        loader.sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    model.eval().requires_grad_(False)
    batch = data.dataset("test").__getitems__(range(200))
    images, labels = batch.images, batch.labels
    defended, attack = Binarization(model), PGD(eps=0.3, step_size=0.01, steps=40)
    plain = Transfer(attack=attack, surrogate=model)(defended, images, labels)
    figures = {
        "undefended": accuracy(model, attack(model, images, labels), labels),
        "clean": accuracy(defended, images, labels),
        "plain": accuracy(defended, plain, labels),
        # a pixel counts only once it has crossed the threshold: small steps stay on the side where they began
        "adaptive": accuracy(defended, PGD(eps=0.3, step_size=0.1, steps=100)(defended, images, labels), labels),
    }
    print(figures)
    assert figures["undefended"] < 0.1
    assert figures["clean"] > 0.95
    assert figures["plain"] > 0.5
    assert figures["adaptive"] < figures["plain"]

"""OnePixel against independent searches: every pixel in every colour, SciPy's differential evolution, torchattacks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conformance import Trained, evaluate
from torch import Tensor, nn

from lightning_robust.attacks import accelerate
from lightning_robust.attacks.one_pixel import OnePixel


def brute_force(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The lowest probability of the label that any pixel in any of 256 colours gives, (N,)."""
    lowest = []
    with torch.no_grad():
        for image, label in zip(images, labels, strict=True):
            every = image.expand(64 * 256, 1, 8, 8).clone()
            every.view(64, 256, 64)[torch.arange(64), :, torch.arange(64)] = torch.arange(256.0) / 255
            lowest.append(min(float(model(part).softmax(1)[:, label].min()) for part in every.split(512)))
    return torch.tensor(lowest)


def test_it_finds_the_best_pixel_of_all(digits: Trained) -> None:
    model, images, labels = digits.model, digits.images[:16].clone(), digits.labels[:16]
    images[8:, 0, 0, 0] = 0.5  # an upper left corner that can become black: all numbers of that candidate are 0
    attack = OnePixel(population=100, generations=40, true_confidence=1e-6)
    with torch.no_grad():
        right = model(images).argmax(1) == labels
        found = model(attack(model, images, labels)).softmax(1).gather(1, labels[:, None])[:, 0]
    best = brute_force(model, images, labels)
    assert bool((found >= best - 1e-6)[right].all())
    assert float((found <= best + 1e-3)[right].double().mean()) > 0.9


def by_scipy(model: nn.Module, images: Tensor, labels: Tensor, multiple: int, generations: int, seed: int) -> Tensor:
    """Which images SciPy's differential evolution fools with one pixel, with the paper's settings.

    Its population is ``multiple`` times the numbers of a candidate: two coordinates and a colour of each channel.
    """
    optimize = pytest.importorskip("scipy.optimize")
    channels, height, width = images.shape[1:]
    fooled = []
    for image, label in zip(images, labels, strict=True):

        def changed(vectors: np.ndarray, image: Tensor = image) -> Tensor:
            x, y, *colours = torch.from_numpy(vectors)  # of (2 + C, S)
            many = image.repeat(len(x), 1, 1, 1)
            place = torch.arange(len(x)), slice(None), y.long().clamp(0, height - 1), x.long().clamp(0, width - 1)
            many[place] = torch.stack(colours, 1).float()
            return many

        def true_probability(vectors: np.ndarray, label: Tensor = label, changed: Any = changed) -> np.ndarray:
            with torch.no_grad():
                return model(changed(vectors)).softmax(1)[:, label].numpy()

        found = optimize.differential_evolution(
            true_probability, [(0, width), (0, height), *[(0, 1)] * channels], strategy="rand1bin", mutation=0.5,
            recombination=1.0, popsize=multiple, maxiter=generations, tol=0, atol=0, polish=False, init="random",
            updating="deferred", vectorized=True, seed=seed,
        )  # fmt: skip
        with torch.no_grad():
            fooled.append(model(changed(found.x[:, None])).argmax(1)[0] != label)
    return torch.stack(fooled)


def test_success_is_not_below_scipys_at_equal_evaluations(digits: Trained) -> None:
    model, images, labels = digits.model, digits.images[:60], digits.labels[:60]
    ours = theirs = queries = 0
    for seed in range(2):
        result = OnePixel(population=60, generations=15, seed=seed).run(model, images, labels)
        ours += int(result.success.sum())
        queries += int(result.queries.sum())
        theirs += int(by_scipy(model, images, labels, 20, 15, seed).sum())
    assert 20 < theirs < 100
    assert ours >= theirs
    assert queries < 0.9 * 2 * 60 * 60 * 16


def test_success_is_not_below_torchattacks_at_equal_evaluations(digits: Trained) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    model, images, labels = digits.model, digits.images[:60], digits.labels[:60]
    attack = torchattacks.OnePixel(model, pixels=1, steps=15, popsize=60)
    theirs = int((evaluate(model, attack(images, labels)).argmax(1) != labels).sum())
    ours = OnePixel(population=60, generations=15, stop="label").run(model, images, labels)
    assert int(ours.success.sum()) >= theirs > 5


# -- real data -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.timeout(3000)
def test_success_on_a_natural_network_is_not_below_scipys(cifar: Trained) -> None:
    """ResNet-20, 100 images of CIFAR-10, one pixel: a population of 100, ten generations."""
    model, images, labels = cifar
    right = evaluate(model, images).argmax(1) == labels
    theirs = by_scipy(model, images[right], labels[right], 20, 10, 0)
    result = OnePixel(population=100, generations=10).run(model, images, labels)
    ours = result.success[right]
    assert 5 < int(theirs.sum()) < 80
    assert int(ours.sum()) >= int(theirs.sum())
    assert float(result.queries[right].double().mean()) <= 100 * 11
    assert torch.equal(result.success, evaluate(model, result.images).argmax(1) != labels)


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.timeout(3000)
def test_success_on_a_natural_network_is_not_below_torchattacks(cifar: Trained) -> None:
    """ResNet-20, 100 images of CIFAR-10; ours on a bfloat16 stand-in, judged in float32."""
    torchattacks = pytest.importorskip("torchattacks")
    model, images, labels = cifar
    right = evaluate(model, images).argmax(1) == labels
    images, labels = images[right], labels[right]
    attack = torchattacks.OnePixel(model, pixels=1, steps=10, popsize=100)
    theirs = int((evaluate(model, attack(images, labels)).argmax(1) != labels).sum())
    stand_in = accelerate(model, dtype=torch.bfloat16)
    ours = OnePixel(population=100, generations=10, stop="label").run(model, images, labels, stand_in=stand_in)
    assert int(ours.success.sum()) >= theirs
    assert torch.equal(ours.success, ours.success_8bit)
    assert torch.equal(ours.success, evaluate(model, ours.images).argmax(1) != labels)

"""Every defense falls to the attacker who knows it, and more than to the one who does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from defense_cases import Trained
from PIL import Image
from torch import Tensor, nn

from lightning_robust.attacks import CW, EOT, PGD, OptMargin
from lightning_robust.defenses import Defense, PixelDeflection, PixelShift, Randomization, RegionBased
from lightning_robust.models import create_network


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())


DEFENSES: dict[str, tuple[Defense, float]] = {
    "region": (RegionBased(radius=0.2, votes=60), 0.2),
    "randomization": (Randomization(sizes=(8, 11), pad_to=11), 0.2),
    "deflection": (PixelDeflection(deflections=10, window=2, sigma=0.1), 0.2),
    "shift": (PixelShift(), 0.2),
    "vote": (PixelShift(mode="vote"), 0.2),
}


@pytest.mark.parametrize(("defense", "eps"), DEFENSES.values(), ids=DEFENSES)
def test_the_average_over_draws_beats_the_attack_on_the_classifier(
    digits: Trained, defense: Defense, eps: float
) -> None:
    images, labels = digits.images[:80], digits.labels[:80]
    defended = defense.around(digits.model)
    attack = PGD(eps=eps, steps=20, random_start=False)
    naive = attack(digits.model, images, labels)  # it stops where the classifier alone errs
    adaptive = EOT(attack=attack.replace(stop_at_success=False), samples=20)(defended, images, labels)
    judge = defended.with_seed(77)  # other dice than any the attacker has seen
    clean = accuracy(judge, images, labels)
    knows_nothing, knows = accuracy(judge, naive, labels), accuracy(judge, adaptive, labels)
    assert clean > 0.8
    assert knows < knows_nothing - 0.1, (clean, knows_nothing, knows)
    assert knows < clean - 0.3, (clean, knows_nothing, knows)


@pytest.mark.parametrize("mode", ["random", "vote"])
def test_an_attack_on_forward_goes_through_the_gradient_that_it_carries(digits: Trained, mode: str) -> None:
    """No obfuscation: PGD on the defense as it stands comes near to what it reaches on the classifier alone."""
    images, labels = digits.images[:60], digits.labels[:60]
    attack = PGD(eps=0.25, steps=20, random_start=False)
    for defense in (PixelShift(mode=mode), RegionBased(votes=40), PixelDeflection(deflections=6, window=2)):  # type: ignore[arg-type]
        result = attack.run(defense.around(digits.model), images, labels)
        assert result.success.double().mean() > 0.8, defense


# -- published networks ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cifar(real_data: Path) -> Trained:
    """The published ResNet-20 and 50 test images of CIFAR-10."""
    weights = real_data / "weights/pytorch_resnet_cifar10/resnet20-12fca82f.th"
    model = create_network("resnet20", 10, (3, 32, 32), weights=weights, mean="imagenet")
    images = np.asarray(Image.open(real_data / "cifar10/test_images.png")).reshape(-1, 32, 32, 3)[:50]
    labels = torch.from_numpy(np.load(real_data / "cifar10/test_labels.npz")["labels"][:50]).long()
    pixels = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 255
    return Trained(model.eval().requires_grad_(False), pixels, labels)


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize("mode", ["random", "vote"])
def test_eot_over_the_shifts_leaves_next_to_nothing(cifar: Trained, mode: str) -> None:
    model, images, labels = cifar
    defended = PixelShift(model, mode=mode)  # type: ignore[arg-type]
    assert accuracy(defended, images, labels) > 0.8
    attack = EOT(attack=PGD(eps="8/255", step_size="2/255", steps=20, stop_at_success=False))
    found = attack(defended, images, labels)
    assert accuracy(defended.with_seed(1), found, labels) <= 0.05


@pytest.mark.slow
@pytest.mark.real_data
def test_bpda_goes_through_pixel_deflection(cifar: Trained) -> None:
    """At 4/255, with the map and the denoising on; 200 deflections are for 224 × 224, here they are 20."""
    model, images, labels = cifar
    defended = PixelDeflection(model, deflections=20, window=10)
    assert accuracy(defended, images, labels) > 0.7
    naive = PGD(eps="4/255", step_size="1/255", steps=20, stop_at_success=False)
    transferred = accuracy(defended, naive(model, images, labels), labels)
    found = EOT(attack=naive, samples=5)(defended, images, labels)
    left = accuracy(defended.with_seed(1), found, labels)
    assert left <= 0.1
    assert left < transferred


@pytest.mark.slow
@pytest.mark.real_data
def test_optmargin_goes_through_the_region_vote(cifar: Trained) -> None:
    model, images, labels = cifar.model, cifar.images[:12], cifar.labels[:12]
    defended = RegionBased(model, votes=100)
    assert accuracy(defended, images, labels) > 0.8
    settings = {"steps": 60, "binary_search_steps": 3, "initial_const": 1.0, "lr": 0.03}
    found = OptMargin(surrogates=10, **settings).run(model, images, labels)  # type: ignore[arg-type]
    plain = CW(**settings).run(model, images, labels)  # type: ignore[arg-type]
    assert plain.success.all()
    assert accuracy(defended, plain.images, labels) > 0.5
    assert accuracy(defended, found.images, labels) <= 0.05
    assert float(found.norms["l2"].median()) < 4 * float(plain.norms["l2"].median())

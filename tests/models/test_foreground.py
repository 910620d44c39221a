"""Cutting out foregrounds, growing masks, and the network that finds its masks itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.attacks import PGD, accelerate
from lightning_robust.attacks.acceleration import Accelerated
from lightning_robust.attacks.randomness import image_keys
from lightning_robust.errors import UserError
from lightning_robust.models import ForegroundNetwork, compose, create_segmenter, grow_masks

MASK = torch.zeros(1, 1, 6, 7, dtype=torch.bool)
MASK[..., 2:5, 1:4] = True


def network(**settings: object) -> ForegroundNetwork:
    torch.manual_seed(0)
    classifier = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    made = ForegroundNetwork(classifier, create_segmenter("unet", (3, 9, 10), width=4, depth=2), **settings)  # type: ignore[arg-type]
    images = torch.rand(8, 3, 9, 10)
    made(images)
    made.eval()
    with torch.no_grad():  # about half of the pixels are foreground
        made.segmenter.network.head.bias.sub_(made.segmenter(images).median())  # type: ignore[union-attr]
    return made


# -- cutting out -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", ["black", "mean", "noise"])
def test_the_foreground_stays_to_the_bit(fill: str) -> None:
    images = torch.rand(5, 3, 6, 7)
    masks = torch.rand(5, 1, 6, 7) < 0.5
    shown = compose(images, masks, fill, image_keys(images, 3))  # type: ignore[arg-type]
    inside = masks.expand_as(images)
    assert torch.equal(shown[inside], images[inside])
    assert not torch.equal(shown, images)
    assert shown.min() >= 0
    assert shown.max() <= 1


def test_backgrounds() -> None:
    images = torch.rand(2, 3, 6, 7)
    black, mean = compose(images, MASK), compose(images, MASK, "mean")
    outside = (~MASK).expand_as(images)
    assert (black[outside] == 0).all()
    colours = images[..., 2:5, 1:4].mean((2, 3))
    assert torch.allclose(mean[:, :, 0, 0], colours)
    assert torch.allclose(mean[:, :, 5, 6], colours)
    assert (compose(images, torch.zeros_like(MASK), "mean") == 0).all()


def test_noise_is_the_images_own() -> None:
    """The same in any batch; another for another image, and another for another seed."""
    images = torch.rand(4, 3, 6, 7)
    masks = MASK.expand(4, -1, -1, -1)
    shown = compose(images, masks, "noise", image_keys(images, 0))
    alone = compose(images[2:3], MASK, "noise", image_keys(images[2:3], 0))
    assert torch.equal(shown[2:3], alone)
    assert not torch.equal(shown[0, :, 0], shown[1, :, 0])
    assert not torch.equal(shown, compose(images, masks, "noise", image_keys(images, 1)))
    with pytest.raises(UserError, match="noise needs a key"):
        compose(images, masks, "noise")


# -- growing -----------------------------------------------------------------------------------------------------------


def by_hand(mask: Tensor, radius: int) -> Tensor:
    """Pixel by pixel."""
    grown = mask.clone()
    height, width = mask.shape
    for row in range(height):
        for column in range(width):
            near = mask[
                max(row - abs(radius), 0) : row + abs(radius) + 1,
                max(column - abs(radius), 0) : column + abs(radius) + 1,
            ]
            grown[row, column] = near.any() if radius > 0 else near.all()
    return grown


@pytest.mark.parametrize("radius", [-3, -2, -1, 1, 2, 3])
def test_growing_equals_by_hand(radius: int) -> None:
    masks = F.avg_pool2d(torch.rand(6, 1, 11, 12), 3, 1, 1) < 0.5
    found = grow_masks(masks, radius)
    assert found.dtype == torch.bool
    assert torch.equal(found, torch.stack([by_hand(mask[0], radius)[None] for mask in masks]))


def test_growing_by_nothing_and_the_borders_of_full_masks() -> None:
    assert grow_masks(MASK, 0) is MASK
    assert grow_masks(torch.ones(1, 1, 4, 4, dtype=torch.bool), -1).all()  # beyond the image there is no background
    assert not grow_masks(MASK, -2).any()


# -- the network -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", ["black", "mean", "noise"])
def test_hard_masks_are_what_the_classifier_sees(fill: str) -> None:
    net = network(fill=fill, grow=-1)
    images = torch.rand(3, 3, 9, 10)
    masks = net.predict_masks(images)
    assert masks.dtype == torch.bool
    assert masks.any()
    assert not masks.all()
    key = torch.tensor([0])
    assert torch.equal(net(images), net.classifier(compose(images, masks, fill, key)))  # type: ignore[arg-type]


def test_the_gradient_goes_through_the_mask() -> None:
    """Straight-through: as if the mask's sigmoid had been there, at the hard mask's logits."""
    net = network(temperature=0.5)
    images = torch.rand(2, 3, 9, 10, requires_grad=True)
    (found,) = torch.autograd.grad(net(images)[:, 0].sum(), images)
    mask = net.predict_masks(images)
    held = images.detach().clone().requires_grad_()
    (pixels,) = torch.autograd.grad(net.classifier(compose(held, mask))[:, 0].sum(), held)
    soft = torch.sigmoid(net.segmenter(images) / 0.5)
    hard = mask.float().requires_grad_()
    (upon,) = torch.autograd.grad(net.classifier(compose(images.detach(), hard))[:, 0].sum(), hard)
    (by_mask,) = torch.autograd.grad((soft * upon).sum(), images)
    assert by_mask.abs().max() > 0
    assert torch.allclose(found, pixels + by_mask, atol=1e-6)
    outside = (~mask).expand_as(images)
    assert (found[outside] != 0).any()  # where the classifier sees nothing, the mask can be worked on


def test_a_soft_mask_has_the_exact_gradient() -> None:
    net = network(soft=True).double()
    images = (0.2 + 0.6 * torch.rand(1, 3, 9, 10, dtype=torch.float64)).requires_grad_()
    direction = torch.randn_like(images)
    (gradient,) = torch.autograd.grad(net(images)[:, 1].sum(), images)
    step = 1e-6
    difference = (net(images + step * direction) - net(images - step * direction))[0, 1] / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(difference.item(), rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"soft": True}, {"fill": "noise"}, {"grow": 1}])
def test_the_stand_in_of_attacks_is_the_same_function(settings: dict[str, object]) -> None:
    net = network(**settings)
    stand_in = accelerate(net)
    assert isinstance(stand_in, Accelerated)
    if "grow" not in settings:
        assert stand_in.folded > 1  # classifier's and segmenter's
    images = torch.rand(4, 3, 9, 10)
    assert torch.allclose(stand_in(images), net(images), atol=1e-5)


def test_an_attack_through_the_mask_beats_one_that_holds_it() -> None:
    """On a segmenter that a small change of the background turns."""

    class Brightness(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.mean((1, 2, 3), keepdim=True) - 0.45).expand(-1, 1, *x.shape[2:]) * 40

    classifier = nn.Sequential(nn.Flatten(), nn.Linear(3 * 9 * 10, 2))
    nn.init.constant_(classifier[1].weight, 0.0)  # type: ignore[arg-type]
    with torch.no_grad():
        classifier[1].weight[1, :] = 0.01  # type: ignore[index]
        classifier[1].bias.copy_(torch.tensor([0.5, 0.0]))  # type: ignore[union-attr]
    net = ForegroundNetwork(classifier, Brightness()).eval()
    images, labels = torch.full((2, 3, 9, 10), 0.5), torch.tensor([1, 1])
    attack = PGD(eps=0.1, steps=10, random_start=False)
    assert attack.run(net, images, labels).success.all()
    assert not attack.run(net.classifier, images, labels).success.any()


def test_bad_settings() -> None:
    with pytest.raises(UserError, match="choose black, mean or noise"):
        network(fill="grey")
    with pytest.raises(UserError, match="positive"):
        network(temperature=0.0)

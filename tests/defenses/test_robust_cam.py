"""R-CAM: on a network whose class activation maps are known, and which layer it is taken from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from defense_cases import tiny
from torch import Tensor, nn

from lightning_robust.defenses import PixelDeflection
from lightning_robust.defenses.robust_cam import last_map, robust_cam
from lightning_robust.errors import UserError
from lightning_robust.models import create_network

pytest.importorskip("captum")


class Pooled(nn.Module):
    """One convolution, average pooling and a linear layer: its class activation maps are weights · features."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            self.features = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU())
            self.linear = nn.Linear(6, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.features(images).mean((2, 3)))


def unit(maps: Tensor) -> Tensor:
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low)


def by_hand(model: Pooled, images: Tensor, combination: str, classes: int) -> Tensor:
    features = model.features(images)
    order = model(images).argsort(1, descending=True)
    maps = []
    for rank in range(classes):
        weights = model.linear.weight[order[:, rank]]
        cam = unit(torch.einsum("nc,nchw->nhw", weights, features))
        maps.append(unit(F.interpolate(cam[:, None], (12, 10), mode="bilinear")[:, 0]))
    if combination == "rank":
        return unit(sum(m / 2 ** (rank + 1) for rank, m in enumerate(maps)))
    return unit(torch.stack(maps).prod(0) ** (1 / classes))


@pytest.mark.parametrize("classes", [1, 3, 8])
@pytest.mark.parametrize("combination", ["geometric", "rank"])
def test_with_average_pooling_it_is_the_class_activation_map(combination: Any, classes: int) -> None:
    model, images = Pooled().eval(), torch.rand(4, 3, 12, 10)
    found = robust_cam(model, images, combination=combination, classes=classes)
    assert found.shape == (4, 12, 10)
    assert found.flatten(1).amin(1).tolist() == [0] * 4
    assert found.flatten(1).amax(1).tolist() == [1] * 4
    with torch.no_grad():
        torch.testing.assert_close(found, by_hand(model, images, combination, classes), rtol=1e-3, atol=1e-4)


def test_more_classes_than_there_are_is_all_of_them() -> None:
    model, images = Pooled().eval(), torch.rand(2, 3, 12, 10)
    torch.testing.assert_close(robust_cam(model, images, classes=100), robust_cam(model, images, classes=8))


def test_it_works_where_gradients_are_off_and_leaves_no_trace() -> None:
    model, images = tiny(), torch.rand(3, 3, 8, 8)
    expected = robust_cam(model, images)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        assert torch.equal(robust_cam(model, images), expected)
    with torch.inference_mode():
        assert torch.equal(robust_cam(model, images.clone()), expected)
    model.requires_grad_(False)
    assert torch.equal(robust_cam(model, images), expected)


def test_a_flat_map_spares_no_pixel() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, images: Tensor) -> Tensor:
            return (0 * self.conv(images)).mean((2, 3))

    assert not robust_cam(Flat(), torch.rand(2, 3, 8, 8)).any()


@pytest.mark.parametrize(
    ("network", "shape", "layer"),
    [
        ("resnet20", (3, 32, 32), "network.layer3"),
        ("lenet5", (1, 28, 28), "network.feature_extractor"),
        ("resnet18", (3, 32, 32), "network.layer4"),
    ],
)
def test_the_last_feature_map_is_found(network: str, shape: tuple[int, int, int], layer: str) -> None:
    model = create_network(network, 10, shape).eval()
    name = last_map(model, torch.rand(2, *shape))
    assert name == layer or name.startswith(f"{layer}."), name


class Patches(nn.Module):
    """As a vision transformer begins: a convolution for the patches, and all else after it."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.body = nn.Sequential(*(nn.TransformerEncoderLayer(16, 2, 16, batch_first=True) for _ in range(2)))
        self.head = nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self.patches(images).flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), Patches().eval()], ids=["linear", "transformer"]
)
def test_a_network_without_a_feature_map_is_refused(model: nn.Module) -> None:
    images = torch.rand(2, 3, 8, 8)
    with pytest.raises(UserError, match="has none: set cam=none"):
        PixelDeflection(model)(images)
    assert PixelDeflection(model, cam=None)(images).shape == (2, 5)


def test_layers_by_name() -> None:
    images = torch.rand(2, 3, 8, 8)
    assert robust_cam(tiny(), images, layer="2").shape == (2, 8, 8)
    with pytest.raises(UserError, match=r"cam_layer='conv9'.*its last feature map is that of 5"):
        PixelDeflection(tiny(), cam_layer="conv9")(images)
    with pytest.raises(UserError, match="cam_layer='7': its output is no map"):
        PixelDeflection(tiny(), cam_layer="7")(images)


def test_a_compiled_network_is_seen_through() -> None:
    images, model = torch.rand(2, 3, 8, 8), tiny()
    expected = robust_cam(model, images)
    model.compile(backend="eager")
    torch.testing.assert_close(robust_cam(model, images), expected)

"""Network in Network: the paper's layers, sizes and options."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace
from torch.fx.experimental.optimization import fuse

from lightning_robust.errors import UserError
from lightning_robust.models import create_network
from lightning_robust.models.nin import nin
from lightning_robust.models.registry import registered_networks


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_published_parameter_counts() -> None:
    assert parameters(nin(10, (3, 32, 32))) == 966_986
    assert parameters(nin(100, (3, 32, 32))) == 984_356
    channels = 192 + 160 + 96 + 3 * 192 + 2 * 192
    assert parameters(nin(10, (3, 32, 32), batch_norm=True)) == 966_986 + 2 * channels


def test_maps_are_those_of_the_paper() -> None:
    network = nin(10, (3, 32, 32)).eval()
    sizes, x = [], torch.rand(1, 3, 32, 32)
    for layer in network.features:
        x = layer(x)
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
            sizes.append((x.shape[1], x.shape[2]))
    first, second = [(192, 32), (160, 32), (96, 32)], [(192, 16)] * 3
    assert sizes == [*first, (96, 16), *second, (192, 8), (192, 8), (192, 8), (10, 8)]
    torch.testing.assert_close(network.flatten(network.pool(x)), x.mean((2, 3)))


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (1, 8, 8), (1, 4, 4), (3, 24, 35)])
def test_logits_and_folding(shape: tuple[int, int, int], batch_norm: bool) -> None:
    network = nin(7, shape, batch_norm=batch_norm).eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.1, 0.1)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
    images = torch.rand(2, *shape)
    expected = network(images)
    assert expected.shape == (2, 7)
    torch.testing.assert_close(symbolic_trace(network)(images), expected)
    folded = fuse(copy.deepcopy(network))
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    torch.testing.assert_close(folded(images), expected, rtol=1e-3, atol=1e-4)


def test_the_authors_relu_on_the_class_maps_is_an_option() -> None:
    images = torch.rand(4, 3, 32, 32)
    plain = nin(10, (3, 32, 32)).eval()
    rectified = nin(10, (3, 32, 32), class_relu=True).eval()
    rectified.load_state_dict(plain.state_dict())
    assert (plain(images) < 0).any()
    maps = plain.features(images)
    torch.testing.assert_close(rectified(images), maps.relu().mean((2, 3)))


def test_it_is_registered_and_names_the_smallest_image() -> None:
    assert registered_networks()["nin"].min_size == 4
    model = create_network("nin", 10, (3, 32, 32), dropout=0.25)
    assert [layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)] == [0.25, 0.25]
    with pytest.raises(UserError, match="nin needs images of at least 4×4"):
        create_network("nin", 10, (1, 3, 8))

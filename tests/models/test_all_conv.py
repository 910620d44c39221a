"""The all convolutional net: the paper's layers, sizes and options."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace
from torch.fx.experimental.optimization import fuse

from lightning_robust.errors import UserError
from lightning_robust.models import create_network
from lightning_robust.models.all_conv import all_conv
from lightning_robust.models.registry import registered_networks


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_published_parameter_counts() -> None:
    assert parameters(all_conv(10, (3, 32, 32))) == 1_369_738
    assert parameters(all_conv(100, (3, 32, 32))) == 1_387_108
    # a scale and a shift for each of the 96·3 + 192·5 channels
    assert parameters(all_conv(10, (3, 32, 32), batch_norm=True)) == 1_369_738 + 2 * (3 * 96 + 5 * 192)


def test_maps_are_those_of_the_paper() -> None:
    network = all_conv(10, (3, 32, 32)).eval()
    sizes, x = [], torch.rand(1, 3, 32, 32)
    for layer in network.features:
        x = layer(x)
        if isinstance(layer, nn.Conv2d):
            sizes.append((x.shape[1], x.shape[2]))
    assert sizes == [(96, 32), (96, 32), (96, 16), (192, 16), (192, 16), (192, 8), (192, 6), (192, 6), (10, 6)]
    torch.testing.assert_close(network.flatten(network.pool(x)), x.mean((2, 3)))


def test_dropout_stands_on_the_pixels_and_after_the_strides() -> None:
    network = all_conv(10, (3, 32, 32), input_dropout=0.1, dropout=0.3)
    before = [
        (layer.p, network.features[index - 2].stride if index else None)
        for index, layer in enumerate(network.features)
        if isinstance(layer, nn.Dropout)
    ]
    assert before == [(0.1, None), (0.3, (2, 2)), (0.3, (2, 2))]


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (1, 9, 9), (3, 24, 40)])
def test_logits_and_folding(shape: tuple[int, int, int], batch_norm: bool) -> None:
    network = all_conv(7, shape, batch_norm=batch_norm).eval()
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


def test_it_is_registered_and_names_the_smallest_image() -> None:
    assert registered_networks()["all_conv"].min_size == 9
    assert parameters(create_network("all_conv", 10, (3, 32, 32))) == 1_369_738
    with pytest.raises(UserError, match="all_conv needs images of at least 9×9"):
        create_network("all_conv", 10, (1, 8, 8))
    with pytest.raises(UserError, match="its options are batch_norm, input_dropout, dropout"):
        create_network("all_conv", 10, (3, 32, 32), width=2)

"""The own networks: shapes, published sizes, and what attacks need of them."""

from __future__ import annotations

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.fx import symbolic_trace
from torch.fx.experimental.optimization import fuse

from lightning_robust.models import create_network, list_networks
from lightning_robust.models.registry import registered_networks

OWN = list_networks("own")
# Wide networks differ from the small wide_resnet in two numbers only.
LIGHT = [name for name in OWN if name not in ("wide_resnet28_10", "wide_resnet34_10")]


def small_shape(name: str, channels: int) -> tuple[int, int, int]:
    side = max(8, registered_networks()[name].min_size)
    return channels, side, side


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", LIGHT)
def test_logits_at_common_sizes(name: str, channels: int) -> None:
    smallest = registered_networks()[name].min_size
    for side in {max(smallest, 2), 28, 32, 35}:
        model = create_network(name, 7, (channels, side, side))
        assert model.training
        assert model(torch.rand(2, channels, side, side)).shape == (2, 7)


@pytest.mark.parametrize("name", LIGHT)
def test_images_need_not_be_square(name: str) -> None:
    assert create_network(name, 4, (3, 24, 32))(torch.rand(2, 3, 24, 32)).shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("resnet18", (3, 32, 32), 11_173_962),
        ("resnet34", (3, 32, 32), 21_282_122),
        ("resnet50", (3, 32, 32), 23_520_842),
        ("preact_resnet18", (3, 32, 32), 11_172_170),
        ("resnet20", (3, 32, 32), 269_722),
        ("resnet56", (3, 32, 32), 853_018),
        ("wide_resnet28_10", (3, 32, 32), 36_479_194),
        ("wide_resnet34_10", (3, 32, 32), 46_160_474),
        ("vgg16", (3, 32, 32), 14_728_266),
        ("vgg19", (3, 32, 32), 20_040_522),
        ("lenet5", (1, 28, 28), 61_706),
        ("lenet5", (1, 32, 32), 61_706),
        ("papernot_mnist", (1, 28, 28), 312_202),
        ("papernot_cifar10", (3, 32, 32), 1_147_978),
        ("small_cnn", (1, 28, 28), 166_406),
        ("mnist_cnn", (1, 28, 28), 3_274_634),
    ],
)
def test_published_parameter_counts(name: str, shape: tuple[int, int, int], parameters: int) -> None:
    model = create_network(name, 10, shape)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", LIGHT)
def test_fx_traces_and_folds_batch_norm(name: str) -> None:
    shape = small_shape(name, 3)
    model = create_network(name, 5, shape, mean="cifar10").eval()
    for layer in model.modules():  # statistics as after training, so that folding has something to fold
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.1, 0.1)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
    images = torch.rand(2, *shape)
    expected = model(images)
    torch.testing.assert_close(symbolic_trace(model)(images), expected)
    folded = fuse(copy.deepcopy(model))
    torch.testing.assert_close(folded(images), expected, rtol=1e-3, atol=1e-4)
    left = sum(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    if "preact" in name or "wide" in name:  # only the second of a block's two follows a convolution directly
        assert left < sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    else:
        assert left == 0


@pytest.mark.parametrize("name", LIGHT)
def test_gradient_reaches_the_pixels_in_every_layout(name: str) -> None:
    shape = small_shape(name, 3)
    model = create_network(name, 5, shape).double().eval()
    images = torch.rand(2, *shape, dtype=torch.float64)
    gradients = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = images.clone(memory_format=memory_format).requires_grad_()
        logits = model.to(memory_format=memory_format)(x)
        assert logits.dtype == torch.float64
        assert torch.isfinite(logits).all()
        (gradient,) = torch.autograd.grad(logits.square().sum(), x)
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(x.detach(), images, rtol=0, atol=0)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", LIGHT)
def test_compiles_without_a_graph_break(name: str) -> None:
    shape = small_shape(name, 1)
    model = create_network(name, 5, shape, mean="mnist").eval()
    images = torch.rand(2, *shape)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "preact_resnet18", "wide_resnet", "vgg16"])
def test_initial_weights_are_kaiming(name: str) -> None:
    network = create_network(name, 10, (3, 32, 32)).network
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 2000:
            fan_out = layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1]
            assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


def test_seed_fixes_the_weights() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(create_network("resnet20", 10, (3, 32, 32)).state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_creation_leaves_batch_norm_untouched() -> None:
    for name in ("digits_cnn", "resnet20", "vgg16"):
        for layer in create_network(name, 10, (1, 32, 32)).modules():
            if isinstance(layer, nn.BatchNorm2d):
                assert layer.num_batches_tracked == 0
                assert torch.equal(layer.running_mean, torch.zeros_like(layer.running_mean))


def test_options_reach_the_network() -> None:
    plain = create_network("vgg16", 10, (3, 32, 32), batch_norm=False)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in plain.modules())
    wide = create_network("small_cnn", 10, (1, 28, 28), width=2)
    assert wide.state_dict()["network.0.weight"].shape == (32, 1, 4, 4)
    assert wide.state_dict()["network.5.weight"].shape == (200, 64 * 7 * 7)
    dropped = create_network("papernot_mnist", 10, (1, 28, 28), dropout=0.25)
    assert [layer.p for layer in dropped.modules() if isinstance(layer, nn.Dropout)] == [0.25, 0.25]
    shallow = create_network("wide_resnet", 10, (3, 32, 32), depth=10, width=1, dropout=0.3)
    assert sum(isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3) for layer in shallow.modules()) == 7


def test_keys_are_those_of_the_published_checkpoints() -> None:
    wide = create_network("wide_resnet34_10", 10, (3, 32, 32)).network.state_dict()
    assert {"conv1.weight", "block1.layer.0.convShortcut.weight", "block3.layer.4.bn2.weight", "fc.bias"} <= set(wide)
    resnet = create_network("resnet18", 10, (3, 32, 32)).network.state_dict()
    assert {"layer2.0.shortcut.0.weight", "layer2.0.shortcut.1.running_var", "linear.weight"} <= set(resnet)
    papernot = create_network("papernot_mnist", 10, (1, 28, 28)).network.state_dict()
    assert {"feature_extractor.conv4.weight", "classifier.fc3.bias"} <= set(papernot)


def test_digits_cnn_learns_the_digits_in_seconds() -> None:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels))
    train, test = order[:1400], order[1400:]
    model = create_network("digits_cnn", 10, (1, 8, 8))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(8):
        for batch in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = (model.eval()(images[test]).argmax(1) == labels[test]).double().mean().item()
    assert accuracy > 0.96

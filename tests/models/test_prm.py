"""The Pixel Robustness Manipulator: what it reads, what λ does to value and gradient, and the published sizes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_robust.attacks import PGD, accelerate
from lightning_robust.errors import UserError
from lightning_robust.metrics import input_gradient, stride_pattern
from lightning_robust.models import ManipulatedNetwork, PixelRobustnessManipulator, SparsePattern

#: The six of the paper's code base, its SegNet's odd grid, and some that have overlap, rests or neither.
PATTERNS = [
    SparsePattern(),
    SparsePattern(stride=(2, 1)),
    SparsePattern(stride=(1, 2)),
    SparsePattern(kernel=(1, 2), stride=(2, 4)),
    SparsePattern(kernel=(2, 1), stride=(4, 2)),
    SparsePattern(kernel=2, stride=4),
    SparsePattern(offset=1),
    SparsePattern(kernel=1, stride=3, offset=(0, 2)),
    SparsePattern(kernel=1, stride=2, offset=5),
    SparsePattern(kernel=3, stride=2),
]
BODIES: list[dict[str, Any]] = [
    {"body": "unet"},
    {"body": "unet", "refine": True},
    {"body": "unet", "skip": True},
    {"body": "segnet"},
]
NAMES = ["unet", "refined", "skip", "segnet"]


def manipulator(**settings: Any) -> PixelRobustnessManipulator:
    """A small one, in float64, with every weight and bias at random."""
    torch.manual_seed(0)
    prm = PixelRobustnessManipulator(**{"channels": 2, "width": 4, "depth": 2, **settings}).double()
    with torch.no_grad():
        for parameter in prm.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return prm.eval()


def images(height: int = 16, width: int = 16, count: int = 2, channels: int = 2) -> Tensor:
    return torch.rand(count, channels, height, width, dtype=torch.float64)


def gradient(function: Any, x: Tensor) -> Tensor:
    """Of a random direction of the output."""
    x = x.clone().requires_grad_()
    out = function(x)
    (found,) = torch.autograd.grad((out * torch.randn_like(out)).sum(), x)
    return found


# -- the published networks --------------------------------------------------------------------------------------------


def test_the_published_unet() -> None:
    prm = PixelRobustnessManipulator()
    assert sum(parameter.numel() for parameter in prm.parameters()) == 31_033_423
    convolutions = [
        (
            type(layer).__name__.removesuffix("2d"),
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
        )
        for layer in prm.modules()
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
    ]
    widths = (64, 128, 256, 512, 1024)
    table = [("Conv", 3, 3, (1, 1), (2, 2))]
    for before, after in zip((3, *widths), widths, strict=False):
        table += [("Conv", before, after, (3, 3), (1, 1)), ("Conv", after, after, (3, 3), (1, 1))]
    table += [("ConvTranspose", 2 * after, after, (2, 2), (2, 2)) for after in widths[-2::-1]]
    for after in widths[-2::-1]:
        table += [("Conv", 2 * after, after, (3, 3), (1, 1)), ("Conv", after, after, (3, 3), (1, 1))]
    table += [("ConvTranspose", 64, 3, (3, 3), (2, 2))]
    assert convolutions == table
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in prm.modules())


def test_the_unet_is_what_the_table_says() -> None:
    """Written out with torch's functions, with the exit's padding and output padding of 1."""
    prm = manipulator()
    weights = dict(prm.named_parameters())

    def conv(x: Tensor, name: str, **options: Any) -> Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], **options)

    def block(x: Tensor, name: str) -> Tensor:
        x = conv(x, f"{name}.0", padding=1).relu()
        return conv(x, f"{name}.2", padding=1).relu()

    def rise(x: Tensor, name: str) -> Tensor:
        return F.conv_transpose2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=2)

    x = images()
    first = block(conv(x, "entry", stride=2), "body.down.0")
    second = block(F.max_pool2d(first, 2), "body.down.1")
    third = block(F.max_pool2d(second, 2), "body.down.2")
    up = block(torch.cat((rise(third, "body.rise.0"), second), 1), "body.up.0")
    up = block(torch.cat((rise(up, "body.rise.1"), first), 1), "body.up.1")
    last = weights["exit.rise.weight"], weights["exit.rise.bias"]
    wanted = F.conv_transpose2d(up, *last, stride=2, padding=1, output_padding=1)
    torch.testing.assert_close(prm.reconstruct(x), wanted, rtol=0, atol=1e-12)


def test_the_segnet_is_vgg16_and_its_mirror() -> None:
    prm = PixelRobustnessManipulator(body="segnet")
    vgg = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    mirror = [512, 512, 512, 512, 512, 256, 256, 256, 128, 128, 64, 64]
    count = 3 * 64 + 64  # the entry has kernel 1
    for before, after in zip([*vgg, *mirror], [*vgg[1:], *mirror], strict=False):
        count += 9 * before * after + after
    count += 2 * sum([*vgg, *mirror])  # BatchNorm
    count += 9 * 64 * 3 + 3  # the exit
    assert sum(parameter.numel() for parameter in prm.parameters()) == count
    with pytest.raises(UserError, match="depth=6 is too deep, give 5 or less"):
        PixelRobustnessManipulator(body="segnet", depth=6)


def test_segnet_puts_values_back_where_they_came_from() -> None:
    body = manipulator(body="segnet", depth=1, width=1).body
    body.down[0] = nn.Identity()
    body.up[0] = nn.Identity()
    x = torch.tensor([[1.0, 2.0, 0.0, 5.0], [3.0, 0.5, 1.0, 2.0]]).view(1, 1, 2, 4)
    assert body(x).tolist() == [[[[0.0, 0.0, 0.0, 5.0], [3.0, 0.0, 0.0, 0.0]]]]


@pytest.mark.parametrize("size", [(16, 16), (15, 17)])
def test_the_ace_form_is_its_formula(size: tuple[int, int]) -> None:
    """x + λ·Pad(ConvT₃,₂(Conv₁,₂(x))), padded or cropped on the right and below, as its code does."""
    prm = manipulator(body="ace", lam=3.0)
    x = images(*size)
    added = F.conv_transpose2d(prm.entry(x), prm.exit.weight, prm.exit.bias, stride=2)
    added = F.pad(added, (0, size[1] - added.shape[-1], 0, size[0] - added.shape[-2]))
    torch.testing.assert_close(prm(x), x + 3 * added)
    torch.testing.assert_close(prm.reconstruct(x), x + added)
    off = ~prm.connected_pixels(*size)
    (found,) = torch.autograd.grad(prm(x.requires_grad_()).sum(), x)
    assert bool((found[..., off] == 1).all())  # the image itself stays whole
    assert bool((found[..., ~off] != 1).all())


# -- λ -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [*BODIES, {"body": "ace"}], ids=[*NAMES, "ace"])
def test_lambda_0_is_the_identity_in_value_and_gradient(body: dict[str, Any]) -> None:
    prm = manipulator(**body, lam=0.0)
    x = images(13, 16)
    assert torch.equal(prm(x), x)
    x.requires_grad_()
    direction = torch.randn_like(x)
    (found,) = torch.autograd.grad((prm(x) * direction).sum(), x)
    assert torch.equal(found, direction)


@pytest.mark.parametrize("size", [(16, 16), (13, 17)])
@pytest.mark.parametrize("body", BODIES, ids=NAMES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_lambda_1_has_a_gradient_at_connected_pixels_alone(
    pattern: SparsePattern, body: dict[str, Any], size: tuple[int, int]
) -> None:
    prm = manipulator(pattern=pattern, lam=1.0, **body)
    x = images(*size)
    connected = prm.connected_pixels(*size)
    assert torch.equal(connected, stride_pattern(*size, *(pattern.axes(n) for n in ("kernel", "stride", "offset"))))
    assert prm(x).shape == x.shape
    assert torch.equal(prm(x), prm.reconstruct(x))
    found = gradient(prm, x).abs().sum((0, 1))
    assert float(found[~connected].abs().sum()) == 0
    assert bool((found[connected] > 0).all())
    # nor does any other pixel have a say in the value
    other = torch.where(connected, x, torch.rand_like(x))
    assert torch.equal(prm(other), prm(x))


def test_between_the_gradient_is_the_mixture() -> None:
    prm = manipulator()
    x = images().requires_grad_()
    direction = torch.randn_like(x)
    found = [torch.autograd.grad((prm(x, lam) * direction).sum(), x)[0] for lam in (0.0, 0.3, 1.0)]
    torch.testing.assert_close(found[1], 0.7 * found[0] + 0.3 * found[2])


def test_a_lambda_for_each_image() -> None:
    prm = manipulator()
    x = images(count=4)
    shares = torch.tensor([0.0, 0.25, 0.9, 1.0])
    found = prm(x, shares)
    for number, share in enumerate(shares):
        torch.testing.assert_close(found[number : number + 1], prm(x[number : number + 1], float(share)))
    torch.testing.assert_close(prm(x, torch.tensor(0.25)), prm(x, 0.25))
    prm.lam = 0.25
    torch.testing.assert_close(prm(x), prm(x, 0.25))
    with pytest.raises(UserError, match=r"lam of shape \(3,\) for 4 images"):
        prm(x, shares[:3])
    with pytest.raises(UserError, match=r"lam=1.1 is the share"):
        prm(x, shares * 1.1)


def test_lambda_is_exact_in_every_precision() -> None:
    prm = PixelRobustnessManipulator(1, width=4, depth=1, lam=0.9)
    assert prm.lam == 0.9
    assert prm.lam_value.item() == pytest.approx(0.9, rel=1e-7)
    assert prm.double().lam_value.item() == 0.9
    assert prm.half().double().lam_value.item() == 0.9
    assert not any("lam" in name or "mask" in name for name in prm.state_dict())


def test_another_lambda_for_a_while() -> None:
    net = ManipulatedNetwork(manipulator(lam=0.5), nn.Sequential(nn.Flatten(), nn.Linear(512, 3)).double())
    x = images().requires_grad_()
    wanted = torch.autograd.grad(net.classifier(net.prm(x, 0.25)).sum(), x)[0]
    with net.at(0.25) as lent:
        assert lent is net
        assert net.prm.lam == 0.25
        logits = net(x)
    assert net.prm.lam == 0.5
    # the backward pass may come after λ was put back
    torch.testing.assert_close(torch.autograd.grad(logits.sum(), x)[0], wanted)
    with pytest.raises(RuntimeError, match="inside"), net.at(1.0):
        raise RuntimeError("inside")
    assert net.prm.lam == 0.5
    with pytest.raises(UserError, match="lam=2"), net.at(2.0):
        pass
    assert net.prm.lam == 0.5


def test_lambda_may_change_in_inference_mode() -> None:
    """As in an evaluation on one device, between whose batches an attack needs gradients."""
    with torch.inference_mode():
        inside = ManipulatedNetwork(manipulator(), nn.Sequential(nn.Flatten(), nn.Linear(512, 3)).double())
    outside = ManipulatedNetwork(manipulator(), nn.Sequential(nn.Flatten(), nn.Linear(512, 3)).double())
    x, labels = images(), torch.tensor([0, 1])
    with torch.inference_mode():
        outside.prm.lam = 1.0
        found = input_gradient(outside, x, labels)
        assert found.abs().sum((0, 1))[~outside.prm.connected_pixels(16, 16)].sum() == 0
        assert found.abs().sum() > 0
    inside.prm.lam = 0.25
    assert inside.prm.lam_value.item() == 0.25


def test_nothing_is_clamped_in_between() -> None:
    net = ManipulatedNetwork(manipulator(lam=1.0), nn.Identity())
    with torch.no_grad():
        net.prm.exit.last.bias.fill_(7.0)
    assert float(net(images()).detach().max()) > 1


def test_a_call_remembers_what_it_reconstructed() -> None:
    prm = manipulator()
    x = images()
    with prm.remembering(x) as found:
        prm(x.clone())
        assert not found
        prm(x)
        prm(x, 0.3)
    assert len(found) == 1
    assert torch.equal(found[0], prm.reconstruct(x))


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (9, 31), (10, 12), (33, 7)])
def test_what_the_body_cannot_divide_is_padded_inside(size: tuple[int, int]) -> None:
    """Zeros around the entry's map, which is what a larger image of connected zeros would give without a bias."""
    prm = manipulator(depth=2)
    with torch.no_grad():
        prm.entry.bias.zero_()
    x = images(*size)
    larger = F.pad(x, (0, -size[1] % 8, 0, -size[0] % 8))
    torch.testing.assert_close(prm.reconstruct(x), prm.reconstruct(larger)[..., : size[0], : size[1]])


def test_an_image_smaller_than_the_reach_is_told_the_depth_that_would_do() -> None:
    x = torch.rand(1, 1, 8, 8)
    prm = PixelRobustnessManipulator(1, width=2)
    for refused in (
        lambda: prm(x),
        lambda: prm.check_size(8, 8),
        lambda: PixelRobustnessManipulator(1, width=2, image_size=(8, 8)),
    ):
        with pytest.raises(UserError, match=r"8×8 pixels .* 4×4 cells, .* depth=4; give a depth of 3 or less"):
            refused()
    assert PixelRobustnessManipulator(1, width=2, depth=3)(x).shape == x.shape
    with pytest.raises(UserError, match="connects no pixel"):
        PixelRobustnessManipulator(1, SparsePattern(offset=8), width=2, depth=1)(x)
    with pytest.raises(UserError, match=r"made for \(N, 1, H, W\)"):
        prm(torch.rand(1, 3, 32, 32))


# -- patterns ----------------------------------------------------------------------------------------------------------


def test_shares_of_the_published_patterns() -> None:
    shares = [float(pattern.pixels(32, 32).double().mean()) for pattern in PATTERNS[:7]]
    assert shares == [0.25, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]


@pytest.mark.parametrize("skip", [False, True])
def test_a_free_mask(tmp_path: Path, skip: bool) -> None:
    mask = torch.rand(13, 16) < 0.2
    np.save(tmp_path / "mask.npy", mask.numpy())
    pattern = SparsePattern(mask=str(tmp_path / "mask.npy"))
    written = pattern.written_out(13, 16)
    (tmp_path / "mask.npy").unlink()
    assert written.mask is not None
    assert written.mask.startswith("bits:13x16:")
    ways = [manipulator(mask=mask, skip=skip), manipulator(pattern=written, image_size=(13, 16), skip=skip)]
    x = images(13, 16)
    for prm in ways:
        prm.lam = 1.0
        assert torch.equal(prm.connected_pixels(13, 16), mask)
        found = gradient(prm, x).abs().sum((0, 1))
        assert float(found[~mask].abs().sum()) == 0
        assert bool((found[mask] > 0).all())
    assert torch.equal(ways[0](x), ways[1](x))
    for call in (lambda: ways[0].connected_pixels(16, 16), lambda: ways[0](images()), lambda: written.pixels(16, 16)):
        with pytest.raises(UserError, match="mask is of 13×16 pixels and the images have 16×16"):
            call()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_skip_begins_as_an_interpolation(pattern: SparsePattern) -> None:
    torch.manual_seed(0)
    prm = PixelRobustnessManipulator(2, pattern, width=4, depth=2, skip=True).double()
    x = images(16, 17)
    connected = prm.connected_pixels(16, 17)
    assert torch.equal(prm.reconstruct(x)[..., connected], x[..., connected])
    rows, columns = torch.arange(16.0).view(-1, 1), torch.arange(17.0)
    plane = (0.3 + 0.02 * rows - 0.01 * columns).double().expand(1, 2, 16, 17)
    inner = [connected.any(axis).nonzero()[:, 0] for axis in (1, 0)]
    inside = (..., slice(int(inner[0][0]), int(inner[0][-1]) + 1), slice(int(inner[1][0]), int(inner[1][-1]) + 1))
    torch.testing.assert_close(prm.reconstruct(plane)[inside], plane[inside])
    assert prm.reconstruct(plane).max() <= plane.max() + 1e-12  # constant beyond


def test_the_skip_of_a_mask_takes_the_nearest() -> None:
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[1, 1] = mask[6, 6] = True
    prm = PixelRobustnessManipulator(1, width=2, depth=1, skip=True, mask=mask)
    x = torch.rand(1, 1, 8, 8)
    found = prm.reconstruct(x)[0, 0]
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    near = (rows - 1) ** 2 + (columns - 1) ** 2
    far = (rows - 6) ** 2 + (columns - 6) ** 2
    assert bool((found[near < far] == x[0, 0, 1, 1]).all())
    assert bool((found[near > far] == x[0, 0, 6, 6]).all())


# -- stand-ins and compiled networks -----------------------------------------------------------------------------------


def classifier() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(784, 3))


@pytest.mark.parametrize("body", [*BODIES, {"body": "ace"}], ids=[*NAMES, "ace"])
def test_a_stand_in_follows_lambda(body: dict[str, Any]) -> None:
    net = ManipulatedNetwork(manipulator(**body, lam=0.2), classifier().double()).eval()
    with torch.no_grad():  # BatchNorm that does something
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2)
    before = copy.deepcopy(net.state_dict())
    fast = accelerate(net)
    norms = sum(isinstance(layer, nn.BatchNorm2d) for layer in net.modules())
    # between SegNet's entry and its BatchNorm the map may be padded
    assert fast.folded == norms - (body["body"] == "segnet")
    x = images()
    torch.testing.assert_close(fast(x), net(x))
    net.prm.lam = 0.8
    assert not torch.allclose(fast(x), net(x))
    fast.refresh()
    torch.testing.assert_close(fast(x), net(x))
    torch.testing.assert_close(fast(x[:1]), net(x[:1]))
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    low = accelerate(net.float(), dtype=torch.bfloat16)
    x = x.float()
    torch.testing.assert_close(low(x), net(x), rtol=0.1, atol=0.15)


def test_a_stand_in_still_looks_at_sizes() -> None:
    net = ManipulatedNetwork(manipulator(), nn.Sequential(classifier()[:4], nn.LazyLinear(3))).double().eval()
    net(images())
    fast = accelerate(net)
    assert fast.folded == 1
    with pytest.raises(UserError, match="smaller than the manipulator's reach"):
        fast(images(2, 2))


def test_attacks_leave_it_as_it_was() -> None:
    net = ManipulatedNetwork(manipulator(body="segnet"), classifier().double()).train()
    x, labels = images(), torch.tensor([0, 2])
    before = copy.deepcopy(net.state_dict())
    adversarial = PGD(eps=0.1, steps=3)(net, x, labels)
    assert not torch.equal(adversarial, x)
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("body", BODIES, ids=NAMES)
def test_compiles_once_for_all_lambdas(body: dict[str, Any]) -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    net = ManipulatedNetwork(manipulator(**body), classifier().double()).eval()
    compiled = torch.compile(net, backend=counter)
    x = images()
    for lam in (0.0, 0.5, 0.9, 1.0):
        net.prm.lam = lam
        torch.testing.assert_close(compiled(x), net(x))
        assert counter.frame_count == 1


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [-0.1, 1.01, float("nan"), float("inf")])
def test_lambda_out_of_range(lam: float) -> None:
    prm = PixelRobustnessManipulator(1, width=2, depth=1)
    with pytest.raises(UserError, match="between 0 and 1"):
        prm.lam = lam
    assert prm.lam == 0.9
    with pytest.raises(UserError, match="lam="):
        PixelRobustnessManipulator(1, width=2, depth=1, lam=lam)
    light = PixelRobustnessManipulator(1, body="ace", lam=1.01)
    assert light.lam == 1.01
    if lam != 1.01:
        with pytest.raises(UserError, match="ace form is 0 or more"):
            light.lam = lam


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"body": "vae"}, "body='vae' of a manipulator: choose one of unet, segnet, ace"),
        ({"width": 0}, "width=0"),
        ({"depth": 0}, "depth=0"),
        ({"body": "ace", "skip": True}, "leave refine and skip out"),
        ({"mask": torch.zeros(4, 4, dtype=torch.bool)}, "connects no pixel"),
        ({"mask": torch.ones(4, 4)}, r"is \(H, W\) bool"),
        ({"mask": torch.ones(4, 4, dtype=torch.bool), "pattern": SparsePattern(stride=4)}, "leave one of them out"),
        ({"pattern": SparsePattern(mask="mask.png")}, "give image_size"),
        ({"pattern": SparsePattern(mask="mask.png"), "image_size": (8, 8)}, "mask.png does not exist"),
        ({"mask": torch.ones(4, 4, dtype=torch.bool), "image_size": (8, 8)}, "4×4 pixels and the images have 8×8"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        PixelRobustnessManipulator(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kernel": 0}, "kernel=0 is one whole number of at least 1"),
        ({"stride": (2, 0)}, r"stride=\(2, 0\)"),
        ({"stride": (2, 2, 2)}, "stride"),
        ({"offset": -1}, "offset=-1 is one whole number of at least 0"),
        ({"mask": "mask.png", "stride": 4}, "leave one of them out"),
    ],
)
def test_patterns_that_are_none(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        SparsePattern(**settings)


def test_patterns_from_configs_are_hashable_and_equal() -> None:
    assert SparsePattern(stride=[2, 4]) == SparsePattern(stride=(2, 4))  # type: ignore[arg-type]
    assert len({SparsePattern(stride=[2, 4]), SparsePattern(stride=(2, 4))}) == 1  # type: ignore[arg-type]

"""Class activation maps: by hand, on planted patches, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from lightning_robust.errors import UserError
from lightning_robust.models import create_network
from lightning_robust.regions import ActivationMap, Threshold, feature_maps, importance, unit_scale


def pooled(channels: int = 1, classes: int = 3) -> nn.Module:
    """Convolution, ReLU, global average pooling, one linear layer: a network that CAM is defined for."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(channels, 5, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, classes),
    )


def flat(classes: int = 3) -> nn.Module:
    """The same without pooling: each place of the map has weights of its own."""
    torch.manual_seed(4)
    return nn.Sequential(nn.Conv2d(1, 5, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, classes))


class Reads(nn.Module):
    """A model that sees a patch of the image and nothing else."""

    def __init__(self, patch: Tensor) -> None:
        super().__init__()
        self.patch = patch
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images * self.patch).mean((2, 3)))


def test_cam_is_the_weighted_sum_of_channels() -> None:
    model, images, classes = pooled().eval(), torch.rand(4, 1, 12, 10), torch.tensor([0, 2, 1, 2])
    found = importance(model, images, classes, ActivationMap(method="cam", layer="1"))
    with torch.no_grad():
        channels = model[1](model[0](images))
        weights = model[4].weight[classes]
        by_hand = (weights[:, :, None, None] * channels).sum(1)
    torch.testing.assert_close(found, unit_scale(by_hand), rtol=1e-4, atol=1e-5)


def test_grad_cam_is_by_mean_gradients_and_its_kin_by_those_of_each_place() -> None:
    model, images, classes = flat().eval(), torch.rand(3, 1, 12, 12), torch.tensor([2, 0, 1])
    channels = model[1](model[0](images)).detach().requires_grad_()
    logits = model[3](model[2](channels))
    (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), channels)
    by_hand = {
        "grad_cam": (gradient.mean((2, 3), keepdim=True) * channels).sum(1).relu(),
        "hires_cam": (gradient * channels).sum(1).relu(),
        "layer_cam": (gradient * channels).relu().sum(1),
    }
    for method, expected in by_hand.items():
        found = importance(model, images, classes, ActivationMap(method=method, layer="1"))  # type: ignore[arg-type]
        fine = nn.functional.interpolate(
            unit_scale(expected.detach())[:, None], (12, 12), mode="bilinear", align_corners=False
        )[:, 0]
        torch.testing.assert_close(found, unit_scale(fine), rtol=1e-4, atol=1e-5)


def test_auto_takes_cam_where_it_is_defined() -> None:
    images = torch.rand(2, 1, 12, 12)
    assert ActivationMap().resolved(pooled(), images).method == "cam"
    assert ActivationMap().resolved(flat(), images).method == "grad_cam"
    assert ActivationMap().resolved(pooled(), images[:1]).method == "cam"  # also of one image
    resnet = create_network("resnet20", 4, (3, 16, 16))
    assert ActivationMap().resolved(resnet, torch.rand(2, 3, 16, 16)) == ActivationMap(
        method="cam", layer="network.layer3"
    )


@pytest.mark.parametrize("method", ["cam", "grad_cam", "hires_cam", "layer_cam"])
def test_a_model_that_reads_a_planted_patch_is_seen_to_look_there(method: str) -> None:
    patch = torch.zeros(16, 16)
    patch[3:9, 6:12] = 1
    model = Reads(patch).eval()
    model.head.weight.data = model.head.weight.data.abs()  # all that it sees speaks for a class
    near = nn.functional.max_pool2d(patch[None, None], 3, 1, 1)[0, 0] > 0  # the convolution reaches one pixel further
    found = importance(model, torch.rand(5, 1, 16, 16), torch.zeros(5).long(), ActivationMap(method=method))  # type: ignore[arg-type]
    region = Threshold("otsu").region(found)
    assert region.flatten(1).any(1).all()
    assert not (region & ~near).any()
    assert (found * ~near).max() == 0


def test_the_default_layer_is_the_last_that_is_large_enough() -> None:
    model = create_network("vgg16", 2, (1, 28, 28), width=4)
    images = torch.rand(2, 1, 28, 28)
    assert ActivationMap().resolved(model, images).layer == "network.features.32"
    assert feature_maps(model, images)["network.features.32"] == (32, 4, 4)
    assert ActivationMap(least_side=7).resolved(model, images).layer == "network.features.22"
    assert ActivationMap(least_side=2).resolved(model, images).layer == "network.features.42"
    with pytest.raises(UserError, match=r"near its beginning \('network.features.5'\)"):  # the last of the largest
        ActivationMap(least_side=999).resolved(model, images)


def test_a_flat_map_is_zero() -> None:
    model = pooled().eval()
    nn.init.zeros_(model[4].weight)
    assert importance(model, torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).abs().max() == 0


def test_the_model_comes_back_as_it_was_and_inference_mode_is_no_matter() -> None:
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(0.5), *pooled(5)).train()
    model[1].eval()
    images, classes = torch.rand(3, 1, 12, 12), torch.tensor([0, 1, 2])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    found = importance(model, images, classes)
    with torch.inference_mode():
        again = importance(model, images.clone(), classes.clone())
    assert torch.equal(found, again)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_map_depends_on_its_image_alone() -> None:
    model = flat().double().eval()
    images, classes = torch.rand(7, 1, 12, 12, dtype=torch.float64), torch.arange(7) % 3
    whole = importance(model, images, classes)
    torch.testing.assert_close(importance(model, images[2:5], classes[2:5]), whole[2:5], rtol=0, atol=1e-12)


def test_a_compiled_network_is_seen_through() -> None:
    model, images, classes = pooled().eval(), torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    expected = importance(model, images, classes)
    model.compile(backend="eager")
    torch.testing.assert_close(importance(model, images, classes), expected)
    torch._dynamo.reset()


def test_layers_that_do_not_do_name_those_that_would() -> None:
    model = create_network("vgg16", 2, (1, 28, 28), width=4)
    images = torch.rand(2, 1, 28, 28)
    for layer, message in (
        ("features.99", r"layer='features.99': the model has no such layer; these would do: .*features.32 \(4×4\)"),
        ("features.43", r"layer='features.43': its output has no spatial extent.*these would do: .*\(4×4\)"),
        ("classifier", "no spatial extent"),
    ):
        with pytest.raises(UserError, match=message):
            ActivationMap(layer=layer).resolved(model, images)
        with pytest.raises(UserError, match=message):
            importance(model, images, torch.tensor([0, 1]), ActivationMap(method="grad_cam", layer=layer))
    parts = [nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 1, 3, padding=1))) for _ in range(2)]
    twins = nn.Sequential(*parts, nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(UserError, match=r"layer='conv' could be 0.conv, 1.conv: write one of them out"):
        ActivationMap(layer="conv").resolved(twins, torch.rand(2, 1, 8, 8))


def test_bad_input() -> None:
    with pytest.raises(UserError, match="method='gradcam': choose auto"):
        ActivationMap(method="gradcam")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="least_side=0"):
        ActivationMap(least_side=0)
    with pytest.raises(UserError, match=r"method=cam is defined where.*use grad_cam"):
        ActivationMap(method="cam", layer="1").resolved(flat(), torch.rand(2, 1, 12, 12))
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(UserError, match=r"no feature map .* with spatial extent"):
        importance(mlp, torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))
    deep = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), *[nn.Linear(128, 128) for _ in range(6)], nn.Linear(128, 2))
    with pytest.raises(UserError, match="near its beginning"):
        importance(deep, torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))
    with pytest.raises(UserError, match="one integer an image"):
        importance(pooled(), torch.rand(2, 1, 8, 8), torch.tensor([0.0, 1.0]))
    with pytest.raises(UserError, match="non-empty batch"):
        importance(pooled(), torch.rand(1, 8, 8), torch.tensor([0]))


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(
        UserError, match=r"needs captum, which is not installed: pip install 'lightning-robust\[regions"
    ):
        importance(pooled(), torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))


def test_importing_the_regions_imports_no_extra_library_and_no_lightning() -> None:
    code = (
        "import sys, lightning_robust.regions; "
        "sys.exit(any(m in sys.modules for m in ('captum', 'scipy.ndimage', 'pytorch_lightning')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

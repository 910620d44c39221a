"""Networks by name: precedence, timm and torchvision, and what is refused."""

from __future__ import annotations

import subprocess
import sys
import urllib.error
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
import torchvision
from torch import nn

from lightning_robust.errors import UserError
from lightning_robust.models import create_network, list_networks, register_network
from lightning_robust.models.registry import _NETWORKS

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_own_names_come_first_and_prefixes_reach_the_others() -> None:
    own = create_network("resnet18", 10, (3, 32, 32)).network
    from_timm = create_network("timm/resnet18", 10, (3, 32, 32)).network
    from_torchvision = create_network("torchvision/resnet18", 10, (3, 32, 32)).network
    assert own.conv1.stride == (1, 1)
    assert isinstance(from_timm, timm.models.ResNet)
    assert isinstance(from_torchvision, torchvision.models.ResNet)
    assert from_timm.conv1.stride == from_torchvision.conv1.stride == (2, 2)


def test_plain_library_names() -> None:
    assert type(create_network("test_resnet", 4, (3, 32, 32)).network).__module__.startswith("timm.")
    network = create_network("shufflenet_v2_x0_5", 4, (3, 32, 32)).network
    assert type(network).__module__.startswith("torchvision.")


def test_list_networks() -> None:
    names = list_networks()
    own = list_networks("own")
    assert names[: len(own)] == own
    assert {"resnet18", "wide_resnet34_10", "digits_cnn"} <= set(own)
    assert {"timm/resnet18", "torchvision/vit_b_16"} <= set(names)
    assert len(names) == len(own) + len(list_networks("timm")) + len(list_networks("torchvision"))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit", "test_nfnet"])
@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 64, 64)])
def test_timm(name: str, shape: tuple[int, int, int]) -> None:
    model = create_network(f"timm/{name}", 6, shape)
    images = torch.rand(2, *shape, requires_grad=True)
    logits = model(images)
    assert logits.shape == (2, 6)
    (gradient,) = torch.autograd.grad(logits.square().sum(), images)
    assert gradient.shape == images.shape
    assert model.mean is None


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "squeezenet1_1", "shufflenet_v2_x0_5", "densenet121"])
@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 64, 48)])
def test_torchvision(name: str, shape: tuple[int, int, int]) -> None:
    model = create_network(f"torchvision/{name}", 6, shape)
    images = torch.rand(2, *shape, requires_grad=True)
    logits = model(images)
    assert logits.shape == (2, 6)
    (gradient,) = torch.autograd.grad(logits.square().sum(), images)
    assert gradient.shape == images.shape


def test_transformers_take_the_image_size() -> None:
    vit = create_network("timm/vit_tiny_patch16_224", 5, (3, 32, 32), depth=1, patch_size=8)
    assert vit.network.pos_embed.shape[1] == 1 + 16
    assert create_network("vit_b_32", 5, (3, 64, 64)).network.encoder.pos_embedding.shape[1] == 1 + 4


def test_googlenet_returns_one_tensor_in_training() -> None:
    assert create_network("torchvision/googlenet", 5, (3, 32, 32))(torch.rand(2, 3, 32, 32)).shape == (2, 5)


def test_pretrained_timm_brings_its_normalisation(tmp_path: Path) -> None:
    """The hub's answer is replaced by a file that timm reads in its place."""
    published = timm.create_model("test_resnet")
    torch.save(published.state_dict(), tmp_path / "published.pth")
    arguments: dict[str, Any] = {"pretrained_cfg_overlay": {"file": str(tmp_path / "published.pth")}}
    model = create_network("timm/test_resnet", 5, (3, 32, 32), pretrained=True, **arguments)
    cfg = published.pretrained_cfg
    assert model.normalization == (tuple(cfg["mean"]), tuple(cfg["std"]))
    assert torch.equal(model.network.conv1[0].weight, published.conv1[0].weight)
    own = create_network("timm/test_resnet", 5, (3, 32, 32), pretrained=True, mean="none", **arguments)
    assert own.mean is None
    gray = create_network("timm/test_resnet", 5, (1, 32, 32), pretrained=True, **arguments)
    assert gray.normalization.mean == pytest.approx([sum(cfg["mean"]) / 3])


@pytest.fixture
def torchvision_hub(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Torchvision's hub, answering every request with one SqueezeNet."""
    published = torchvision.models.squeezenet1_1()
    monkeypatch.setattr(
        torchvision.models._api, "load_state_dict_from_url", lambda *args, **kwargs: published.state_dict()
    )
    return published


def test_pretrained_torchvision_brings_weights_and_normalisation(torchvision_hub: nn.Module) -> None:
    images = torch.rand(2, 3, 64, 64)
    model = create_network("squeezenet1_1", 1000, (3, 64, 64), pretrained=True).eval()
    assert model.normalization == IMAGENET
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    torch.testing.assert_close(model(images), torchvision_hub.eval()((images - mean) / std))


def test_pretrained_torchvision_with_other_classes_and_gray_images(torchvision_hub: nn.Module) -> None:
    model = create_network("squeezenet1_1", 7, (1, 64, 64), pretrained=True).eval()
    theirs, ours = torchvision_hub.state_dict(), model.network.state_dict()
    for name, value in ours.items():
        if name == "features.0.weight":
            torch.testing.assert_close(value, theirs[name].sum(1, keepdim=True))
        elif name.startswith("classifier.1"):
            assert value.shape[0] == 7
        else:
            assert torch.equal(value, theirs[name]), name
    assert model.normalization.mean == pytest.approx([sum(IMAGENET[0]) / 3])


def test_an_unreachable_hub_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("timm/resnet18", "torchvision/resnet18"):
        with pytest.raises(UserError, match=rf"weights of {name} could not be fetched from their hub .* as weights"):
            create_network(name, 10, (3, 32, 32), pretrained=True)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet81", "'?resnet"),
        ("ResNet-18", "resnet18"),
        ("wideresnet28_10", "wide_resnet28_10"),
        ("preactresnet18", "preact_resnet18"),
        ("torchvision/resnet19", "torchvision/resnet18"),
        ("timm/convnext_tinny", "timm/convnext_tiny"),
        ("mobilenet_v9", "torchvision/mobilenet_v2"),
        ("qqqqqq", r"list_networks\(\)"),
        ("", r"list_networks\(\)"),
        ("elsewhere/resnet18", "resnet18"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UserError, match=f"no network named '{name}'; .*{near}"):
        create_network(name, 10, (3, 32, 32))


def test_own_networks_have_no_published_weights() -> None:
    with pytest.raises(UserError, match="give weights, or the pretrained timm/resnet18 or torchvision/resnet18"):
        create_network("resnet18", 10, (3, 32, 32), pretrained=True)
    with pytest.raises(UserError, match=r"give weights\.$"):
        create_network("papernot_mnist", 10, (1, 28, 28), pretrained=True)


@pytest.mark.parametrize(
    ("name", "tag_message"), [("timm/resnet18.nosuch", "nosuch"), ("timm/cspresnet50d", "No pretrained weights")]
)
def test_timm_weights_that_do_not_exist(name: str, tag_message: str) -> None:
    with pytest.raises(UserError, match=tag_message):
        create_network(name, 10, (3, 64, 64), pretrained=True)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("lenet5", (1, 8, 8), "lenet5 needs images of at least 12×12 pixels, not 8×8"),
        ("papernot_mnist", (1, 28, 15), "at least 16×16 pixels, not 28×15"),
        ("torchvision/alexnet", (3, 16, 16), "alexnet cannot take images of 3×16×16"),
        ("timm/bat_resnext26ts", (3, 36, 36), "3×36×36: a check inside it fails"),
        ("torchvision/vit_b_16", (3, 32, 48), "square"),
        ("torchvision/vit_b_16", (3, 30, 30), "3×30×30"),
        ("resnet20", (32, 32, 3), r"channels last: give \(3, 32, 32\)"),
        ("resnet20", (3, 0, 32), "image_shape"),
        ("resnet20", (32, 32), "image_shape"),
    ],
)
def test_image_shapes_that_cannot_be(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_network(name, 10, shape)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet20", {"width": 2}, "resnet20 has no option width: it has none"),
        ("small_cnn", {"widht": 2}, "its options are width"),
        ("small_cnn", {"width": 0}, "at least 1"),
        ("wide_resnet", {"depth": 18}, "6·n"),
        ("wide_resnet", {"width": 0}, "at least 1"),
        ("timm/resnet18", {"widht": 2}, "widht"),
        ("timm/test_vit", {"widht": 2}, "widht"),
        ("torchvision/resnet18", {"widht": 2}, "widht"),
    ],
)
def test_unknown_or_wrong_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_network(name, 10, (3, 32, 32), **options)


def test_one_class_and_two_sources_of_weights() -> None:
    with pytest.raises(UserError, match="at least 2, not 1"):
        create_network("resnet20", 1, (3, 32, 32))
    with pytest.raises(UserError, match="one of them"):
        create_network("timm/resnet18", 10, (3, 32, 32), pretrained=True, weights="w.pth")


def test_users_register_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_robust.models.registry._NETWORKS", dict(_NETWORKS))

    @register_network("mine", min_size=2)
    def mine(num_classes: int, image_shape: tuple[int, int, int], *, bias: bool = True) -> nn.Module:
        channels, height, width = image_shape
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, num_classes, bias=bias))

    model = create_network("mine", 3, (1, 4, 4), bias=False)
    assert model(torch.rand(2, 1, 4, 4)).shape == (2, 3)
    assert set(model.state_dict()) == {"network.1.weight"}
    with pytest.raises(ValueError, match="registered already"):
        register_network("mine")(mine)


def test_a_network_that_is_no_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_robust.models.registry._NETWORKS", dict(_NETWORKS))

    @register_network("maps")
    def maps(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        return nn.Conv2d(image_shape[0], num_classes, 1)

    with pytest.raises(UserError, match=r"maps is no classifier: it returns \(1, 10, 4, 4\)"):
        create_network("maps", 10, (1, 4, 4))


def test_own_networks_do_without_the_time_to_import_timm() -> None:
    code = (
        "import sys; from lightning_robust.models import create_network; create_network('resnet20', 10, (3, 32, 32)); "
        "sys.exit('timm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

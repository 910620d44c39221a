"""Classifiers of torchvision for any number of classes and channels."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_robust.errors import UserError
from lightning_robust.models.from_timm import fit_channels, hub_errors, unreachable
from lightning_robust.models.normalization import Normalization
from lightning_robust.models.registry import ImageShape

# Googlenet and Inception return several logits in training, and rescale ImageNet-normalised input to [-1,1] themselves
# when pretrained. Without both they are classifiers like all others that take (pixels - 0.5) / 0.5.
_INCEPTION = ("googlenet", "inception_v3")
_HALF = Normalization((0.5,), (0.5,))


def torchvision_names() -> list[str]:
    """Names of all torchvision classifiers."""
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def build_torchvision(
    name: str, num_classes: int, image_shape: ImageShape, pretrained: bool, network_args: dict[str, Any]
) -> tuple[nn.Module, Normalization | None]:
    """Create a torchvision classifier for the image shape.

    Args:
        name: torchvision's name.
        num_classes: length of the logits; another number than the pretrained one starts a fresh head.
        image_shape: channels, height, width. Other than three channels replace the first convolution (pretrained
            weights are summed over RGB for gray images); vision transformers get the image size.
        pretrained: fetch torchvision's default weights.
        network_args: further arguments of ``torchvision.models.get_model``.

    Returns:
        The network, and the normalisation of its pretrained weights (None when untrained).

    Raises:
        UserError: when the weights cannot be fetched, or an argument or image size does not suit the network.
    """
    from torchvision.models import get_model, get_model_weights

    channels, height, width = image_shape
    arguments = _size_arguments(name, image_shape) | network_args
    if name in _INCEPTION:
        arguments = {"aux_logits": False, "transform_input": False, "init_weights": True} | arguments
    normalization = None
    try:
        network = get_model(name, weights=None, num_classes=num_classes, **arguments)
        if pretrained:
            weights = get_model_weights(name).DEFAULT
            trained = get_model(name, weights=weights, **_for_pretrained(arguments))
    except TypeError as error:
        raise UserError(f"torchvision/{name} does not take these arguments: {error}.") from error
    except hub_errors() as error:
        raise unreachable(f"torchvision/{name}", error) from error
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"torchvision/{name} cannot be made for {channels}×{height}×{width} images: {error}") from error
    if channels != 3:
        _replace_first_convolution(network, channels)
    if pretrained:
        _transfer(trained, network, name, channels)
        preset = weights.transforms()
        own = _HALF if name in _INCEPTION else Normalization(tuple(preset.mean), tuple(preset.std))
        normalization = fit_channels(own, channels)
    return network, normalization


def _size_arguments(name: str, image_shape: ImageShape) -> dict[str, Any]:
    _, height, width = image_shape
    if name.startswith("vit_"):
        if height != width:
            raise UserError(f"torchvision/{name} needs square images, not {height}×{width}.")
        return {"image_size": height}
    return {"input_size": (height, width)} if name == "maxvit_t" else {}


def _for_pretrained(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments with which torchvision itself agrees to load its weights, which were made for one image size."""
    made_for_size = ("image_size", "input_size", "init_weights", "transform_input")
    return {key: value for key, value in arguments.items() if key not in made_for_size}


def _first_convolution(network: nn.Module) -> tuple[str, nn.Conv2d]:
    return next((name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d))


def _replace_first_convolution(network: nn.Module, channels: int) -> None:
    name, old = _first_convolution(network)
    new = nn.Conv2d(
        channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    parent, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(parent), attribute, new)


def _transfer(trained: nn.Module, network: nn.Module, name: str, channels: int) -> None:
    """Copy pretrained weights, all but the head where the number of classes differs."""
    from timm.models import adapt_input_conv

    target = network.state_dict()
    state = {key: value for key, value in trained.state_dict().items() if key in target}
    if channels != 3:
        stem = f"{_first_convolution(network)[0]}.weight"
        state[stem] = adapt_input_conv(channels, state[stem])
    head = _head(network)
    other = [key for key, value in state.items() if value.shape != target[key].shape]
    if unfit := [key for key in other if key.rpartition(".")[0] != head]:
        raise UserError(
            f"the pretrained weights of torchvision/{name} are for another image size ({unfit[0]} differs): use the "
            "size they were trained with, or a timm network, whose position embeddings are resized."
        )
    network.load_state_dict({key: value for key, value in state.items() if key not in other}, strict=False)


def _head(network: nn.Module) -> str:
    """Name of the classification layer: the last linear layer, or SqueezeNet's last convolution."""
    return [name for name, layer in network.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))][-1]

"""Classifiers of timm, and what their pretrained weights expect of the pixels."""

from __future__ import annotations

import sys
from typing import Any, cast

from torch import nn

from lightning_robust.errors import UserError
from lightning_robust.models.normalization import Normalization
from lightning_robust.models.registry import ImageShape

# timm is imported inside the functions: it takes seconds, and the own networks do without it.


def timm_names() -> list[str]:
    """Names of all timm networks, without pretrained tags."""
    import timm

    return timm.list_models()


def is_timm(name: str) -> bool:
    """Whether timm has the network; a pretrained tag after a dot (``resnet18.a1_in1k``) is allowed."""
    import timm

    return timm.is_model(name)


def build_timm(
    name: str, num_classes: int, image_shape: ImageShape, pretrained: bool, network_args: dict[str, Any]
) -> tuple[nn.Module, Normalization | None]:
    """Create a timm classifier for the image shape.

    Args:
        name: timm's name, with or without a pretrained tag.
        num_classes: length of the logits; another number than the pretrained one starts a fresh head.
        image_shape: channels, height, width; networks made for one size get it as ``img_size``.
        pretrained: fetch timm's weights from its hub.
        network_args: further arguments of ``timm.create_model``.

    Returns:
        The network, and the normalisation of its pretrained weights (None when untrained).

    Raises:
        UserError: when the weights cannot be fetched or do not exist, or an argument is unknown.
    """
    import timm

    channels, height, width = image_shape
    arguments = {"num_classes": num_classes, "in_chans": channels, "pretrained": pretrained, **network_args}
    cfg = timm.get_pretrained_cfg(name.partition(".")[0])
    sized = cfg is not None and cfg.fixed_input_size and tuple(cfg.input_size[1:]) != (height, width)
    try:
        if sized and "img_size" not in network_args:
            try:
                network = timm.create_model(name, img_size=(height, width), **arguments)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
                network = timm.create_model(name, **arguments)
        else:
            network = timm.create_model(name, **arguments)
    except TypeError as error:
        raise UserError(f"timm/{name} does not take these arguments: {error}.") from error
    except hub_errors() as error:
        raise unreachable(f"timm/{name}", error) from error
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"timm/{name} cannot be made for {channels}×{height}×{width} images: {error}") from error
    cfg_in_use = cast(dict[str, Any], network.pretrained_cfg)
    mean, std = cfg_in_use.get("mean"), cfg_in_use.get("std")
    if not pretrained or mean is None or std is None:
        return network, None
    return network, fit_channels(Normalization(tuple(mean), tuple(std)), channels)


def hub_errors() -> tuple[type[BaseException], ...]:
    """What a download from a hub raises: OSError from urllib and from the hub's cache, httpx's own from its client."""
    httpx = sys.modules.get("httpx")  # only newer huggingface_hub uses it, and its errors are no OSError
    return (OSError, httpx.HTTPError) if httpx else (OSError,)


def unreachable(name: str, error: BaseException) -> UserError:
    """The error for pretrained weights that could not be fetched."""
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return UserError(
        f"the pretrained weights of {name} could not be fetched from their hub ({reason}): give a file of this "
        "machine as weights, or set pretrained to false."
    )


def fit_channels(normalization: Normalization, channels: int) -> Normalization:
    """Normalisation of RGB weights for images of other channels: the mean over RGB, for all."""
    mean, std = normalization
    if len(mean) in (1, channels):
        return normalization
    return Normalization((sum(mean) / len(mean),), (sum(std) / len(std),))

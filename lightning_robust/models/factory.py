"""Networks by name: the package's own, timm's and torchvision's, all with pixels in [0,1] in and logits out."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lightning_robust.errors import UserError

# Imported for their @register_network.
from lightning_robust.models import (  # noqa: F401
    all_conv,
    nin,
    preact_resnet,
    resnet,
    small_networks,
    thin_resnet,
    vgg,
    wide_resnet,
)
from lightning_robust.models.from_timm import build_timm, is_timm, timm_names
from lightning_robust.models.from_torchvision import build_torchvision, torchvision_names
from lightning_robust.models.normalization import Normalization, Normalized, normalization_of
from lightning_robust.models.registry import ImageShape, registered_networks
from lightning_robust.models.weights import load_weights

Source = Literal["own", "timm", "torchvision"]


def create_network(
    name: str,
    num_classes: int,
    image_shape: tuple[int, int, int],
    *,
    pretrained: bool = False,
    weights: str | Path | None = None,
    mean: Sequence[float] | str | None = None,
    std: Sequence[float] | None = None,
    **network_args: Any,
) -> Normalized:
    """Create a classifier by name, with its normalisation inside.

    Args:
        name: an own network (``resnet18``, ``papernot_mnist`` … see :func:`list_networks`), else a timm or a
            torchvision network; ``timm/NAME`` and ``torchvision/NAME`` reach those that an own name hides.
        num_classes: length of the logits, at least 2.
        image_shape: channels, height and width of the images in pixels.
        pretrained: timm's or torchvision's published weights, from their hub.
        weights: a file of weights, see :func:`~lightning_robust.models.load_weights`.
        mean: per channel, for pixels in [0,1]; or the name of a normalisation, see
            :func:`~lightning_robust.models.normalization_of`. By default a pretrained network gets what it was
            trained with, every other network, also one with a ``weights`` file, takes the pixels as they are.
        std: per channel, together with a ``mean`` of numbers.
        **network_args: options of the network, such as ``dropout`` or ``width``.

    Returns:
        The network in training mode. Called with images of shape (N,C,H,W) in [0,1] it returns logits (N, classes).

    Raises:
        UserError: for an unknown name or option, an image shape the network cannot take, weights that cannot be
            fetched, read or fitted, or a wrong mean or std.

    Example:
        >>> import torch
        >>> model = create_network("digits_cnn", num_classes=10, image_shape=(1, 8, 8))
        >>> model(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    shape = _checked_shape(num_classes, image_shape)
    normalization = _normalization(mean, std, shape[0])
    if pretrained and weights is not None:
        raise UserError("pretrained and weights are two sources of the same numbers: give one of them.")
    source, bare = _resolve(name)
    trained_with = None
    if source == "own":
        network = _build_own(bare, num_classes, shape, pretrained, network_args)
    else:
        build = build_timm if source == "timm" else build_torchvision
        network, trained_with = build(bare, num_classes, shape, pretrained, network_args)
    _check_forward(network, name, num_classes, shape)
    if weights is not None:
        load_weights(network, weights)
    return Normalized(network, *(normalization or trained_with or (None, None)))


def list_networks(source: Source | None = None) -> list[str]:
    """Names that :func:`create_network` takes.

    Args:
        source: ``own``, ``timm`` or ``torchvision``; None for all.

    Returns:
        Own names first, then ``timm/NAME`` and ``torchvision/NAME``.

    Example:
        >>> "resnet20" in list_networks("own")
        True
    """
    names = []
    if source in (None, "own"):
        names += list(registered_networks())
    if source in (None, "timm"):
        names += [f"timm/{name}" for name in timm_names()]
    if source in (None, "torchvision"):
        names += [f"torchvision/{name}" for name in torchvision_names()]
    return names


def _checked_shape(num_classes: int, image_shape: Sequence[int]) -> ImageShape:
    if num_classes < 2:
        raise UserError(f"num_classes must be at least 2, not {num_classes}.")
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise UserError(f"image_shape must be (channels, height, width) in pixels, not {tuple(image_shape)}.")
    channels, height, width = image_shape
    if width in (1, 3) and channels > 4:
        raise UserError(
            f"image_shape {tuple(image_shape)} has its channels last: give ({width}, {channels}, {height})."
        )
    return channels, height, width


def _normalization(
    mean: Sequence[float] | str | None, std: Sequence[float] | None, channels: int
) -> Normalization | None:
    if isinstance(mean, str):
        if std is not None:
            raise UserError(f"mean {mean!r} names a normalization that brings its std: leave std out.")
        chosen = normalization_of(mean)
    elif mean is None and std is None:
        return None
    elif mean is None or std is None:
        raise UserError("mean and std belong together: give both as numbers per channel, or neither.")
    else:
        chosen = Normalization(tuple(mean), tuple(std))
    if any(len(values) not in (1, channels) for values in chosen):
        raise UserError(
            f"mean {list(chosen.mean)} and std {list(chosen.std)} do not suit images of {channels} channels: "
            "give one number per channel, or one for all."
        )
    return chosen


def _resolve(name: str) -> tuple[Source, str]:
    prefix, slash, bare = name.partition("/")
    if not slash:
        prefix, bare = "", name
        if name in registered_networks():
            return "own", name
    if prefix in ("", "timm") and is_timm(bare):
        return "timm", bare
    if prefix in ("", "torchvision") and bare in torchvision_names():
        return "torchvision", bare
    raise UserError(f"there is no network named {name!r}; {_nearest(name)}")


def _nearest(name: str) -> str:
    """The nearest right names; own ones first, spelt as they must be written."""
    bare = name.rpartition("/")[2].lower().replace("-", "_").partition(".")[0]
    matches: list[str] = []
    for source in ("own", "timm", "torchvision"):
        candidates = {full.rpartition("/")[2]: full for full in list_networks(source)}
        matches += [candidates[near] for near in difflib.get_close_matches(bare, candidates, n=2)]
    if not matches:
        return "list_networks() names them all."
    return f"did you mean {', '.join(matches[:-1])}{' or ' if matches[1:] else ''}{matches[-1]}?"


def _build_own(
    name: str, num_classes: int, shape: ImageShape, pretrained: bool, network_args: dict[str, Any]
) -> nn.Module:
    entry = registered_networks()[name]
    if pretrained:
        elsewhere = [full for full in list_networks() if full.rpartition("/")[2] == name and full != name]
        hint = f", or the pretrained {' or '.join(elsewhere)}" if elsewhere else ""
        raise UserError(f"{name} is this package's own network without published weights: give weights{hint}.")
    if min(shape[1:]) < entry.min_size:
        raise UserError(
            f"{name} needs images of at least {entry.min_size}×{entry.min_size} pixels, not {shape[1]}×{shape[2]}."
        )
    options = list(inspect.signature(entry.build).parameters)[2:]
    if unknown := [option for option in network_args if option not in options]:
        allowed = f"its options are {', '.join(options)}" if options else "it has none"
        raise UserError(f"{name} has no option {', '.join(unknown)}: {allowed}.")
    return entry.build(num_classes, shape, **network_args)


def _check_forward(network: nn.Module, name: str, num_classes: int, shape: ImageShape) -> None:
    """One empty image through the network: what size a network takes is best said by the network, and now."""
    parameter = next(network.parameters())
    image = torch.zeros(1, *shape, dtype=parameter.dtype, device=parameter.device)
    sizes = "×".join(map(str, shape))
    network.eval()
    try:
        with torch.no_grad():
            logits = network(image)
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        reason = str(error) or "a check inside it fails, which means another image size"
        raise UserError(f"{name} cannot take images of {sizes}: {reason}") from error
    network.train()
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, num_classes):
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise UserError(f"{name} is no classifier: it returns {got} for one image instead of (1, {num_classes}).")

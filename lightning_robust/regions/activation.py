"""Where a network looks: class activation maps of captum, upsampled to the image."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_robust.attacks.context import attacking, compiled_from
from lightning_robust.errors import UserError
from lightning_robust.regions.extra import require
from lightning_robust.regions.maps import unit_scale

Method = Literal["auto", "cam", "grad_cam", "hires_cam", "layer_cam"]

_LISTED, _LARGE = 6, 4  # layers that a message names, of at least so many rows and columns where there are some
_TOO_EARLY = 0.75  # share of the layers with weights that may follow the map that is taken by default


@dataclass(frozen=True, kw_only=True)
class ActivationMap:
    """How importance is measured: which class activation map, of which layer.

    With A_c the channels of a feature map and z the logit of a class:

    * "cam": Σ_c w_c A_c with the weights w_c of the linear layer that follows global average pooling (Zhou et al.,
      arXiv 1512.04150). It may be negative, and is scaled from its smallest to its largest value.
    * "grad_cam": ReLU(Σ_c α_c A_c), α_c the mean of ∂z/∂A_c over the map (Selvaraju et al., arXiv 1610.02391), for any
      network; behind global pooling and a linear layer it is CAM without its negative part.
    * "hires_cam": ReLU(Σ_c ∂z/∂A_c · A_c), each position with its own gradient (Draelos & Carin, arXiv 2011.08891).
    * "layer_cam": Σ_c ReLU(∂z/∂A_c · A_c), for maps behind a ReLU (Jiang et al., IEEE TIP 30, 2021); good in early
      layers.
    * "auto": "cam" where the layer is followed by global average pooling and a linear layer, else "grad_cam".

    Args:
        method: one of these.
        layer: name of the module whose output is the feature map, or its unique ending ("features.30"); by default the
            last one whose height and width are at least ``least_side``.
        least_side: see ``layer``; a map of 2×2 says little of where a network looks.

    Raises:
        UserError: for another method or side.
    """

    method: Method = "auto"
    layer: str | None = None
    least_side: int = 4

    def __post_init__(self) -> None:
        if self.method not in ("auto", "cam", "grad_cam", "hires_cam", "layer_cam"):
            raise UserError(f"activation method={self.method!r}: choose auto, cam, grad_cam, hires_cam or layer_cam")
        if self.least_side < 1:
            raise UserError(f"activation least_side={self.least_side}: at least 1")

    def resolved(self, model: nn.Module, images: Tensor) -> ActivationMap:
        """The same with the layer and the method that suit a model, so that they are found once and not each batch.

        Args:
            model: images to logits.
            images: ``(N, C, H, W)``, of which one or two pass through.

        Raises:
            UserError: for a layer that does not exist or has no spatial extent (naming some that would do), a model
                without a feature map, and "cam" of a network that it is not defined for.
        """
        require("captum", "a class activation map")
        with attacking(_plain(model)) as lent:
            assert isinstance(lent, nn.Module)
            probe = images[:2].detach().clone()
            name = _last(lent, probe, self.least_side) if self.layer is None else _named(lent, probe, self.layer)
            method = self.method
            if method in ("auto", "cam"):
                pooled = _pooled(lent, name, probe)
                if method == "cam" and not pooled:
                    raise UserError(
                        f"activation method=cam is defined where the layer is followed by global average pooling and "
                        f"one linear layer, and {name!r} is not: use grad_cam"
                    )
                method = "cam" if pooled else "grad_cam"
        return dataclasses.replace(self, layer=name, method=method)


def importance(model: nn.Module, images: Tensor, classes: Tensor, activation: ActivationMap | None = None) -> Tensor:
    """How much each pixel's surroundings speak for a class: its activation map, upsampled and scaled to [0, 1].

    What the region of importance is cut from (Chattopadhyay et al., arXiv 2011.10794). The model is lent in eval mode
    and comes back as it was; works in inference mode and under a distributed wrapper.

    Args:
        model: images ``(N, C, H, W)`` in [0, 1] to logits ``(N, K)``.
        images: ``(N, C, H, W)``.
        classes: ``(N,)`` the class that each map is of, for a region of importance the true one.
        activation: which map; by default the last feature map's CAM or Grad-CAM. Give a resolved one
            (:meth:`ActivationMap.resolved`) for many batches.

    Returns:
        ``(N, H, W)`` in the images' type, scaled to [0, 1] image by image and bilinear in between; 0 everywhere where
        the map is flat: nothing speaks for the class.

    Raises:
        UserError: as :meth:`ActivationMap.resolved`, and for other shapes.
    """
    if images.dim() != 4 or 0 in images.shape:
        raise UserError(f"images of shape {tuple(images.shape)}: give a non-empty batch (N, C, H, W)")
    if classes.shape != images.shape[:1] or classes.is_floating_point() or classes.dtype == torch.bool:
        raise UserError(
            f"classes of shape {tuple(classes.shape)} and type {classes.dtype}: one integer an image is needed, here "
            f"({len(images)},)"
        )
    activation = ActivationMap() if activation is None else activation
    if activation.layer is None or activation.method == "auto":
        activation = activation.resolved(model, images)
    require("captum", "a class activation map")
    from captum.attr import LayerGradCam, LayerGradientXActivation

    with attacking(_plain(model)) as lent:
        assert isinstance(lent, nn.Module)
        try:
            module = lent.get_submodule(_exact(lent, str(activation.layer)))
        except LookupError:
            activation.resolved(model, images)  # which says what layers there are
            raise
        given = images.detach().clone().requires_grad_()
        targets = classes.detach().to(device=images.device, dtype=torch.int64, copy=True)
        forward = _uncompiled(lent)
        if activation.method in ("cam", "grad_cam"):
            found = LayerGradCam(forward, module).attribute(
                given, target=targets, relu_attributions=activation.method == "grad_cam"
            )
        else:
            found = LayerGradientXActivation(forward, module).attribute(given, target=targets)
            if isinstance(found, Tensor) and found.dim() == 4:
                products = found.detach()
                if activation.method == "hires_cam":
                    found = products.sum(1, keepdim=True).relu()
                else:
                    found = products.relu().sum(1, keepdim=True)
        if not isinstance(found, Tensor) or found.dim() != 4 or found.shape[2:].numel() < 2:
            activation.resolved(model, images)
            raise UserError(f"activation layer={activation.layer!r}: its output is no map (N, C, h, w)")
        coarse = unit_scale(found.detach())
        fine = F.interpolate(coarse, images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    return unit_scale(fine.to(images.dtype))


def feature_maps(model: nn.Module, images: Tensor) -> dict[str, tuple[int, int, int]]:
    """The modules whose output is a map with spatial extent, in the order in which they end.

    Args:
        model: images to logits.
        images: ``(N, C, H, W)``; one of them passes through.

    Returns:
        name to (channels, height, width), without modules that are called more than once and without outputs that are
        not shaped like the image (tokens of a transformer).
    """
    return _survey(model, images)[0]


def _survey(model: nn.Module, images: Tensor) -> tuple[dict[str, tuple[int, int, int]], dict[str, int]]:
    """The maps, and of each module how many modules with weights had ended by then; of "" how many did in all."""
    height, width = images.shape[2:]
    maps: dict[str, tuple[int, int, int]] = {}
    ended: dict[str, int] = {}
    weighted = 0

    def note(name: str, has_weights: bool) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            nonlocal weighted
            weighted += has_weights
            again = name in ended
            ended[name] = weighted
            maps.pop(name, None)
            if not again and isinstance(output, Tensor) and output.dim() == 4:
                sides = output.shape[2:]
                # the sides are as those of the image, which those of (N, h, w, C) are not
                ratio = sides[0] * width / (sides[1] * height)
                if sides.numel() > 1 and 0.5 <= ratio <= 2 and sides[0] <= height:
                    maps[name] = (output.shape[1], sides[0], sides[1])

        return hook

    handles = [
        module.register_forward_hook(note(name, next(module.parameters(recurse=False), None) is not None))
        for name, module in model.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            _uncompiled(model)(images[:1])
    finally:
        for handle in handles:
            handle.remove()
    return maps, {**ended, "": weighted}


def _plain(model: nn.Module) -> nn.Module:
    """The module that a compiled one was made of: a compiled forward pass would not see a hook."""
    return compiled_from(model) or model


def _uncompiled(model: nn.Module) -> Any:
    return model._call_impl if model._compiled_call_impl is not None else model


def _last(model: nn.Module, images: Tensor, least_side: int) -> str:
    """The last map that is large enough, or the last of the largest."""
    maps, ended = _survey(model, images)
    if not maps:
        raise UserError(
            f"this {type(model).__name__} has no feature map (N, C, h, w) with spatial extent: a class activation map "
            "needs a convolutional network"
        )
    largest = max(min(sides) for _, *sides in maps.values())
    name = [name for name, (_, *sides) in maps.items() if min(sides) >= min(least_side, largest)][-1]
    if ended[""] - ended[name] > _TOO_EARLY * ended[""]:
        raise UserError(
            f"this {type(model).__name__} has its last feature map near its beginning ({name!r}), where a class "
            "activation map says little: use a convolutional network, or name that layer if you mean it"
        )
    return name


def _exact(model: nn.Module, layer: str) -> str:
    """A module's whole name from its unique ending."""
    names = [name for name, _ in model.named_modules() if name]
    if layer in names:
        return layer
    endings = [name for name in names if name.endswith(f".{layer}")]
    if len(endings) == 1:
        return endings[0]
    if endings:
        raise UserError(f"activation layer={layer!r} could be {', '.join(endings[:3])}: write one of them out")
    raise LookupError(layer)


def _named(model: nn.Module, images: Tensor, layer: str) -> str:
    """The named layer, if it gives a map."""
    found = feature_maps(model, images)
    inner = {name: sides for name, sides in found.items() if next(model.get_submodule(name).children(), None) is None}
    large = {name: sides for name, sides in inner.items() if min(sides[1:]) >= _LARGE} or inner
    listed = [f"{name} ({height}×{width})" for name, (_, height, width) in large.items()][-_LISTED:]
    would_do = f"these would do: {', '.join(listed)}" if listed else "no layer of this model does"
    try:
        name = _exact(model, layer)
    except LookupError:
        raise UserError(f"activation layer={layer!r}: the model has no such layer; {would_do}") from None
    if name not in found:
        raise UserError(
            f"activation layer={layer!r}: its output has no spatial extent (or it is called more than once); {would_do}"
        )
    return name


def _pooled(model: nn.Module, name: str, images: Tensor) -> bool:
    """Whether a layer is followed by global average pooling and a linear layer.

    Then, and only then, a logit's gradient is the same at every place of the map and for every image.
    """
    kept: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, given, output: kept.append(output))
    try:
        # another image than the first, where there is but one
        pair = torch.cat([images[:1], images[1:2] if len(images) > 1 else 1 - images[:1]]).requires_grad_()
        logits = _uncompiled(model)(pair)
    finally:
        handle.remove()
    maps = kept[0]
    gradient = torch.autograd.grad(logits[:, 0].sum() - logits[:, -1].sum(), maps)[0]
    spread = (gradient - gradient.mean((0, 2, 3), keepdim=True)).abs().max()
    return bool(spread <= 1e-4 * gradient.abs().max())

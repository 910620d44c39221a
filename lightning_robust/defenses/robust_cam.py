"""R-CAM: where an image's likely classes are seen (Prakash et al., CVPR 2018, arXiv 1801.08926)."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_robust.attacks.context import compiled_from
from lightning_robust.defenses.extra import require
from lightning_robust.errors import UserError

Combination = Literal["geometric", "rank"]

_TOO_EARLY = 0.75  # share of the layers with weights that may follow the last map


def robust_cam(
    model: nn.Module,
    images: Tensor,
    *,
    combination: Combination = "geometric",
    classes: int = 5,
    layer: str | None = None,
) -> Tensor:
    """Class activation maps of the most likely classes, combined so that a single wrong class does not dominate.

    The map of a class is captum's Grad-CAM at the last feature map, which for networks that end in average pooling and
    one linear layer is the class activation map of Zhou et al. (arXiv 1512.04150). Each is scaled to [0, 1], and so is
    their combination, of which the sources say different things, see ``combination``.

    Args:
        model: images ``(N, C, H, W)`` to logits ``(N, K)``.
        images: ``(N, C, H, W)``.
        combination: "geometric": the geometric mean, as the author's article has it; "rank": a sum weighted by
            2^(-rank), as code derived from it has it.
        classes: how many; fewer where the model has fewer.
        layer: name of the module whose output is the feature map; by default :func:`last_map`.

    Returns:
        ``(N, H, W)`` in [0, 1], 1 where the classes are seen most; 0 everywhere where all maps are flat.

    Raises:
        UserError: for a model without a feature map, and without captum.
    """
    require("captum", "R-CAM")
    from captum.attr import LayerGradCam

    model = compiled_from(model) or model
    with torch.inference_mode(False):
        images = images.detach().clone()  # a tensor made in inference mode cannot be differentiated through; a copy can
        name = last_map(model, images) if layer is None else layer
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise UserError(
                f"cam_layer={name!r}: the model has no such module; its last feature map is that of "
                f"{last_map(model, images)}"
            ) from None
        with torch.no_grad():
            logits = model(images)
        likely = logits.topk(min(classes, logits.shape[1]), dim=1).indices
        # a compiled forward pass would not see the hook
        forward = model._call_impl if model._compiled_call_impl is not None else model
        cam = LayerGradCam(forward, module)
        combined: Tensor | None = None
        for rank, target in enumerate(likely.unbind(1), start=1):
            found = cam.attribute(images, target=target).detach()
            if found.dim() != 4:
                raise UserError(f"cam_layer={name!r}: its output is no map (N, C, h, w): name a convolutional layer")
            one = _unit(F.interpolate(_unit(found.float()), images.shape[2:], mode="bilinear", align_corners=False))
            one = one.log() / likely.shape[1] if combination == "geometric" else one * 0.5**rank
            combined = one if combined is None else combined + one
        assert combined is not None  # a model has a class
        return _unit(combined.exp() if combination == "geometric" else combined)[:, 0]


def last_map(model: nn.Module, images: Tensor) -> str:
    """Name of the module that gives the last feature map: the last output ``(N, C, h, w)`` shaped like the image.

    Args:
        model: images to logits.
        images: ``(N, C, H, W)``; one of them is passed through.

    Raises:
        UserError: where there is none, or most of the network comes after it (as after the patches of a transformer).
    """
    height, width = images.shape[2:]
    total, passed, found = 0, 0, ("", -1)

    def note(name: str, weighted: bool) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            nonlocal passed, found
            passed += weighted
            if isinstance(output, Tensor) and output.dim() == 4 and output.shape[2:].numel() > 1:
                # the sides are as those of the image, which those of (N, h, w, C) are not
                ratio = output.shape[2] * width / (output.shape[3] * height)
                if 0.5 <= ratio <= 2 and output.shape[2] <= height:
                    found = name, passed

        return hook

    handles = []
    try:
        for name, module in model.named_modules():
            weighted = next(module.parameters(recurse=False), None) is not None
            total += weighted
            handles.append(module.register_forward_hook(note(name, weighted)))
        with torch.no_grad():
            (model._call_impl if model._compiled_call_impl is not None else model)(images[:1])
    finally:
        for handle in handles:
            handle.remove()
    name, before = found
    if before < 0 or total - before > _TOO_EARLY * total:
        raise UserError(
            f"R-CAM needs a convolutional feature map near the end of the network, and this {type(model).__name__} has "
            "none: set cam=none (all pixels are deflected alike), or name the module as cam_layer"
        )
    return name


def _unit(maps: Tensor) -> Tensor:
    """Each map ``(N, 1, h, w)`` scaled to [0, 1]; a flat one to 0."""
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low), 0)

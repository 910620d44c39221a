"""Classifying the foreground: images of which a mask's pixels alone are left, and a network that finds the mask itself.

Vaishnavi et al., "Can Attention Masks Improve Adversarial Robustness?" (arXiv 1911.11946): a classifier of x ⊙ m has no
background that could be attacked. With masks that are given, composing images is something done to the data; with
masks that a network predicts it is a part of the model, and what the attacker does reaches the mask.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import wrap

from lightning_robust.attacks.randomness import uniform
from lightning_robust.errors import UserError

Fill = Literal["black", "mean", "noise"]
FILLS = ("black", "mean", "noise")

# A call of it stands in a traced graph as it is (BatchNorm folding traces): what it draws is not baked in.
wrap("compose")


def compose(images: Tensor, masks: Tensor, fill: Fill = "black", keys: Tensor | None = None) -> Tensor:
    """Keep the masked pixels, and put a background in the place of all others: x ⊙ m + b ⊙ (1 - m).

    Args:
        images: ``(N, C, H, W)`` in [0, 1].
        masks: ``(N, 1, H, W)``: 1 on the foreground, 0 elsewhere (between the two for a soft mask).
        fill: b: "black"; "mean", the mean colour of the image's own foreground (black where there is none); or
            "noise", uniform in [0, 1).
        keys: ``(N,)`` or ``(1,)`` of :mod:`lightning_robust.attacks.randomness`, for the noise.

    Returns:
        ``(N, C, H, W)`` in [0, 1]; a pixel of mask 1 has the image's value to the bit.

    Raises:
        UserError: for noise without keys.

    Example:
        >>> images = torch.full((1, 1, 1, 2), 0.5)
        >>> compose(images, torch.tensor([[[[1.0, 0.0]]]])).tolist()
        [[[[0.5, 0.0]]]]
    """
    masks = masks.to(images.dtype)
    if fill == "black":
        return images * masks
    if fill == "mean":
        weight = masks.sum((2, 3), keepdim=True)
        background = (images * masks).sum((2, 3), keepdim=True) / weight.clamp_min(1e-6)
    else:
        if keys is None:
            raise UserError("compose: noise needs a key for each image: give image_keys(images, seed)")
        background = uniform(keys, torch.Size((len(keys), *images.shape[1:])), images.dtype)
    return images * masks + background * (1 - masks)


def grow_masks(masks: Tensor, radius: int) -> Tensor:
    """Dilate masks by a number of pixels, or erode them by a negative one.

    A pixel is added where one of the mask's lies at most ``radius`` rows and columns away, and removed where one
    outside the mask does; what lies beyond the image is neither. Erosion may leave a mask empty.

    Args:
        masks: ``(N, 1, H, W)`` bool, or numbers in [0, 1].
        radius: in pixels.

    Returns:
        ``(N, 1, H, W)`` in the masks' type.

    Example:
        >>> row = torch.tensor([[[[False, True, True, True, False, False]]]])
        >>> grow_masks(row, 1).int().tolist(), grow_masks(row, -1).int().tolist()
        ([[[[1, 1, 1, 1, 1, 0]]]], [[[[0, 0, 1, 0, 0, 0]]]])
    """
    if radius == 0:
        return masks
    side = 2 * abs(radius) + 1
    values = masks if masks.is_floating_point() else masks.to(torch.float32)
    grown = values if radius > 0 else 1 - values
    grown = F.max_pool2d(grown, side, 1, abs(radius))  # pads with -∞: the outside has no say
    return (grown if radius > 0 else 1 - grown).to(masks.dtype)


def check_fill(fill: str) -> Fill:
    """One of the fills.

    Raises:
        UserError: for anything else.
    """
    if fill not in FILLS:
        raise UserError(f"fill={fill!r}: choose black, mean or noise")
    return fill  # type: ignore[return-value]


class ForegroundNetwork(nn.Module):
    """A classifier of the foreground that a segmenter finds: f(x ⊙ [g(x) > 0]), end to end from pixels to logits.

    An attack on it is white-box on mask predictor and classifier together. The threshold has no gradient: backward it
    is the sigmoid of the segmenter's logit over ``temperature`` (BPDA, arXiv 1802.00420, which for a threshold is
    called straight-through), so that any attack goes through the mask as well as through the pixels. With ``soft`` the
    sigmoid itself is the mask, forward and backward, and the gradient is exact.

    The noise of ``fill="noise"`` is one pattern for all images: were it tied to the image, as it is for masks that are
    given, every step of an attack would draw it anew, and that would hide gradients.

    Args:
        classifier: images ``(N, C, H, W)`` in [0, 1] to logits ``(N, K)``.
        segmenter: images to logits ``(N, 1, H, W)``, positive on the foreground.
        fill: of the background, see :func:`compose`.
        grow: dilate (or, below 0, erode) the predicted masks by so many pixels.
        soft: the mask is the sigmoid and not the threshold.
        temperature: of the sigmoid.
        seed: of the noise.

    Raises:
        UserError: for a fill that does not exist, and a temperature that is not positive.
    """

    noise_key: Tensor

    def __init__(
        self,
        classifier: nn.Module,
        segmenter: nn.Module,
        *,
        fill: Fill = "black",
        grow: int = 0,
        soft: bool = False,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise UserError(f"temperature={temperature} of the mask's sigmoid: give a positive number")
        self.classifier, self.segmenter = classifier, segmenter
        self.fill, self.grow, self.soft, self.temperature = check_fill(fill), int(grow), soft, float(temperature)
        self.register_buffer("noise_key", torch.tensor([seed], dtype=torch.int64), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, K)`` of images ``(N, C, H, W)`` in [0, 1]."""
        return self.classify(images, self.segmenter(images))

    def classify(self, images: Tensor, mask_logits: Tensor) -> Tensor:
        """Logits ``(N, K)`` of images behind the masks of these logits ``(N, 1, H, W)``."""
        near = torch.sigmoid(mask_logits / self.temperature)
        if not self.soft:
            # adds zero, and carries the gradient
            near = (mask_logits > 0).to(near.dtype).detach() + (near - near.detach())
        mask = grow_masks(near, self.grow)
        return self.classifier(compose(images, mask, self.fill, self.noise_key))

    def predict_masks(self, images: Tensor) -> Tensor:
        """Masks ``(N, 1, H, W)`` bool that the classifier works with, as they are thresholded and grown."""
        return grow_masks(self.segmenter(images) > 0, self.grow)

    def extra_repr(self) -> str:
        """What ``print`` says of the settings."""
        return f"fill={self.fill}, grow={self.grow}, soft={self.soft}, temperature={self.temperature}"

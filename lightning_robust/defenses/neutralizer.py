"""Blanking what is attacked and unimportant (Chattopadhyay et al., arXiv 2011.10794), and who may write there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_robust.attacks import Attack
from lightning_robust.attacks.context import attacking
from lightning_robust.defenses.base import Defense
from lightning_robust.errors import UserError
from lightning_robust.regions import Blobs, load_blobs, neutralize

Which = Literal["predicted", "pair"]
Reading = Literal["write", "held", "adaptive"]


class Neutralizer(Defense):
    """Sets the blob of a class, its attacked and unimportant pixels, to 0 or 1 in every image.

    "Spatially correlated patterns in adversarial images" (Chattopadhyay et al., arXiv 2011.10794) finds the blob of
    each class (:func:`~lightning_robust.regions.blob`, :class:`~lightning_robust.callbacks.NeutralizerStudy`) and
    blanks it. It needs the class to do so, which nobody knows at test time; so the blob is that of the class that the
    network itself predicts, or the blobs of all classes together ("pair": of two, both). With the true class known it
    is ``defense.of_class(c)``, an oracle.

    An image is blanked whenever it is classified: what an attacker writes into the blob is wiped. (The paper does not
    say whether it is; :func:`attack_neutralized` has both readings.) Nothing is drawn and nothing shattered: outside
    the blob the gradient is the network's own, so an attacker who knows of the blob writes beside it. No adaptive
    evaluation is published; expect it to break.

    Args:
        model: as of :class:`~lightning_robust.defenses.Defense`.
        blobs: the .npz of NeutralizerStudy, or :class:`~lightning_robust.regions.Blobs`.
        blob_of: "predicted": the blob of the class that the network predicts for the image as it comes; "pair": the
            blobs of all classes, one after the other (where they overlap, the last class's fill).
        seed: takes no part; nothing is drawn.

    Raises:
        UserError: for blobs that cannot be read, and when called with images of another size or a network of another
            number of classes.

    Example:
        >>> masks = torch.tensor([[[True, False]], [[False, False]]])
        >>> defense = Neutralizer(blobs=Blobs(masks, torch.tensor([0.0, 0.0])), blob_of="pair")
        >>> defense.transform(torch.ones(1, 1, 1, 2)).tolist()
        [[[[0.0, 1.0]]]]
    """

    random = False
    masks: Tensor
    fill: Tensor

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        blobs: str | Path | Blobs,
        blob_of: Which = "predicted",
        seed: int | None = 0,
    ) -> None:
        super().__init__(model, seed=seed)
        if blob_of not in ("predicted", "pair"):
            raise UserError(
                f"Neutralizer: blob_of={blob_of!r}: choose predicted or pair (the known class is defense.of_class(c))"
            )
        found = blobs if isinstance(blobs, Blobs) else load_blobs(blobs)
        self.blob_of: Which = blob_of
        self.class_names = found.class_names
        self._class: int | None = None
        # settings and no weights: in no state dict, and moved along with the model
        self.register_buffer("masks", found.masks.clone(), persistent=False)
        self.register_buffer("fill", found.fill.clone(), persistent=False)

    def of_class(self, number: int) -> Neutralizer:
        """A copy around the same model that blanks the blob of one class, whatever the image: the class is known.

        Raises:
            UserError: for a class that there is not.
        """
        if not 0 <= number < len(self.masks):
            raise UserError(f"Neutralizer: class {number}: the blobs are of the classes 0 to {len(self.masks) - 1}")
        copied = self._copied(self.model)
        copied._class = number
        return copied

    def decide(self, images: Tensor, keys: Tensor) -> Tensor:
        """The classifier's logits of the blanked images."""
        return self.single(images, keys)

    def single(self, images: Tensor, keys: Tensor) -> Tensor:
        """As :meth:`decide`: nothing is drawn."""
        logits: Tensor = self.protected()(self.transform(images))
        return logits

    def draws(self, samples: int) -> Sequence[nn.Module]:
        """The defense itself: there is nothing to average over."""
        return super().draws(min(samples, 1)) and [self]

    def transform(self, images: Tensor) -> Tensor:
        """The images ``(N, C, H, W)`` with their blobs blank."""
        self._check_size(images)
        if self._class is not None:
            return neutralize(images, self.masks[self._class], self.fill[self._class])
        if self.blob_of == "pair":
            for mask, fill in zip(self.masks, self.fill, strict=True):
                images = neutralize(images, mask, fill)
            return images
        with torch.no_grad():
            predicted = self._predict(images)
        return neutralize(images, self.masks[predicted], self.fill[predicted])

    def blank(self, images: Tensor) -> Tensor:
        """Which pixels :meth:`transform` blanks: ``(N, H, W)`` bool."""
        self._check_size(images)
        if self._class is not None:
            return self.masks[self._class].expand(len(images), -1, -1)
        if self.blob_of == "pair":
            return self.masks.any(0).expand(len(images), -1, -1)
        with torch.no_grad():
            return self.masks[self._predict(images)]

    def extra_repr(self) -> str:
        """What ``print`` says of the settings."""
        which = repr(self.blob_of) if self._class is None else f"class {self._class}"
        shares = ", ".join(f"{float(share):.3f}" for share in self.masks.double().mean((1, 2)))
        return f"blob_of={which}, blobs of ({shares}) of the image, fill={self.fill.tolist()}"

    def _predict(self, images: Tensor) -> Tensor:
        logits = self.protected()(images.detach())
        if logits.shape[1] != len(self.masks):
            raise UserError(
                f"Neutralizer: blobs of {len(self.masks)} classes and a network of {logits.shape[1]}: give the blobs "
                "that were found for this network"
            )
        return logits.argmax(1)

    def _check_size(self, images: Tensor) -> None:
        if images.shape[2:] != self.masks.shape[1:]:
            raise UserError(
                f"Neutralizer: blobs of {self.masks.shape[1]}×{self.masks.shape[2]} pixels and images of "
                f"{images.shape[2]}×{images.shape[3]}: give the blobs that were found for images of this size"
            )


def attack_neutralized(
    defense: Neutralizer, attack: Attack, images: Tensor, labels: Tensor, reading: Reading
) -> tuple[Tensor, Tensor]:
    """Attack images whose blob was blanked (S_mod), by an attacker who may or may not write into it, or knows of it.

    * "write": the images are blanked once, attacked on the bare classifier, and classified as they come. He may write
      into the blob; to know of it would gain him nothing.
    * "held": the same, and blanked again before they are classified: what he wrote into the blob is lost. He does not
      know of it.
    * "adaptive": he knows of it, and changes the image before it is blanked, by the same budget. He tries two ways: the
      attack on the bare classifier, which may change whose blob is taken, and the attack through the defense as it is.

    Args:
        defense: around a classifier; with blobs of the predicted class, S_mod is made with the clean prediction.
        attack: with the same budget as on the clean images.
        images: ``(N, C, H, W)`` clean.
        labels: ``(N,)`` true classes.
        reading: one of these.

    Returns:
        The attacked images ``(N, C, H, W)``, and whether each is classified rightly ``(N,)`` bool.

    Raises:
        UserError: for another reading.
    """
    return attack_readings(defense, attack, images, labels, (reading,))[reading]


def attack_readings(
    defense: Neutralizer,
    attack: Attack,
    images: Tensor,
    labels: Tensor,
    readings: Sequence[Reading],
    *,
    bare: Tensor | None = None,
) -> dict[Reading, tuple[Tensor, Tensor]]:
    """Several readings of :func:`attack_neutralized`; what two of them have in common is computed once.

    Args:
        defense: as there.
        attack: as there.
        images: as there.
        labels: as there.
        readings: which.
        bare: ``(N, C, H, W)`` what the attack makes of the images on the bare classifier, for "adaptive", where it is
            there already; by default it is computed.

    Returns:
        what :func:`attack_neutralized` returns, of each.

    Raises:
        UserError: for another reading.
    """
    for reading in readings:
        if reading not in ("write", "held", "adaptive"):
            raise UserError(f"reading={reading!r}: choose write, held or adaptive")
    model = defense.protected()
    found: dict[Reading, tuple[Tensor, Tensor]] = {}
    if "write" in readings or "held" in readings:
        with attacking(defense), torch.no_grad():  # lent in eval mode
            start = defense.transform(images.detach().clone())
        attacked = attack.run(model, start, labels, rounding=False)
        if "write" in readings:
            found["write"] = attacked.images, ~attacked.success
        if "held" in readings:
            found["held"] = _judged(defense, attacked.images, labels)
    if "adaptive" in readings:
        if bare is None:
            bare = attack.run(model, images, labels, rounding=False).images
        first, right = _judged(defense, bare, labels)
        through = attack.run(defense, images, labels, rounding=False)
        worst = torch.where(right[:, None, None, None], through.images, first)
        found["adaptive"] = worst, right & ~through.success
    return found


def _judged(defense: Neutralizer, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    with attacking(defense), torch.no_grad():
        return images, defense(images).argmax(1) == labels

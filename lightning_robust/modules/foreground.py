"""Training a classifier that sees the foreground alone."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.attacks.randomness import image_keys, mix_seed
from lightning_robust.batch import Batch, as_batch
from lightning_robust.errors import UserError
from lightning_robust.metrics import SizeStatistics, intersection_over_union
from lightning_robust.models import ForegroundNetwork, MaskAttack, compose, grow_masks
from lightning_robust.models.foreground import Fill, check_fill
from lightning_robust.modules.classifier import ImageClassifier
from lightning_robust.modules.foreground_settings import SegmenterSettings
from lightning_robust.objectives import ObjectiveOutput

Masks = Literal["given", "predicted", "missing"]
Pixels = Literal["foreground", "image"]
Trained = Literal["both", "classifier", "segmenter"]
_NOISE_DRAW = 0xF111  # tells the noise of the background from other draws of the same image
_MENDS = "give data with masks (GTSRBIC, COCOIC, MaskedImageFolder, MNIST with masks), or set model.masks to missing"


class ForegroundClassifier(ImageClassifier):
    """A classifier of x ⊙ m, the pixels of an object without their background (Vaishnavi et al., arXiv 1911.11946).

    Where the masks come from:

    * "given": they come with the images, as in the paper. A batch is cut out as it reaches the device, before anything
      else: training, every metric, callback and attack see x_fg in place of x, and ``forward`` takes such images. This
      is the paper's data set X_fg, and exact: what an attack does can never bring back the background, and a mask need
      not follow its image through the attack. The mask itself is not attacked.
    * "predicted": by a segmenter inside the network, trained on the masks of the data; images come whole, and what an
      attack does to them reaches the mask (:class:`~lightning_robust.models.ForegroundNetwork`). Besides what
      :class:`ImageClassifier` logs there is ``val/mask_iou`` and ``test/mask_iou``.
    * "missing": there are none, the classifier sees the whole image: the paper's X, beside which X_fg is compared.

    Attacks of the objective, and of callbacks unless they say otherwise, keep to ``attack_pixels``.

    Args:
        network: the classifier, see :class:`ImageClassifier`.
        num_classes: see there.
        image_shape: see there.
        masks: see above.
        fill: what takes the place of the background: "black"; "mean", the mean colour of the image's own foreground; or
            "noise", uniform and tied to image and seed (one pattern for all images where masks are predicted).
        grow: dilate the masks by so many pixels, or erode them by a negative number, before they are used.
        attack_pixels: where attacks may change an image: "foreground", what the masks of the batch say, or "image". By
            default what the classifier sees: the foreground of masks that are given, else the image.
        segmenter: of "predicted" masks.
        segmentation_weight: of the segmenter's cross-entropy in the loss, beside the objective's. Where the objective
            attacks, it is taken at the adversarial images, so that the masks are trained adversarially, too.
        mask_attack: of "predicted" masks: the segmenter learns from the images of this attack on the masks, in place of
            the objective's, which go for the class.
        trains: of "predicted" masks: "both"; "classifier", behind the segmenter as it is; or "segmenter", before the
            classifier as it is (``weights`` then names a classifier that was trained with masks).
        **kwargs: as :class:`ImageClassifier`.

    Attributes:
        whole_batch: the batch that came to the device last, before anything was cut out of it.

    Raises:
        UserError: for names, files and settings that do not exist or do not fit; and for batches without the masks that
            are needed.
    """

    def __init__(
        self,
        network: str | nn.Module = "vgg19",
        num_classes: int = 10,
        image_shape: tuple[int, int, int] = (3, 32, 32),
        masks: Masks = "given",
        fill: Fill = "black",
        grow: int = 0,
        attack_pixels: Pixels | None = None,
        segmenter: SegmenterSettings = SegmenterSettings(),  # noqa: B008 - frozen
        segmentation_weight: float = 1.0,
        trains: Trained = "both",
        mask_attack: MaskAttack | None = None,
        **kwargs: Any,
    ) -> None:
        settings = SegmenterSettings(**segmenter) if isinstance(segmenter, dict) else segmenter
        _check(masks, grow, attack_pixels, segmentation_weight, trains)
        if mask_attack is not None and (masks != "predicted" or trains == "classifier"):
            raise UserError(
                "mask_attack is for a segmenter that learns: set masks to predicted, trains to another part"
            )
        super().__init__(network, num_classes, image_shape, **kwargs)
        self.masks, self.fill, self.grow, self.trains = masks, check_fill(fill), int(grow), trains
        self.attack_pixels: Pixels = attack_pixels or ("foreground" if masks == "given" else "image")
        self.segmentation_weight = float(segmentation_weight)
        # a checkpoint holds it as plain numbers
        self.mask_attack = MaskAttack(**mask_attack) if isinstance(mask_attack, dict) else mask_attack
        if masks == "predicted":
            self.network = ForegroundNetwork(
                self.network,
                settings.build(self.image_shape),
                fill=self.fill,
                grow=self.grow,
                soft=settings.soft,
                temperature=settings.temperature,
                seed=self.seed,
            )
            for stage in ("val", "test"):
                self.scores[f"{stage}_mask_iou"] = SizeStatistics()
        self.save_hyperparameters(
            {
                "masks": masks,
                "fill": self.fill,
                "grow": self.grow,
                "attack_pixels": attack_pixels,
                "segmenter": settings.to_plain(),
                "segmentation_weight": self.segmentation_weight,
                "trains": trains,
                "mask_attack": None if self.mask_attack is None else dataclasses.asdict(self.mask_attack),
            }
        )
        self.whole_batch: Batch | None = None
        self._mask: Tensor | None = None  # of the training batch
        if self._frozen is not None:
            self._frozen.requires_grad_(False)
            self._frozen.eval()

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the module needs no images."""
        return {**super().__getstate__(), "whole_batch": None, "_mask": None}

    @property
    def classifier(self) -> nn.Module:
        """From images that are cut out already to logits: the network without its segmenter, where it has one."""
        return self.network.classifier if isinstance(self.network, ForegroundNetwork) else self.network

    def cut_out(self, images: Tensor, masks: Tensor, grow: int | None = None) -> tuple[Tensor, Tensor]:
        """What is left of images, and the masks by which it was.

        Args:
            images: ``(N, C, H, W)`` in [0, 1].
            masks: ``(N, 1, H, W)``.
            grow: in place of the setting.

        Returns:
            images ``(N, C, H, W)`` and masks ``(N, 1, H, W)`` bool.
        """
        masks = grow_masks(masks.bool(), self.grow if grow is None else grow)
        keys = image_keys(images, mix_seed(self.seed, _NOISE_DRAW)) if self.fill == "noise" else None
        return compose(images, masks, self.fill, keys), masks

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Cut a batch out, where masks are given.

        Raises:
            UserError: for a batch without the masks that are needed, or with masks of another size.
        """
        self.whole_batch = as_batch(batch)
        images, labels, masks = self.whole_batch
        if masks is None:
            if self.masks == "given" or self.attack_pixels == "foreground":
                raise UserError(f"ForegroundClassifier needs masks, and the batches are (images, labels): {_MENDS}")
            return batch
        masks = _checked(masks, images)
        self.whole_batch = Batch(images, labels, masks)
        if self.masks != "given":
            return self.whole_batch
        shown, masks = self.cut_out(images, masks)
        return Batch(shown, labels, masks)

    # -- training ------------------------------------------------------------------------------------------------------

    @property
    def _frozen(self) -> nn.Module | None:
        """The part that does not learn."""
        if not isinstance(self.network, ForegroundNetwork):
            return None
        return {"classifier": self.network.segmenter, "segmenter": self.network.classifier}.get(self.trains)

    def train(self, mode: bool = True) -> Self:
        """As PyTorch's; a frozen part stays in eval mode."""
        super().train(mode)
        # Lightning's constructor may call this before there are parts
        if hasattr(self, "trains") and self._frozen is not None:
            self._frozen.eval()
        return self

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """One step of the objective, its attack held to the pixels it may change.

        Raises:
            UserError: for a segmenter that is to learn from batches without masks.
        """
        self._mask = as_batch(batch).mask
        if self._mask is None and self.masks == "predicted" and self.trains != "classifier":
            raise UserError(f"the segmenter learns from masks, and the batches are (images, labels): {_MENDS}")
        return super().training_step(batch, batch_idx)

    def training_output(self, images: Tensor, labels: Tensor, batch_idx: int) -> ObjectiveOutput:
        """The objective's, with the segmenter's term in its loss where there is a segmenter that learns."""
        mask = self._mask
        output = self.objective(
            self.network,
            images,
            labels,
            seed=mix_seed(self.seed, self.current_epoch, batch_idx),
            mask=mask if self.attack_pixels == "foreground" else None,
            stand_in=self.attack_model() if self.objective.attack is not None else None,
            epoch=self.current_epoch,
        )
        if isinstance(self.network, ForegroundNetwork) and self.trains != "classifier":
            assert mask is not None
            attacked = images if output.images_adv is None else output.images_adv
            if self.mask_attack is not None:
                attacked = self.mask_attack(
                    self.network,
                    images,
                    labels,
                    mask,
                    mask=mask if self.attack_pixels == "foreground" else None,
                    seed=mix_seed(self.seed, self.current_epoch, batch_idx),
                )
            found = self.network.segmenter(attacked)
            found = found.to(torch.promote_types(found.dtype, torch.float32))
            error = F.binary_cross_entropy_with_logits(found, mask.to(found.dtype))
            output.loss = self.segmentation_weight * error + (output.loss if self.trains == "both" else 0)
        return output

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def _evaluate(self, stage: str, batch: Batch) -> None:
        super()._evaluate(stage, batch)
        images, _, masks = as_batch(batch)
        if isinstance(self.network, ForegroundNetwork) and masks is not None:
            found = self.network.segmenter(images) > 0
            self._mask_iou(stage).update(intersection_over_union(found[:, 0], masks[:, 0]))

    def _mask_iou(self, stage: str) -> SizeStatistics:
        return self.scores[f"{stage}_mask_iou"]  # type: ignore[return-value]

    def _log_score(self, stage: str) -> None:
        super()._log_score(stage)
        if stage == "train" or not isinstance(self.network, ForegroundNetwork):
            return
        found = self._mask_iou(stage).compute()  # on every rank
        self._mask_iou(stage).reset()
        if found.numbers:
            self.log(f"{stage}/mask_iou", found.mean, prog_bar=True, rank_zero_only=False)


def _checked(masks: Tensor, images: Tensor) -> Tensor:
    """Masks ``(N, 1, H, W)`` bool on the images' pixels."""
    given = tuple(masks.shape)
    masks = masks[:, None] if masks.dim() == 3 else masks
    if masks.shape != (len(images), 1, *images.shape[2:]):
        raise UserError(
            f"masks of shape {given} do not fit images of shape {tuple(images.shape)}: they are (N, H, W) or "
            "(N, 1, H, W)"
        )
    if masks.dtype != torch.bool and not bool(((masks == 0) | (masks == 1)).all()):
        raise UserError("a mask is 1 (or True) on the foreground and 0 elsewhere, nothing between")
    return masks.bool()


def _check(masks: str, grow: int, attack_pixels: str | None, weight: float, trains: str) -> None:
    if masks not in ("given", "predicted", "missing"):
        raise UserError(f"masks={masks!r}: choose given, predicted or missing")
    if isinstance(grow, bool) or int(grow) != grow:
        raise UserError(f"grow={grow!r}: masks grow by a whole number of pixels, or shrink by a negative one")
    if attack_pixels not in (None, "foreground", "image"):
        raise UserError(f"attack_pixels={attack_pixels!r}: choose foreground or image")
    if not 0 < weight < float("inf"):
        raise UserError(f"segmentation_weight={weight}: it weighs the segmenter's loss, give a positive number")
    if trains not in ("both", "classifier", "segmenter"):
        raise UserError(f"trains={trains!r}: choose both, classifier or segmenter")
    if trains != "both" and masks != "predicted":
        raise UserError(f"trains={trains!r} is a choice where masks are predicted: set masks to predicted")

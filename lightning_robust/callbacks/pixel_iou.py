"""How far the weakest pixels are the designated ones."""

from __future__ import annotations

import pytorch_lightning as pl
from torch import Tensor

from lightning_robust.batch import Batch
from lightning_robust.callbacks.input_gradient_map import InputGradientMap
from lightning_robust.callbacks.measurement import Measurement, image_size, log, publish_figure, refuse_same_name
from lightning_robust.errors import UserError
from lightning_robust.metrics import PixelIoU as PixelIoUMetric
from lightning_robust.metrics import intersection_over_union, load_mask, stride_pattern, top_pixels
from lightning_robust.report import heatmap


class PixelIoU(Measurement):
    """Intersection over union of the most vulnerable pixels with designated ones (Hwang et al. 2019).

    The most vulnerable pixels are the top ``share`` of the mean |∇x| map, which the callback
    :class:`~lightning_robust.callbacks.InputGradientMap` of the same trainer measures. Logs
    ``<stage>/<name>``, by default ``<stage>/input_gradient_iou``; in ``test`` draws the map with the designated pixels.

    A map that has nothing to do with the designated pixels gives, with a quarter of the pixels designated and a quarter
    taken, an IoU of about 1/7 by chance.

    Args:
        mask: a file (.npy, .npz, .png: 0 is not designated), or "batch" for the masks that come with the images: then
            the IoU is each image's own, averaged.
        stride: without a mask: the pixels that a convolution of this stride reads; 2 is the even grid, 25 % of pixels.
        kernel: its kernel size.
        offset: the first row and column that it reads.
        share: share of pixels that counts as most vulnerable; by default the share that is designated.
        name: logged name.
    """

    def __init__(
        self,
        mask: str | None = None,
        stride: int | tuple[int, int] = 2,
        kernel: int | tuple[int, int] = 1,
        offset: int | tuple[int, int] = 0,
        share: float | None = None,
        name: str = "input_gradient_iou",
    ) -> None:
        super().__init__()
        if share is not None and not 0 < share <= 1:
            raise UserError(f"PixelIoU: share={share} is the share of pixels that counts as most vulnerable, in (0, 1]")
        if mask == "batch" and share is None:
            raise UserError("PixelIoU: masks of the batch differ in size: give share, for example 0.25")
        self.mask, self.stride, self.kernel, self.offset = mask, stride, kernel, offset
        self.share, self.name = share, name
        self._metric: PixelIoUMetric | None = None

    @property
    def state_key(self) -> str:
        """Several of them, each with its own pixels, may live in one trainer."""
        return self._generate_state_key(mask=self.mask, stride=self.stride, offset=self.offset, name=self.name)

    def designated(self, height: int, width: int) -> Tensor:
        """The designated pixels ``(H, W)`` as bool.

        Raises:
            UserError: for a file that cannot be read or has another size.
        """
        if self.mask is not None:
            return load_mask(self.mask, (height, width))
        return stride_pattern(height, width, kernel=self.kernel, stride=self.stride, offset=self.offset)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the map's callback, and the mask, before anything runs.

        Raises:
            UserError: without an InputGradientMap, and for a mask that cannot be used.
        """
        refuse_same_name(trainer, self, self.name)
        sources = [callback for callback in trainer.callbacks if isinstance(callback, InputGradientMap)]  # type: ignore[attr-defined]
        if not sources:
            raise UserError("PixelIoU reads the map of InputGradientMap: add that callback, too")
        self._source = sources[0]
        if self.mask == "batch":
            assert self.share is not None
            self._metric = PixelIoUMetric(self.share).to(pl_module.device)
            if self._listen not in self._source.listeners:
                self._source.listeners.append(self._listen)
        else:
            self._pixels = self.designated(*image_size(pl_module))

    def _listen(self, gradients: Tensor, batch: Batch) -> None:
        if batch.mask is None:
            raise UserError("PixelIoU: mask is batch, but the data gives none: batches must be (images, labels, mask)")
        assert self._metric is not None
        masks = batch.mask[:, 0] if batch.mask.dim() == 4 else batch.mask
        self._metric.to(gradients.device).update(gradients.abs().mean(1), masks.bool())

    def active(self, trainer: pl.Trainer) -> bool:
        """Whenever there is a map."""
        return self._source.active(trainer)

    def start(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Start from nothing."""
        if self._metric is not None:
            self._metric.reset()

    def publish(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Log the IoU; draw it in ``test``."""
        if self._metric is not None:
            log(module, {f"{stage}/{self.name}": self._metric.compute()}, prog_bar=True)
            return
        mean = self._source.map(stage)
        if mean is None:
            return
        pixels = self._pixels.to(mean.device)
        share = float(pixels.double().mean()) if self.share is None else self.share
        value = intersection_over_union(top_pixels(mean, share), pixels)
        log(module, {f"{stage}/{self.name}": value}, prog_bar=True)
        if stage == "test":
            publish_figure(
                trainer,
                self.name,
                stage,
                heatmap(
                    mean.cpu(),
                    title=f"Mean input gradient ({stage})\n"
                    f"IoU of its top {share:.0%} with the designated pixels: {float(value):.3f}",
                    unit_label="mean |∂loss/∂pixel|",
                    designated=pixels.cpu(),
                ),
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publish the IoU of the map that training gave, if it did."""
        if self._source.from_training:
            self.publish(trainer, pl_module, "train")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start from nothing."""
        self.start(trainer, pl_module, "train")

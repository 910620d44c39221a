"""Where in the image the model is weak: the mean |∇x| map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from lightning_robust.batch import Batch, as_batch
from lightning_robust.callbacks.measurement import (
    Measurement,
    class_names,
    image_size,
    log,
    num_classes,
    publish_array,
    publish_figure,
    refuse_same_name,
    run_folder,
)
from lightning_robust.metrics import InputGradient, input_gradient
from lightning_robust.report import class_heatmaps, heatmap

Listener = Callable[[Tensor, Batch], None]


class InputGradientMap(Measurement):
    """Mean |∇x| of every pixel, over images and channels: large where a small change raises the loss most.

    G(i,j) = 1/(|D|·C) Σ_x Σ_c |∂L/∂x_{i,j,c}| with the cross-entropy of the true label, in eval mode (Hwang et al.
    2019, the source of the Pixel Robustness Manipulator). Logs ``<stage>/<name>_mean``, writes the array
    ``tables/<name>_<stage>.npy`` and the figure of the same name; the name is ``input_gradient`` unless given.

    In adversarial training whose attack starts at the clean image, the objective has computed this gradient already:
    the map is then taken from there (``train/…``), over all (augmented) training images, and no pass is added in
    ``fit``. A run that is resumed inside an epoch has that epoch's map of the batches since.

    Args:
        per_class: also a map of every class.
        every_n_epochs: in ``fit``, how often.
        limit_batches: in ``fit``, on the images of so many validation batches; ``None`` for all.
        name: of the logged number, the array and the figure; several in one trainer need names of their own.
    """

    def __init__(
        self,
        per_class: bool = False,
        every_n_epochs: int = 1,
        limit_batches: int | None = 1,
        name: str = "input_gradient",
    ) -> None:
        super().__init__(every_n_epochs, limit_batches)
        self.per_class, self.name = per_class, name
        self._training_epoch = False
        self.listeners: list[Listener] = []
        self._metrics: dict[str, InputGradient] = {}
        self._maps: dict[str, Tensor] = {}
        self.from_training = False

    @property
    def state_key(self) -> str:
        """Two of them may live in one trainer."""
        return self._generate_state_key(name=self.name, per_class=self.per_class)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse two that would write over each other."""
        refuse_same_name(trainer, self, self.name)

    def map(self, stage: str) -> Tensor | None:
        """The map ``(H, W)`` of the running evaluation, over all ranks' images; call it on every rank, or on none."""
        if stage not in self._maps and stage in self._metrics:
            # whatever this rank has seen: computing is collective, so every rank must come here or none
            self._maps[stage] = self._metrics[stage].compute().mean
        return self._maps.get(stage)

    def _reset(self, module: pl.LightningModule, stage: str) -> None:
        if stage not in self._metrics:
            classes = num_classes(module) if self.per_class else None
            self._metrics[stage] = InputGradient(image_size(module), classes)
        self._metrics[stage].to(module.device).reset()
        self._maps.pop(stage, None)

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def active(self, trainer: pl.Trainer) -> bool:
        """Not where training has given the map already."""
        return super().active(trainer) and not (trainer.state.fn == "fit" and self.from_training)

    def start(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Start from nothing."""
        self._reset(module, stage)

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, index: int) -> None:
        """One forward and backward pass."""
        images = batch.images.to(module.dtype)
        self._add("val" if trainer.validating or trainer.state.fn == "fit" else "test", images, batch, module)

    def _add(self, stage: str, images: Tensor, batch: Batch, module: pl.LightningModule) -> None:
        gradients = input_gradient(module, images, batch.labels)
        self._metrics[stage].update(gradients, batch.labels)
        for listener in self.listeners:
            listener(gradients, batch)

    def publish(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Log, write and draw."""
        mean = self.map(stage)
        if mean is None:
            return
        log(module, {f"{stage}/{self.name}_mean": mean.mean()})
        classes = self._metrics[stage].compute().per_class if self.per_class else None
        if run_folder(trainer) is None:  # drawing is rank zero's
            return
        publish_array(trainer, self.name, stage, mean)
        when = f", epoch {trainer.current_epoch}" if trainer.state.fn == "fit" else ""
        publish_figure(
            trainer,
            self.name,
            stage,
            heatmap(mean.cpu(), title=f"Mean input gradient ({stage}{when})", unit_label="mean |∂loss/∂pixel|"),
        )
        if classes is not None:
            publish_array(trainer, f"{self.name}_per_class", stage, classes)
            publish_figure(
                trainer,
                f"{self.name}_per_class",
                stage,
                class_heatmaps(
                    classes.cpu(),
                    class_names(trainer, module),
                    title=f"Mean input gradient per class ({stage}{when})",
                    unit_label="mean |∂loss/∂pixel|",
                ),
            )

    # -- training ------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that is resumed inside an epoch has no start of that epoch."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start from nothing."""
        self.from_training = False
        self._training_epoch = self.every_n_epochs > 0 and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        self._reset(pl_module, "train")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the gradient that the objective computed at the clean images, if it did."""
        gradient = outputs.get("clean_gradient") if isinstance(outputs, dict) else None
        if gradient is None or not self._training_epoch:
            return
        self.from_training = True
        values = as_batch(batch)
        self._metrics["train"].update(gradient, values.labels)
        for listener in self.listeners:
            listener(gradient, values)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publish the map of the training images."""
        if self.from_training:
            self.publish(trainer, pl_module, "train")

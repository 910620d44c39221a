"""The base classifier: a network, an objective that trains it, and nothing that measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Self

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from lightning_robust.attacks.acceleration import Accelerated
from lightning_robust.attacks.randomness import mix_seed
from lightning_robust.batch import Batch, as_batch
from lightning_robust.callbacks.catastrophic_overfitting import CatastrophicOverfitting
from lightning_robust.errors import UserError
from lightning_robust.metrics import ClassificationScore
from lightning_robust.models import create_network, normalization_of, require_fit
from lightning_robust.models.normalization import Normalized
from lightning_robust.modules.checkpoint import require_checkpoint
from lightning_robust.modules.optimization import OptimizerSettings, ScheduleSettings
from lightning_robust.objectives import FastFGSM, Natural, Objective, ObjectiveOutput, from_config, to_config

_CHECKPOINT_KEY = "lightning_robust"


class ImageClassifier(pl.LightningModule):
    """Trains a classifier of images in [0, 1], naturally or adversarially; the template of every other module.

    *What* is trained is this class, *how* is its objective. What is measured beyond loss and accuracy is the business
    of callbacks. Logs ``train/loss``, ``train/acc`` (on the images that the objective trains on), ``val/loss``,
    ``val/acc``, ``test/loss`` and ``test/acc``.

    Args:
        network: a name of :func:`lightning_robust.models.create_network` (``list_networks()``), or a module of your own
            from pixels in [0, 1] to logits.
        num_classes: classes; the command line takes them from the data.
        image_shape: ``(C, H, W)``; the command line takes it from the data.
        objective: how the network is trained.
        optimizer: optimizer settings.
        schedule: learning-rate schedule.
        pretrained: start from the published weights of a timm or torchvision network.
        weights: start from this file: a state dict or one of our checkpoints.
        normalization: mean and std inside the network: "imagenet", "cifar10", "cifar100", "mnist", "none", or the
            numbers themselves, ``[[mean of each channel], [std of each channel]]``; by default what the network's
            pretrained weights were made with, else none.
        network_args: further arguments of the network, for example ``{width: 2}``.
        attack_acceleration: what the objective's attack runs on. "exact": a stand-in with BatchNorm folded and channels
            last, equal to the network up to rounding; "bf16": the same in bfloat16; "none": the network itself.
        compile_network: compile the network with ``torch.compile`` (the attack then runs on it, too).
        seed: of the attacks' random starts and of dropout; with it a resumed run repeats the uninterrupted one.

    Raises:
        UserError: for names, files and settings that do not exist or do not fit.
    """

    def __init__(
        self,
        network: str | nn.Module = "resnet18",
        num_classes: int = 10,
        image_shape: tuple[int, int, int] = (3, 32, 32),
        objective: Objective = Natural(),  # noqa: B008 - objectives are frozen
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008 - frozen
        schedule: ScheduleSettings = ScheduleSettings(),  # noqa: B008 - frozen
        pretrained: bool = False,
        weights: str | None = None,
        normalization: str | list[list[float]] | None = None,
        network_args: dict[str, Any] | None = None,
        attack_acceleration: Literal["exact", "bf16", "none"] = "exact",
        compile_network: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # A checkpoint's settings are plain data, so that it loads with weights_only=True; they come back as such.
        self.objective: Objective = from_config(objective)
        self.optimizer_settings = OptimizerSettings(**optimizer) if isinstance(optimizer, dict) else optimizer
        self.schedule_settings = ScheduleSettings(**schedule) if isinstance(schedule, dict) else schedule
        if attack_acceleration not in ("exact", "bf16", "none"):
            raise UserError(f"attack_acceleration={attack_acceleration!r}: choose exact, bf16 or none")
        if isinstance(network, nn.Module):
            self.network = network
        elif network is None:
            raise UserError(
                "this checkpoint was made with a network of your own: give it again, as "
                f"{type(self).__name__}.load_from_checkpoint(path, network=...)"
            )
        else:
            mean, std = _mean_and_std(normalization)
            self.network = create_network(
                network,
                int(num_classes),
                tuple(int(size) for size in image_shape),  # type: ignore[arg-type]
                pretrained=pretrained,
                weights=None if weights is None else Path(weights),
                mean=mean,
                std=std,
                **(network_args or {}),
            )
        if normalization is None and isinstance(self.network, Normalized) and self.network.mean is not None:
            # what pretrained weights brought: without them a checkpoint's network would lack it
            normalization = [list(values) for values in self.network.normalization]
        self.save_hyperparameters(
            {
                "network": network if isinstance(network, str) else None,
                "num_classes": int(num_classes),
                "image_shape": [int(size) for size in image_shape],
                "objective": to_config(self.objective),
                "optimizer": asdict(self.optimizer_settings),
                "schedule": asdict(self.schedule_settings) | {"milestones": list(self.schedule_settings.milestones)},
                # a checkpoint holds the weights itself: it must load where neither the file nor the hub is at hand
                "pretrained": False,
                "weights": None,
                "normalization": normalization,
                "network_args": dict(network_args or {}),
                "attack_acceleration": attack_acceleration,
                "compile_network": compile_network,
                "seed": int(seed),
            }
        )
        self.num_classes = int(num_classes)
        self.image_shape: tuple[int, int, int] = tuple(int(size) for size in image_shape)  # type: ignore[assignment]
        self.attack_acceleration = attack_acceleration
        self.compile_network = compile_network
        self.seed = int(seed)
        self.scores = nn.ModuleDict({f"{stage}_score": ClassificationScore() for stage in ("train", "val", "test")})
        self._stand_in: list[Accelerated] = []  # in a list, so that its copy of the weights is not saved
        self._restore_weights: list = []
        self._counted: dict[str, Any] | None = None  # what a resumed run's train score had counted in its epoch

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the module (of an evaluation, of weight averaging) needs no copy of the attack's copy."""
        return {**super().__getstate__(), "_stand_in": []}

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, C, H, W)`` in [0, 1]."""
        return self.network(images)

    # -- training ------------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Compile in place, so that checkpoint keys stay as they are."""
        if self.compile_network and self.network._compiled_call_impl is None:
            self.network.compile()

    def configure_callbacks(self) -> list[pl.Callback]:
        """Single-step training is watched for its collapse."""
        if isinstance(self.objective, FastFGSM) and self.objective.detect_overfitting:
            return [CatastrophicOverfitting()]
        return []

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimizer and schedule, stepped once an optimizer step."""
        optimizer = self.optimizer_settings.build(self)
        steps = self.trainer.estimated_stepping_batches
        if self.trainer.ckpt_path is not None:
            # That has made the training loader. Lightning gives a resumed one its place in the epoch only as it makes
            # it, which must be after the state of the checkpoint is read: let it be made again.
            self.trainer.fit_loop._combined_loader = None
        if steps == float("inf"):
            if self.schedule_settings.name != "constant" or self.schedule_settings.warmup > 0:
                raise UserError(
                    "training without end has no schedule: set trainer.max_epochs, or schedule.name constant without "
                    "warmup"
                )
            steps = 1
        total = max(int(steps), 1)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.schedule_settings.build(optimizer, total), "interval": "step"},
        }

    def on_train_start(self) -> None:
        """Go on counting an epoch that was resumed inside."""
        score, kept = self._score("train"), self._counted
        self._counted = None
        score.reset()
        if kept is not None and kept["epoch"] == self.current_epoch:
            for name, value in kept["counts"].items():
                setattr(score, name, value.to(self.device))
            score._update_count = 1  # nothing is missing, should no batch be left

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Tie dropout and every other draw to (seed, epoch, batch, rank), so that a resumed run repeats them."""
        torch.manual_seed(mix_seed(self.seed, self.current_epoch, batch_idx, self.global_rank) % 2**63)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """One step of the objective."""
        images, labels, _ = as_batch(batch)
        output = self.training_output(images, labels, batch_idx)
        if output.restore is not None:
            self._restore_weights.append(output.restore)
        self._count("train", output.logits, labels, output.loss.detach().expand(len(labels)))
        return {"loss": output.loss, "clean_gradient": output.clean_gradient}

    def training_output(self, images: Tensor, labels: Tensor, batch_idx: int) -> ObjectiveOutput:
        """What the objective makes of a batch; a subclass adds its own terms to the loss here."""
        return self.objective(
            self.network,
            images,
            labels,
            seed=mix_seed(self.seed, self.current_epoch, batch_idx),
            stand_in=self.attack_model() if self.objective.attack is not None else None,
            epoch=self.current_epoch,
        )

    def on_after_backward(self) -> None:
        """Put weights back that adversarial weight perturbation had moved for the backward pass."""
        while self._restore_weights:
            self._restore_weights.pop()()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """The same where there is no backward pass (Lightning's StochasticWeightAveraging skips it for BatchNorm)."""
        self.on_after_backward()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, but not in the pass that StochasticWeightAveraging makes for BatchNorm's statistics after training.

        Lightning steps on that pass' last batch, with the gradients of before, and the weights are no average any more.
        """
        if self.trainer.fit_loop._skip_backward:
            optimizer_closure()
            return
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def attack_model(self) -> nn.Module:
        """What an attack may run on in place of the network while it trains (see ``attack_acceleration``)."""
        if self.attack_acceleration == "none" or self.compile_network:
            return self.network
        if not self._stand_in:
            dtype = torch.bfloat16 if self.attack_acceleration == "bf16" else None
            self._stand_in.append(Accelerated(self.network, dtype=dtype))
        else:
            self._stand_in[0].refresh()
        return self._stand_in[0]

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and accuracy on clean images."""
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and accuracy on clean images."""
        self._evaluate("test", batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Predicted class ``(N,)``, its probability ``(N,)`` and the true class of clean images."""
        images, labels, _ = as_batch(batch)
        confidence, predicted = self(images).softmax(1).max(1)
        return {"predicted": predicted, "confidence": confidence, "label": labels}

    def _evaluate(self, stage: str, batch: Batch) -> None:
        images, labels, _ = as_batch(batch)
        if int(labels.max()) >= self.num_classes or int(labels.min()) < 0:
            raise UserError(
                f"labels reach from {int(labels.min())} to {int(labels.max())} but the model has {self.num_classes} "
                f"classes (0 to {self.num_classes - 1})"
            )
        logits = self(images)
        self._count(stage, logits, labels, F.cross_entropy(logits, labels, reduction="none"))

    def _count(self, stage: str, logits: Tensor, labels: Tensor, losses: Tensor) -> None:
        self._score(stage).update(logits.detach(), labels, losses.detach())

    def _score(self, stage: str) -> Metric:
        return self.scores[f"{stage}_score"]  # type: ignore[return-value]

    def _log_score(self, stage: str) -> None:
        score = self._score(stage)
        # on every rank: computing gathers the counts of all of them
        values = score.compute()
        if stage == "train" and values["acc"].isnan():
            return  # several devices, interrupted in an epoch's validation: its batches were counted before
        self.log_dict(
            {f"{stage}/loss": values["loss"], f"{stage}/acc": values["acc"]}, prog_bar=True, rank_zero_only=False
        )
        score.reset()

    def on_train_epoch_end(self) -> None:
        """Log what the epoch's batches counted."""
        self._log_score("train")

    def on_validation_epoch_end(self) -> None:
        """Log what the epoch's batches counted."""
        self._log_score("val")

    def on_test_epoch_end(self) -> None:
        """Log what the test counted."""
        self._log_score("test")

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the class, so that a checkpoint of another one is told apart."""
        checkpoint[_CHECKPOINT_KEY] = {"class": type(self).__name__}
        score = self._score("train")
        if score.total and self.trainer.world_size == 1:  # inside an epoch: its log begins with what it counted
            counts = {name: getattr(score, name).detach().clone() for name in score._defaults}
            checkpoint[_CHECKPOINT_KEY]["train_score"] = {"epoch": self.current_epoch, "counts": counts}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another class or network with a readable difference.

        Raises:
            UserError: naming the class, or the keys and shapes that differ.
        """
        saved = checkpoint.get(_CHECKPOINT_KEY, {}).get("class")
        if saved is not None and saved != type(self).__name__:
            raise UserError(
                f"this checkpoint was made by {saved}, not by {type(self).__name__}: set model.class_path to {saved} "
                "or take its weights alone with --model.weights"
            )
        wanted = {name: value.shape for name, value in self.state_dict().items()}
        require_fit(checkpoint["state_dict"], wanted, "the checkpoint does not fit the model")
        self._counted = checkpoint.get(_CHECKPOINT_KEY, {}).get("train_score")

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Lightning's, with code in the file never run and a readable message for a file that cannot be used.

        Args:
            checkpoint_path: the file.
            *args: as Lightning's.
            **kwargs: as Lightning's; settings of the constructor take the place of the saved ones, for example
                ``network=`` for a network of your own.

        Raises:
            UserError: for a file that is missing, broken, not a checkpoint, of another class or of another network.
        """
        kwargs.setdefault("weights_only", True)
        if isinstance(checkpoint_path, str | Path) and "://" not in str(checkpoint_path):
            require_checkpoint(checkpoint_path)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)


def _mean_and_std(
    normalization: str | list[list[float]] | None,
) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """By name or as numbers; the network's factory looks at the numbers."""
    if normalization is None:
        return None, None
    if isinstance(normalization, str):
        return normalization_of(normalization)
    if len(normalization) != 2 or not all(isinstance(values, list | tuple) for values in normalization):
        raise UserError(
            f"normalization={normalization!r}: give a name such as imagenet, or [[mean of each channel], [std of each "
            "channel]]"
        )
    return normalization[0], normalization[1]

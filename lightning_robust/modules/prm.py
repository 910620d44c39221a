"""Training with a Pixel Robustness Manipulator: the autoencoder, the classifier behind it, or both."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Self

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.attacks.randomness import mix_seed
from lightning_robust.batch import Batch, as_batch
from lightning_robust.errors import UserError
from lightning_robust.models import ManipulatedNetwork, Normalized
from lightning_robust.modules.classifier import _CHECKPOINT_KEY, ImageClassifier
from lightning_robust.modules.prm_score import ReconstructionScore
from lightning_robust.modules.prm_settings import PRMSettings, agreed, check_training, load, load_prm, part
from lightning_robust.modules.prm_turns import Turns
from lightning_robust.objectives import ObjectiveOutput

Trained = Literal["prm", "classifier", "both", "in_turn"]
_LAM_DRAW = 0x9E37  # tells the draw of λ from other draws of the same batch


class PRMClassifier(ImageClassifier):
    """A classifier behind a Pixel Robustness Manipulator (Hwang et al., ICLR 2019 Debugging ML workshop).

    As a defense it is **broken**: it moves the weak pixels and makes none of them stronger, and the shift by a pixel
    that the paper adds is averaged away by who knows of it: see ``study/prm_graybox`` and ``docs/prm.md``.

    ``module.network`` is a :class:`~lightning_robust.models.ManipulatedNetwork`: logits of (1 - λ)·x + λ·A(x). The loss
    of a batch is

    ``reconstruction_weight`` · MSE(A(x), x) + ``classification_weight`` · (the objective's loss at the mixed images)

    The paper trains A to give the image back and leaves the classifier alone: that is the default. Any objective may
    be set; where it attacks, the attack goes through the manipulator. Besides what :class:`ImageClassifier` logs there
    is ``train/psnr``, ``val/psnr`` and ``test/psnr``: of A(x), in dB. Without a classification loss the classifier is
    not run in training: ``train/loss`` is then that of the reconstruction, and there is no ``train/acc``.

    To fine-tune a classifier behind a trained manipulator: ``trains="classifier"``, ``prm_weights=<checkpoint>`` and,
    as ``weights``, the base classifier's file or the same checkpoint, whose classifier is then taken.

    Args:
        network: the classifier, see :class:`ImageClassifier`.
        num_classes: see there.
        image_shape: see there.
        prm: what the autoencoder is made of; by default what ``prm_weights`` says, else the published one.
        lam: λ of evaluation, and of training unless ``train_lam`` says otherwise.
        train_lam: λ of training: a number, or a list to draw from for each batch, alike on all devices.
        trains: "prm": the autoencoder, with the classifier frozen (in eval mode, so that BatchNorm stays as it is);
            "classifier": the classifier behind the frozen autoencoder; "both": end to end; "in_turn": both, each while
            the other one rests, the autoencoder first.
        turn_epochs: with "in_turn", epochs of a turn.
        reconstruction_weight: of the mean squared error; without effect on a frozen autoencoder.
        classification_weight: of the objective's loss; by default 0 (the paper's) for "prm", else 1.
        reconstruction_space: "pixels", or "normalized" as in the paper's code: the error after the classifier's own
            normalisation.
        prm_weights: start the autoencoder from this file: a checkpoint of this class, or a state dict.
        weights: start the classifier from this file: a state dict or one of our checkpoints; of a checkpoint of this
            class, its classifier.
        **kwargs: as :class:`ImageClassifier`.

    Raises:
        UserError: for names, files and settings that do not exist or do not fit.
    """

    network: ManipulatedNetwork

    def __init__(
        self,
        network: str | nn.Module = "resnet18",
        num_classes: int = 10,
        image_shape: tuple[int, int, int] = (3, 32, 32),
        prm: PRMSettings | None = None,
        lam: float = 0.9,
        train_lam: float | list[float] | None = None,
        trains: Trained = "prm",
        turn_epochs: int = 1,
        reconstruction_weight: float = 1.0,
        classification_weight: float | None = None,
        reconstruction_space: Literal["pixels", "normalized"] = "pixels",
        prm_weights: str | None = None,
        weights: str | None = None,
        **kwargs: Any,
    ) -> None:
        if classification_weight is None:
            classification_weight = 0.0 if trains == "prm" else 1.0
        settings = PRMSettings.from_plain(prm) if isinstance(prm, dict) else prm
        if reconstruction_space not in ("pixels", "normalized"):
            raise UserError(f"reconstruction_space={reconstruction_space!r}: choose pixels or normalized")
        check_training(trains, turn_epochs, reconstruction_weight, classification_weight, settings)
        entries = part(weights, "classifier") if weights is not None and isinstance(network, str) else None
        super().__init__(network, num_classes, image_shape, weights=weights if entries is None else None, **kwargs)
        if entries is not None:
            load(self.network, entries, f"the classifier of weights {weights!r} does not fit the network")
        settings = agreed(settings, prm_weights, self.image_shape)
        manipulator = settings.build(self.image_shape, lam)
        if prm_weights is not None:
            load_prm(manipulator, prm_weights)
        drawn = [lam] if train_lam is None else [train_lam] if isinstance(train_lam, int | float) else list(train_lam)
        if not drawn:
            raise UserError("train_lam is an empty list: leave it out to train at lam")
        self.train_lams = [manipulator.check_lam(value) for value in drawn]
        self.network = ManipulatedNetwork(manipulator, self.network)
        self.trains: Trained = trains
        self.turn_epochs = int(turn_epochs)
        self.reconstruction_weight = float(reconstruction_weight)
        self.classification_weight = float(classification_weight)
        self.reconstruction_space = reconstruction_space
        self._std = self._normalization_std() if reconstruction_space == "normalized" else None
        self.save_hyperparameters(
            {
                "prm": settings.to_plain(self.image_shape),
                "lam": float(lam),
                "train_lam": list(train_lam) if isinstance(train_lam, Sequence) else train_lam,
                "trains": trains,
                "turn_epochs": self.turn_epochs,
                "reconstruction_weight": self.reconstruction_weight,
                "classification_weight": self.classification_weight,
                "reconstruction_space": reconstruction_space,
                "prm_weights": None,  # a checkpoint holds the weights itself
            }
        )
        for stage in ("train", "val", "test"):
            self.scores[f"{stage}_reconstruction"] = ReconstructionScore()
        self._counted_reconstruction: dict[str, Any] | None = None
        self._prm_untrained = prm_weights is None
        self._untrained = isinstance(network, str) and weights is None and not kwargs.get("pretrained", False)
        self._turns = Turns(("prm", "classifier"), self.turn_epochs) if trains == "in_turn" else None
        if self._frozen is not None:
            self._frozen.requires_grad_(False)
            self._frozen.eval()

    def _normalization_std(self) -> list[float]:
        classifier = self.network.classifier
        if not isinstance(classifier, Normalized) or classifier.mean is None:
            raise UserError(
                "reconstruction_space='normalized': the classifier has no normalisation; set normalization, or "
                "reconstruction_space to pixels"
            )
        return list(classifier.normalization.std)

    # -- which part learns ---------------------------------------------------------------------------------------------

    @property
    def _frozen(self) -> nn.Module | None:
        """The part that never learns."""
        return {"prm": self.network.classifier, "classifier": self.network.prm}.get(self.trains)

    def train(self, mode: bool = True) -> Self:
        """As PyTorch's; a frozen part stays in eval mode."""
        super().train(mode)
        # Lightning's constructor may call this before there are parts
        if isinstance(getattr(self, "network", None), ManipulatedNetwork) and self._frozen is not None:
            self._frozen.eval()
        return self

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Tie draws to the batch, and put the part that rests in this epoch into eval mode."""
        super().on_train_batch_start(batch, batch_idx)
        if self._turns is not None:
            self._turns.begin(self.network, self.current_epoch)

    def on_train_end(self) -> None:
        """Wake the part that rests."""
        if self._turns is not None:
            self._turns.wake()

    def on_after_backward(self) -> None:
        """Drop the gradients of the part that rests."""
        super().on_after_backward()
        if self._turns is not None:
            self._turns.drop_gradients(self.network)

    # -- training ------------------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[pl.Callback]:
        """Those of the objective, where it is used."""
        return super().configure_callbacks() if self.classification_weight > 0 else []

    def on_fit_start(self) -> None:
        """Warn where a part that knows nothing is frozen."""
        if self.trainer.ckpt_path is not None:
            return
        if self.trains == "prm" and self._untrained:
            rank_zero_warn(
                "the classifier behind the manipulator has random weights and stays so: give weights, pretrained, or "
                "trains=both"
            )
        if self.trains == "classifier" and self._prm_untrained:
            rank_zero_warn(
                "the manipulator in front of the classifier has random weights and stays so: give prm_weights, or "
                "trains=both"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """One step on both terms of the loss."""
        if self.classification_weight > 0:
            with self.network.at(self._draw_lam(batch_idx)):
                return super().training_step(batch, batch_idx)
        images = as_batch(batch).images
        reconstruction = self.network.prm.reconstruct(images)
        loss = self.reconstruction_weight * self._reconstruction_error(reconstruction, images)
        self._reconstruction("train").update(reconstruction, images, loss)
        return {"loss": loss, "clean_gradient": None}

    def training_output(self, images: Tensor, labels: Tensor, batch_idx: int) -> ObjectiveOutput:
        """The objective's, with both terms in its loss."""
        learns = self.trains != "classifier" and self.reconstruction_weight > 0
        with self._remembering(images) as found:
            output = super().training_output(images, labels, batch_idx)
        # One that an attack has left behind asks for no gradient.
        usable = found and (found[0].requires_grad or not learns)
        with torch.set_grad_enabled(learns):
            reconstruction = found[0] if usable else self.network.prm.reconstruct(images)
            error = self._reconstruction_error(reconstruction, images)
        output.loss = self.classification_weight * output.loss
        if learns:
            output.loss = output.loss + self.reconstruction_weight * error
        self._reconstruction("train").update(reconstruction, images, error)
        return output

    def _remembering(self, images: Tensor) -> AbstractContextManager[list[Tensor]]:
        """So that A(x) of the loss or the score is that of the network's own pass; a compiled one does without."""
        return nullcontext([]) if self.compile_network else self.network.prm.remembering(images)

    def _reconstruction_error(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """MSE(A(x), x) in pixels, or in the classifier's normalised units."""
        error = reconstruction.to(images.dtype) - images
        if self._std is not None:
            error = error / error.new_tensor(self._std).view(-1, 1, 1)
        return error.square().mean()

    def _draw_lam(self, batch_idx: int) -> float:
        if len(self.train_lams) == 1:
            return self.train_lams[0]
        # not from the rank: all devices together make one batch
        return self.train_lams[mix_seed(self.seed, self.current_epoch, batch_idx, _LAM_DRAW) % len(self.train_lams)]

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def _evaluate(self, stage: str, batch: Batch) -> None:
        images = as_batch(batch).images
        with self._remembering(images) as found:
            super()._evaluate(stage, batch)
        reconstruction = found[0] if found else self.network.prm.reconstruct(images)
        self._reconstruction(stage).update(reconstruction, images, F.mse_loss(reconstruction.to(images.dtype), images))

    def _reconstruction(self, stage: str) -> ReconstructionScore:
        return self.scores[f"{stage}_reconstruction"]  # type: ignore[return-value]

    def _log_score(self, stage: str) -> None:
        classified = stage != "train" or self.classification_weight > 0
        if classified:
            super()._log_score(stage)
        score = self._reconstruction(stage)
        values = score.compute()
        score.reset()
        if stage == "train" and values["psnr"].isnan():
            return  # as in the template: interrupted in an epoch's validation
        found = {f"{stage}/psnr": values["psnr"]}
        if not classified:
            found[f"{stage}/loss"] = values["loss"]
        self.log_dict(found, prog_bar=True, rank_zero_only=False)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Go on counting an epoch that was resumed inside."""
        super().on_train_start()
        score, kept = self._reconstruction("train"), self._counted_reconstruction
        self._counted_reconstruction = None
        score.reset()
        if kept is not None and kept["epoch"] == self.current_epoch:
            for name, value in kept["counts"].items():
                setattr(score, name, value.to(self.device))
            score._update_count = 1

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As the template, with what the reconstruction has counted inside an epoch."""
        super().on_save_checkpoint(checkpoint)
        score = self._reconstruction("train")
        if score.images and self.trainer.world_size == 1:
            counts = {name: getattr(score, name).detach().clone() for name in score._defaults}
            checkpoint[_CHECKPOINT_KEY]["train_reconstruction"] = {"epoch": self.current_epoch, "counts": counts}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As the template.

        Raises:
            UserError: for a checkpoint of another class or network.
        """
        super().on_load_checkpoint(checkpoint)
        self._counted_reconstruction = checkpoint.get(_CHECKPOINT_KEY, {}).get("train_reconstruction")

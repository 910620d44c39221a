"""What the Pixel Robustness Manipulator does as λ grows: accuracy, weak pixels, and what the image loses."""

from __future__ import annotations

import math
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.image import PeakSignalNoiseRatio

from lightning_robust.attacks import attacking
from lightning_robust.batch import Batch
from lightning_robust.callbacks.attack_progress import AttackProgress, end_bar
from lightning_robust.callbacks.measurement import (
    Measurement,
    image_size,
    log,
    publish_array,
    publish_figure,
    publish_table,
    refuse_same_name,
    run_folder,
)
from lightning_robust.errors import UserError
from lightning_robust.metrics import (
    ClassificationScore,
    InputGradient,
    input_gradient,
    intersection_over_union,
    top_pixels,
)
from lightning_robust.models import ManipulatedNetwork
from lightning_robust.report import lambda_curves, lambda_maps, print_table

LAMS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0)
"""The grid of the paper's code (niffler92/where-adversarial-added, ``main.py``)."""


class LambdaSweep(Measurement):
    """For a row of λ: accuracy, the weak pixels, and what the manipulated image has lost (Hwang et al. 2019).

    Needs a module whose network is a :class:`~lightning_robust.models.ManipulatedNetwork`, such as
    :class:`~lightning_robust.modules.PRMClassifier`. For each λ, as ``<stage>/<name>/<what>/lam=<λ>``:

    * ``acc``: accuracy on clean images, manipulated at this λ; ``loss``: their mean cross-entropy.
    * ``iou``: |T ∩ S| / |T ∪ S| of T, the top ``share`` of the mean |∇x| map, and S, the pixels that the manipulator
      is connected with. By chance it is 1/7 for two quarters.
    * ``psnr``: of the manipulated image against the image, in dB, from the mean squared error over all images and
      pixels: 10 log10(1 / MSE). At λ = 0 it is infinite, and then not logged. Beside it ``<name>/reconstruction_psnr``,
      that of A(x).
    * ``mean_gradient``: the mean of the map.

    Writes a table, the maps (``tables/<name>_maps_<stage>.npy``, in the order of the table) and two figures: accuracy
    and IoU against λ, and the maps side by side. Afterwards the module's λ is what it was.

    Args:
        lams: values of λ; by default those of the paper's code, :data:`LAMS`.
        share: share of the pixels that counts as weakest; by default the share that is connected.
        every_n_epochs: in ``fit``, measure after every so many epochs; 0: not in ``fit``.
        limit_batches: in ``fit``, on the images of so many validation batches; ``None`` for all.
        name: starts the logged names, and those of table and figures.

    Raises:
        UserError: for settings that make no sweep, and a network without a manipulator.
    """

    def __init__(
        self,
        lams: list[float] | None = None,
        share: float | None = None,
        every_n_epochs: int = 0,
        limit_batches: int | None = 1,
        name: str = "lambda_sweep",
    ) -> None:
        super().__init__(every_n_epochs, limit_batches)
        self.lams = sorted({float(value) for value in (LAMS if lams is None else lams)})
        if not self.lams or not all(0 <= value < math.inf for value in self.lams):
            raise UserError(f"LambdaSweep: lams={lams}: give values of λ from 0 to 1, for example [0, 0.5, 0.9, 1]")
        if share is not None and not 0 < share <= 1:
            raise UserError(f"LambdaSweep: share={share} is the share of pixels that counts as weakest, in (0, 1]")
        if not name or "/" in name:
            raise UserError(f"LambdaSweep: {name!r} cannot be a name: it becomes part of logged and file names")
        self.share, self.name = share, name
        self._rows: tuple[str, list[dict[str, Any]]] | None = None

    @property
    def state_key(self) -> str:
        """Several sweeps may live in one trainer."""
        return self._generate_state_key(name=self.name)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot be swept before anything runs.

        Raises:
            UserError: for a network without a manipulator, and a λ that it does not allow.
        """
        refuse_same_name(trainer, self, self.name)
        network = manipulated_network(pl_module, "LambdaSweep")
        self._pixels = network.prm.connected_pixels(*image_size(pl_module))
        for lam in self.lams:
            with network.at(lam):
                pass

    def start(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Fresh counts."""
        device, size = module.device, image_size(module)
        self._scores = {lam: ClassificationScore().to(device) for lam in self.lams}
        self._gradients = {lam: InputGradient(size).to(device) for lam in self.lams}
        self._psnr = {lam: _psnr(device) for lam in self.lams}
        self._reconstruction = _psnr(device)
        self._progress = AttackProgress.of(trainer)

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, index: int) -> None:
        """A forward and a backward pass at each λ."""
        network = manipulated_network(module, "LambdaSweep")
        images, labels = batch.images.to(module.dtype), batch.labels
        observed = _Observed(network)
        # hooks of callbacks run outside autocast, but a user may have entered it
        with torch.autocast(module.device.type, enabled=False):
            with attacking(network.prm), torch.no_grad():  # lent in eval mode
                reconstruction = network.prm.reconstruct(images).double()
            self._reconstruction.update(reconstruction, images.double())  # in place, so where its states were made
            for number, lam in enumerate(self.lams, 1):
                with network.at(lam):
                    self._gradients[lam].update(input_gradient(observed, images, labels))
                losses = F.cross_entropy(observed.logits, labels, reduction="none")
                self._scores[lam].update(observed.logits, labels, losses)
                self._psnr[lam].update(observed.manipulated.double(), images.double())
                if self._progress:
                    self._progress.reporter(self.name)(number, len(self.lams))
        if self._progress:
            self._progress.done()

    def publish(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Log, write and draw."""
        pixels = self._pixels.to(module.device)
        designated = float(pixels.double().mean())
        share = designated if self.share is None else self.share
        rows: list[dict[str, Any]] = []
        maps: list[Tensor] = []
        for lam in self.lams:  # on every rank: each computation gathers the counts of all of them
            scores, mean = self._scores[lam].compute(), self._gradients[lam].compute().mean
            values = {
                "acc": scores["acc"],
                "loss": scores["loss"],
                "iou": intersection_over_union(top_pixels(mean, share), pixels),
                "psnr": self._psnr[lam].compute(),
                "mean_gradient": mean.mean(),
            }
            finite = {what: value for what, value in values.items() if bool(value.isfinite())}
            log(module, {f"{stage}/{self.name}/{what}/lam={lam:g}": value for what, value in finite.items()})
            rows.append({"lam": lam, **{what: float(value) for what, value in values.items()}})
            maps.append(mean)
        log(module, {f"{stage}/{self.name}/reconstruction_psnr": self._reconstruction.compute()})
        if run_folder(trainer) is None:
            return
        publish_table(trainer, self.name, stage, rows)
        publish_array(trainer, f"{self.name}_maps", stage, torch.stack(maps))
        when = f"{stage}, epoch {trainer.current_epoch}" if trainer.state.fn == "fit" else stage
        iou = [row["iou"] for row in rows]
        figure = lambda_curves(
            self.lams,
            [row["acc"] for row in rows],
            iou,
            chance=chance_iou(share, designated),
            title=f"Accuracy, and IoU of the top {share:.0%} of mean |∇x| with the connected pixels ({when})",
        )
        publish_figure(trainer, self.name, stage, figure)
        figure = lambda_maps(
            torch.stack(maps).cpu(),
            self.lams,
            title=f"Mean input gradient as λ grows ({when})",
            unit_label="mean |∂loss/∂pixel|",
            iou=iou,
        )
        publish_figure(trainer, f"{self.name}_maps", stage, figure)
        if trainer.state.fn != "fit":
            self._rows = stage, rows

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Print the table."""
        rows, self._rows = self._rows, None
        if rows is None:
            return
        end_bar(trainer, pl_module, stage)
        shown = [
            {
                "λ": f"{row['lam']:g}",
                "clean accuracy": f"{100 * row['acc']:.2f} %",
                "IoU": f"{row['iou']:.3f}",
                "PSNR (dB)": f"{row['psnr']:.1f}" if math.isfinite(row["psnr"]) else "–",
                "mean |∇x|": f"{row['mean_gradient']:.3e}",
            }
            for row in rows[1]
        ]
        print_table(f"Sweep over λ ({rows[0]})", shown)


class _Observed(nn.Module):
    """A manipulated network that keeps what it last computed."""

    def __init__(self, network: ManipulatedNetwork) -> None:
        super().__init__()
        self.network = network
        self.manipulated = self.logits = torch.empty(0)

    def forward(self, images: Tensor) -> Tensor:
        manipulated = self.network.prm(images)
        logits = self.network.classifier(manipulated)
        self.manipulated, self.logits = manipulated.detach(), logits.detach()
        return cast(Tensor, logits)


def manipulated_network(module: pl.LightningModule, who: str) -> ManipulatedNetwork:
    """The module's network behind a manipulator.

    Raises:
        UserError: if it has none.
    """
    network = getattr(module, "network", None)
    if not isinstance(network, ManipulatedNetwork):
        raise UserError(
            f"{who}: {type(module).__name__} has no pixel robustness manipulator, which this measures: use "
            "PRMClassifier, or a module whose network is a ManipulatedNetwork"
        )
    return network


def chance_iou(share: float, designated: float) -> float:
    """About the IoU of two sets of pixels that know nothing of each other: ab / (a + b - ab) of their shares a and b.

    Example:
        >>> round(chance_iou(0.25, 0.25), 4)  # 1/7
        0.1429
    """
    both = share * designated
    return both / (share + designated - both)


def _psnr(device: torch.device) -> PeakSignalNoiseRatio:
    metric = PeakSignalNoiseRatio(data_range=1.0)
    metric.set_dtype(torch.float64)
    return metric.to(device)

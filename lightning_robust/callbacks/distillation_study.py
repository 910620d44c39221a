"""The study of defensive distillation (arXiv 1511.04508) of one model, and the published break beside it."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_robust.attacks import CW, FGSM, JSMA, PGD, Attack, accelerate
from lightning_robust.attacks.adaptive import Temperature
from lightning_robust.attacks.context import Model
from lightning_robust.batch import Batch
from lightning_robust.callbacks.attack_progress import AttackProgress, end_bar
from lightning_robust.callbacks.distillation_report import Findings, print_study, rows_of_attacks, rows_of_ranges
from lightning_robust.callbacks.distillation_runs import PairRuns, saliency_runs
from lightning_robust.callbacks.first_images import FirstImages
from lightning_robust.callbacks.measurement import (
    attack_mask,
    image_size,
    log,
    num_classes,
    publish_figure,
    publish_table,
    refuse_same_name,
)
from lightning_robust.errors import UserError
from lightning_robust.metrics import (
    AllTargetsSuccess,
    FeatureRobustness,
    GradientAmplitude,
    RobustAccuracy,
    SizeStatistics,
    softmax_jacobian_amplitude,
)
from lightning_robust.report import gradient_ranges, success_bars

_RESCALED = "_rescaled"


class DistillationStudy(FirstImages):
    """What distillation at temperature T does to a model, and what it only seems to do; in ``validate`` and ``test``.

    The columns of Papernot et al. (arXiv 1511.04508), *naive*: attacks that follow the softmax of the logits as they
    are, whose gradient training at T makes underflow. The saliency attack JSMA drives each image to every other class
    with at most ``max_features`` features, each set to white; FGSM and PGD climb the cross-entropy. And the honest
    columns beside them, the published break: the same attacks *rescaled*, on logits / T (arXiv 1607.04311), which
    changes no prediction, and CW-L2, which follows the logits (arXiv 1608.04644). Where the two differ grossly the
    verdict that is printed says gradient masking.

    As ``<stage>/<name>/…``:

    * ``success_rate/<attack>`` for ``jsma`` (of all pairs of image and target), ``fgsm``, ``pgd``, the same with
      ``_rescaled``, and ``cw``; ``success_rate/jsma_any_target`` (images driven to at least one class);
    * ``robustness`` and ``robustness_rescaled``: the paper's ρ, the mean smallest share of features that JSMA changed;
      ``features_changed``: mean share over its successes (and ``features_changed_rescaled``);
    * ``gradient_mean`` and ``gradient_log10``: mean over the images of the amplitude of the adversarial gradients, mean
      |∂F_k/∂x_i| of the probabilities in float64, and of its decimal logarithm (the order of magnitude of a typical
      image); ``gradient_range/<0 to 9>``: share of the images in the paper's ten ranges, smallest first;
    * ``logit_mean`` and ``logit_std``: mean and standard deviation of |z|; ``mean_norm/cw``; ``temperature`` and
      ``images``.

    Success rates are of the images that are classified rightly. Tables: attacks with 95 % Wilson intervals, and the ten
    ranges; figures of both. ``python -m lightning_robust.report.temperature RUN …`` draws several runs of several T.

    Args:
        temperature: T of the training, which the logits are divided by; by default the module's ``temperature``. 1 for
            a model that was not distilled: both columns are then the same.
        limit_images: measure the first so many images, 100 in the paper (900 pairs); ``None``: all.
        max_features: features (values of a channel) that JSMA may change; 112 in the paper, 14.3 % of MNIST's.
        eps: L∞ budget of FGSM and PGD in pixel units; 0.3 is usual for MNIST, 8/255 for CIFAR-10.
        pgd_steps: steps of PGD.
        cw_steps: steps of each of the five rounds of CW-L2; 0 leaves it out.
        name: starts the logged names and those of tables and figures.

    Raises:
        UserError: for settings that make no study, and a module that does not say its temperature.
    """

    def __init__(
        self,
        temperature: float | None = None,
        limit_images: int | None = 100,
        max_features: int = 112,
        eps: float | str = 0.3,
        pgd_steps: int = 40,
        cw_steps: int = 100,
        name: str = "distillation",
    ) -> None:
        super().__init__(limit_images)
        if temperature is not None and not 0 < temperature < math.inf:
            raise UserError(f"DistillationStudy: temperature={temperature:g}: it is a positive number, for example 100")
        if cw_steps < 0:
            raise UserError(f"DistillationStudy: cw_steps={cw_steps}: 0 leaves the attack out, 100 is enough for MNIST")
        if not name or "/" in name:
            raise UserError(f"DistillationStudy: {name!r} cannot be a name: it becomes part of logged and file names")
        self.temperature, self.name = temperature, name
        self.saliency = JSMA(max_features=max_features, output="softmax")
        self.attacks: dict[str, Attack] = {"fgsm": FGSM(eps=eps), "pgd": PGD(eps=eps, steps=pgd_steps)}
        # its rate is what counts here: five constants find a small norm, if not the smallest
        boundary = CW(steps=max(cw_steps, 1), binary_search_steps=5, initial_const=0.01)
        self.boundary = boundary if cw_steps > 0 else None
        self._report: Findings | None = None

    @property
    def state_key(self) -> str:
        """Several of them may live in one trainer."""
        return self._generate_state_key(name=self.name)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse two that would write over each other, and a model of an unknown temperature."""
        refuse_same_name(trainer, self, self.name)
        _ = self._temperature(pl_module)

    def _temperature(self, module: pl.LightningModule) -> float:
        found = self.temperature if self.temperature is not None else getattr(module, "temperature", None)
        if not isinstance(found, int | float):
            raise UserError(
                f"DistillationStudy: {type(module).__name__} does not say at what temperature it was trained: set the "
                "callback's temperature (1 for a model that was not distilled)"
            )
        return float(found)

    def start(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Fresh counts."""
        classes, device = num_classes(module), module.device
        kinds = [""] if self._temperature(module) == 1 else ["", _RESCALED]
        height, width = image_size(module)
        features = int(module.image_shape[0]) * height * width  # type: ignore[index]
        budget = self.saliency.budget(features) / features
        self._pairs = {f"jsma{kind}": AllTargetsSuccess(classes).to(device) for kind in kinds}
        self._features = {f"jsma{kind}": FeatureRobustness(budget).to(device) for kind in kinds}
        names = [f"{attack}{kind}" for attack in self.attacks for kind in kinds]
        names += ["cw"] if self.boundary is not None else []
        self._fooled = {name: RobustAccuracy(classes).to(device) for name in names}
        self._norm, self._logit = SizeStatistics().to(device), SizeStatistics().to(device)
        self._amplitude = GradientAmplitude().to(device)
        self._precise: Model | None = None
        self._progress = AttackProgress.of(trainer)

    # -- measuring -----------------------------------------------------------------------------------------------------

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, index: int) -> None:
        """Measure a batch."""
        # hooks of callbacks run outside autocast, but a user may have entered it
        with torch.autocast(module.device.type, enabled=False):
            self._measure(module, batch.images.to(module.dtype), batch.labels, attack_mask(module, batch))
        if self._progress:
            self._progress.done()

    def _measure(self, module: pl.LightningModule, images: Tensor, labels: Tensor, mask: Tensor | None) -> None:
        with torch.no_grad():
            logits = module(images)
        self._logit.update(logits.abs())
        if self._precise is None:  # for the first batch, when the weights are in place
            self._precise = accelerate(module, fold=False, channels_last=False, dtype=torch.float64)
        self._amplitude.update(softmax_jacobian_amplitude(self._precise, images.double()))
        clean = logits.argmax(1)
        temperature = self._temperature(module)
        rescaled = Temperature(module, temperature)
        right = (clean == labels).nonzero()[:, 0]
        for name in self._pairs:
            attack = self.saliency.replace(temperature=temperature if name.endswith(_RESCALED) else 1.0)
            runs = saliency_runs(
                attack, module, images[right], labels[right], self._told(name), None if mask is None else mask[right]
            )
            self._count_pairs(name, labels[right], runs)
        for name, metric in self._fooled.items():
            if name == "cw":
                continue
            attacked = rescaled if name.endswith(_RESCALED) else module
            result = self.attacks[name.removesuffix(_RESCALED)].run(
                attacked, images, labels, mask=mask, clean_logits=None, rounding=False, progress=self._told(name)
            )
            metric.update(labels, clean, ~result.success)
        if self.boundary is not None:
            result = self.boundary.run(
                module, images, labels, mask=mask, clean_logits=logits, rounding=False, progress=self._told("cw")
            )
            self._fooled["cw"].update(labels, clean, ~result.success)
            self._norm.update(result.norms["l2"][result.success & (clean == labels)])

    def _told(self, name: str) -> Any:
        return self._progress.reporter(name) if self._progress else None

    def _count_pairs(self, name: str, labels: Tensor, runs: PairRuns) -> None:
        self._pairs[name].update(labels, runs.image, runs.target, runs.predicted, runs.confidence)
        misled = runs.predicted != labels[runs.image]
        self._features[name].update(len(labels), runs.image, runs.share, misled)

    # -- publishing ----------------------------------------------------------------------------------------------------

    def publish(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Log numbers on every rank; write tables and figures; keep what is printed at the end."""
        found = self._findings(stage, self._temperature(module))
        values = found.numbers()
        log(module, {f"{stage}/{self.name}/{what}": value for what, value in values.items() if math.isfinite(value)})
        self._precise = None  # the copy of the weights is of no further use
        if not trainer.is_global_zero:
            return
        publish_table(trainer, self.name, stage, rows_of_attacks(found))
        publish_table(trainer, f"{self.name}_gradients", stage, rows_of_ranges(found))
        title = f"distilled at T = {found.temperature:g} ({stage})"
        figure = success_bars(found.naive, found.rescaled, title=f"Success rate, {title}")
        publish_figure(trainer, self.name, stage, figure)
        figure = gradient_ranges(
            {f"{found.temperature:g}": found.ranges}, title=f"Amplitude of adversarial gradients, {title}"
        )
        publish_figure(trainer, f"{self.name}_gradients", stage, figure)
        self._report = found

    def _findings(self, stage: str, temperature: float) -> Findings:
        amplitude = self._amplitude.compute()
        pairs = {name: metric.compute() for name, metric in self._pairs.items()}
        features = {name: metric.compute() for name, metric in self._features.items()}
        logits = self._logit.compute()
        norm = math.nan if self.boundary is None else float(self._norm.compute().mean)
        rates, tried, any_target = {}, {}, {}
        for name, scores in pairs.items():
            rates[name], tried[name] = float(scores.success_rate_targeted), int(scores.runs)
            any_target[name] = float(scores.success_rate_nontargeted)
        for name, metric in self._fooled.items():
            scored = metric.compute()
            rates[name] = float(scored["success_rate"])
            tried[name] = round(float(scored["acc"]) * int(amplitude.images))
        if temperature == 1:  # dividing by one changes nothing
            held: dict[str, Any]
            for held in (rates, tried, any_target, features):
                held |= {f"{name}{_RESCALED}": value for name, value in held.items() if name != "cw"}
        return Findings(
            stage=stage,
            temperature=temperature,
            images=int(amplitude.images),
            rates=rates,
            tried=tried,
            any_target=any_target,
            robustness={name: float(scores.robustness) for name, scores in features.items()},
            changed={name: float(scores.changed) for name, scores in features.items()},
            gradient_mean=float(amplitude.mean),
            gradient_log10=float(amplitude.log10_mean),
            ranges=amplitude.counts.tolist(),
            logit_mean=float(logits.mean),
            logit_std=float(logits.std),
            cw_norm=norm,
        )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Print the attacks and the verdict."""
        report, self._report = self._report, None
        if report is None:
            return
        end_bar(trainer, pl_module, stage)
        print_study(report)

"""The detector of nMutant and mMutant: an image whose label changes under too many mutants is adversarial."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from lightning_robust.attacks.base import check_images
from lightning_robust.attacks.context import attacking, unwrap
from lightning_robust.detectors.calibration import Calibration, calibrate, count_changes
from lightning_robust.detectors.fingerprint import SameModel, fingerprint
from lightning_robust.detectors.mutation import Bench, Mutation
from lightning_robust.detectors.sprt import SequentialTest, check_error_rates
from lightning_robust.detectors.state import from_state, read, to_state, write
from lightning_robust.detectors.threshold import Rule, threshold
from lightning_robust.errors import UserError

_CAP = {"images": 2000, "model": 500}
_CALIBRATED_WITH = 500  # mutants of each image


class Decision(NamedTuple):
    """What a detector says of a batch.

    Attributes:
        predicted: ``(N,)`` int64, the model's classes.
        adversarial: ``(N,)`` bool.
        decided: ``(N,)`` bool: False where the test came to its cap, which counts as normal.
        mutants: ``(N,)`` int64, mutants that the decision took.
        changes: ``(N,)`` int64, of these, how many changed the label.
        all_changes: ``(N,)`` int64, label changes among the first ``at_least`` mutants; ``None`` where none were asked.
    """

    predicted: Tensor
    adversarial: Tensor
    decided: Tensor
    mutants: Tensor
    changes: Tensor
    all_changes: Tensor | None = None

    @property
    def kappa(self) -> Tensor:
        """``(N,)`` float64, the share of the mutants counted that changed the label."""
        return self.changes.double() / self.mutants


class MutationTestingDetector:
    """Detects adversarial images by their sensitivity κ(x): the share of mutants that change the label.

    Adversarial images lie near a decision boundary, so that a small change of the image (arXiv 1805.05010) or of the
    model (arXiv 1812.05793) changes their label more often than it does a normal image's. How often it does that,
    κ_nor, is measured on clean images (:meth:`calibrate`); an image is then decided by Wald's test of its κ against a
    threshold t with half-width σ (:class:`~lightning_robust.detectors.sprt.SequentialTest`). One that is undecided at
    the cap is taken for normal.

    It sees images near a boundary, not adversarial ones as such: misclassified natural images raise alarms, and an
    attacker who goes far enough beyond the boundary is not seen (``docs/detection.md``). Report both.

    Args:
        mutation: the operator.
        rule: the threshold. "times": t = μ · κ_nor, "interval": t = κ_nor + half-width of its confidence interval;
            "auto": "times" for mutants of images, "interval" for mutants of the model, as in the papers.
        mu: μ, above 1.
        half_width: σ as a share of t; by default (μ - 1) / μ, which is σ = κ_nor · (μ - 1), with "times", and 0.1 with
            "interval".
        alpha: α of the test.
        beta: β of the test.
        cap: mutants at most; by default 2000 of an image, 500 of a model.
        level: of the confidence interval of κ_nor.
        mutants: mutants of each calibration image; by default the cap, 500 at most.
        chunk: points that go through the model at a time, about.

    Raises:
        UserError: for settings outside these ranges.

    Example:
        >>> from lightning_robust.detectors import ImageMutation
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> images = torch.rand(200, 1, 4, 4)
        >>> detector = MutationTestingDetector(ImageMutation(operator="noise"), cap=200)
        >>> detector.calibrate(network, images, network(images).argmax(1)).images
        200
        >>> detector.decide(network, images[:5]).adversarial.shape
        torch.Size([5])
    """

    def __init__(
        self,
        mutation: Mutation,
        rule: Rule = "auto",
        mu: float = 1.2,
        half_width: float | None = None,
        alpha: float = 0.05,
        beta: float = 0.05,
        cap: int | None = None,
        level: float = 0.99,
        mutants: int | None = None,
        chunk: int = 512,
    ) -> None:
        name = type(self).__name__
        if rule not in ("auto", "times", "interval"):
            raise UserError(f"{name}: rule={rule!r} does not exist: choose auto, times or interval")
        if not mu > 1:
            raise UserError(f"{name}: mu={mu}: the threshold is μ · κ_nor, so μ is above 1, such as 1.2")
        if half_width is not None and not 0 < half_width < 1:
            raise UserError(f"{name}: half_width={half_width} is a share of the threshold, above 0 and below 1")
        check_error_rates(alpha, beta, name)
        if not 0 < level < 1:
            raise UserError(f"{name}: level={level} lies between 0 and 1, 0.99 as a rule")
        self.cap = _CAP[mutation.of] if cap is None else cap
        self.mutants = min(self.cap, _CALIBRATED_WITH) if mutants is None else mutants
        if not 1 <= self.mutants <= self.cap or chunk < 1:
            raise UserError(
                f"{name}: cap={self.cap}, mutants={self.mutants}, chunk={chunk}: 1 ≤ mutants ≤ cap, 1 ≤ chunk"
            )
        self.mutation, self.rule, self.mu, self.half_width = mutation, rule, mu, half_width
        self.alpha, self.beta, self.level, self.chunk = alpha, beta, level, chunk
        self.calibration: Calibration | None = None
        self._model: SameModel | None = None
        self._bench: tuple[nn.Module, Bench] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no part in the model that this one has at hand."""
        return {**self.__dict__, "_bench": None}

    # -- calibration ---------------------------------------------------------------------------------------------------

    def calibrate(self, model: nn.Module, images: Tensor, labels: Tensor) -> Calibration:
        """Measure κ_nor on clean images that no test is made on, and choose the mutants that are accurate enough.

        Args:
            model: images in [0, 1] to logits.
            images: ``(N, C, H, W)`` clean images in [0, 1].
            labels: ``(N,)`` true classes.

        Raises:
            UserError: for a κ_nor of 0 or so high that no threshold is above it, and for mutants that are never
                accurate enough.
        """
        check_images(images)
        with _asking(model) as lent:
            self._bench, self._model = None, None
            settings = {"cap": self.cap, "mutants": self.mutants, "level": self.level, "chunk": self.chunk}
            found = calibrate(self.mutation, lent, images, labels, **settings)  # type: ignore[arg-type]
            self._threshold(found)
            self.calibration, self._model = found, SameModel(fingerprint(lent))
        return found

    @property
    def calibrated(self) -> Calibration:
        """What :meth:`calibrate` found.

        Raises:
            UserError: before it was called.
        """
        if self.calibration is None:
            raise UserError(
                f"{self.mutation.title}: this detector is not calibrated: call calibrate(model, images, labels) with "
                "clean validation images, or load one that was saved"
            )
        return self.calibration

    @property
    def test(self) -> SequentialTest:
        """The test that decides, with its threshold."""
        return SequentialTest(*self._threshold(self.calibrated), alpha=self.alpha, beta=self.beta)

    def _threshold(self, found: Calibration) -> tuple[float, float]:
        return threshold(found, self.mutation, self.rule, self.mu, self.half_width)

    # -- decisions -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decide(self, model: nn.Module, images: Tensor, *, at_least: int = 0) -> Decision:
        """Decide on a batch; images leave as they are decided.

        Args:
            model: that of the calibration.
            images: ``(N, C, H, W)`` in [0, 1].
            at_least: also count label changes among the first so many mutants of every image.

        Raises:
            UserError: for another model, before the calibration, and for more mutants than there are.
        """
        check_images(images)
        chosen = self.calibrated.chosen
        if at_least > len(chosen):
            raise UserError(f"at_least={at_least}: this detector has {len(chosen)} mutants: raise its cap")
        with _asking(model) as lent:
            bench = self._ready(lent)
            size = bench.most_images(images[:1])
            parts = [self._decide(bench, part, at_least) for part in images.split(size)]
        columns = zip(*parts, strict=True)
        return Decision(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]

    def _decide(self, bench: Bench, images: Tensor, at_least: int) -> Decision:
        trial, test = bench.trial(images), self.test
        state = test.begin(len(images), images.device)
        everything = torch.zeros_like(state.changes)
        rows, done, end = torch.arange(len(images), device=images.device), 0, max(self.cap, at_least)
        while len(rows) and done < end:
            count = min(trial.batch(done), end - done)
            changed = trial.changed(done, count)
            test.update(state, changed[:, : max(self.cap - done, 0)], rows)
            everything[rows] += changed[:, : max(at_least - done, 0)].sum(1)
            done += count
            if done < at_least:
                continue
            going = state.undecided[rows]
            if not bool(going.all()):
                rows = rows[going]
                trial.keep(going)
        adversarial, decided = state.verdict > 0, ~state.undecided
        given = everything if at_least else None
        return Decision(trial.predicted, adversarial, decided, state.mutants, state.changes, given)

    @torch.no_grad()
    def sensitivity(self, model: nn.Module, images: Tensor, mutants: int | None = None) -> Tensor:
        """κ(x) ``(N,)`` float64 over so many mutants of every image, by default all that there are."""
        check_images(images)
        chosen = self.calibrated.chosen
        mutants = len(chosen) if mutants is None else mutants
        if not 1 <= mutants <= len(chosen):
            raise UserError(f"mutants={mutants}: this detector has 1 to {len(chosen)}: raise its cap for more")
        with _asking(model) as lent:
            return count_changes(self._ready(lent), images, mutants).double() / mutants

    def _ready(self, model: nn.Module) -> Bench:
        """The model with its mutants, made once."""
        self.require(model)
        if self._bench is None or self._bench[0] is not model:
            self._bench = model, self.mutation.bench(model, self.calibrated.chosen, self.chunk)
        return self._bench[1]

    def require(self, model: nn.Module) -> None:
        """Refuse a model that the detector was not calibrated for.

        Raises:
            UserError: if weights or buffers differ, or before the calibration.
        """
        _ = self.calibrated
        lent = unwrap(model)
        if self._model is None or not isinstance(lent, nn.Module) or not self._model(lent):
            raise UserError(
                f"{self.mutation.title}: this detector was calibrated for another model (or its weights have changed "
                "since): κ_nor and the mutants hold for one set of weights; calibrate it again"
            )

    # -- files ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Settings, seeds, κ_nor, the mutants' numbers and the model's fingerprint, as plain values and one tensor."""
        settings = {
            name: getattr(self, name)
            for name in ("rule", "mu", "half_width", "alpha", "beta", "cap", "level", "mutants", "chunk")
        }
        assert self._model is not None or self.calibration is None
        return to_state(self.mutation, settings, self.calibrated, self._model.expected if self._model else "")

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self:
        """The detector that :meth:`state_dict` was taken of.

        Raises:
            UserError: if it is no such state.
        """
        mutation, settings, found, expected = from_state(state)
        detector = cls(mutation, **settings)
        detector._threshold(found)
        detector.calibration, detector._model = found, SameModel(expected)
        return detector

    def save(self, path: str | Path) -> Path:
        """Write the state to a file, from which no code is ever run."""
        return write(path, self.state_dict())

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> Self:
        """Read a saved detector.

        Args:
            path: the file.
            model: the model that it is to be used with; else that is looked at when it first decides.

        Raises:
            UserError: for a file that is missing, broken or no detector, and for another model.
        """
        detector = cls.from_state_dict(read(path))
        if model is not None:
            detector.require(model)
        return detector


@contextmanager
def _asking(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode, outside of inference mode, without gradients."""
    with attacking(model) as lent, torch.no_grad():
        yield lent  # type: ignore[misc]

"""How well a detector tells adversarial images from normal ones, counted exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_robust.errors import UserError

NORMAL, WRONG = "normal", "wrong"
"""The kinds of natural images: those that the model classifies rightly, and the others."""


class KindScores(NamedTuple):
    """What :class:`DetectionScores` computes of one kind of images; float64 scalars, NaN without images.

    Attributes:
        images: how many there were.
        kappa: mean κ.
        kappa_interval: half-width of its 95 % confidence interval.
        flagged: share that was called adversarial: of adversarial images the detection rate, of natural ones the rate
            of false alarms.
        undecided: share that was undecided at the cap.
        mutants: mean number of mutants that a decision took.
        auroc: area under the ROC curve of κ, against the normal images.
    """

    images: Tensor
    kappa: Tensor
    kappa_interval: Tensor
    flagged: Tensor
    undecided: Tensor
    mutants: Tensor
    auroc: Tensor


class DetectionScores(Metric):
    """κ, alarms and the area under the ROC curve for kinds of images: normal, misclassified, of each attack.

    κ is a share of a fixed number of mutants, so all images of a kind are a histogram of counts, and everything is
    exact: no thresholds are chosen, and the result is the same on any number of ranks and with any batch size.

    AUROC is the probability that an image of the kind has a higher κ than a normal image, where equal ones count half.

    Args:
        kinds: names; ``"normal"`` must be among them.
        mutants: over how many mutants κ is taken.

    Raises:
        UserError: for kinds without "normal" or twice the same, and fewer than one mutant; from ``update`` for an
            unknown kind and tensors that do not fit.

    Example:
        >>> scores = DetectionScores(["normal", "fgsm"], mutants=4)
        >>> yes, one = torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.int64)
        >>> scores.update("normal", torch.tensor([0, 1]), flagged=~yes, decided=yes, used=4 * one)
        >>> scores.update("fgsm", torch.tensor([1, 3]), flagged=yes, decided=yes, used=2 * one)
        >>> float(scores.compute()["fgsm"].auroc), float(scores.compute()["fgsm"].kappa)
        (0.875, 0.5)
    """

    full_state_update = False
    is_differentiable = False
    histogram: Tensor
    flagged: Tensor
    undecided: Tensor
    used: Tensor

    def __init__(self, kinds: Sequence[str], mutants: int) -> None:
        super().__init__()
        if NORMAL not in kinds or len(set(kinds)) < len(kinds):
            raise UserError(f"DetectionScores: kinds={list(kinds)}: each once, and {NORMAL!r} among them")
        if mutants < 1:
            raise UserError(f"DetectionScores: mutants={mutants}: κ is a share of at least one mutant")
        self.kinds, self.mutants = list(kinds), mutants
        self.add_state("histogram", torch.zeros(len(kinds), mutants + 1, dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("flagged", "undecided", "used"):
            self.add_state(name, torch.zeros(len(kinds), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, kind: str, changes: Tensor, flagged: Tensor, decided: Tensor, used: Tensor) -> None:
        """Count images of one kind.

        Args:
            kind: one of the names.
            changes: ``(N,)`` int64, how many of all mutants changed the label.
            flagged: ``(N,)`` bool, called adversarial.
            decided: ``(N,)`` bool, decided before the cap.
            used: ``(N,)`` int64, mutants that the decision took.
        """
        if kind not in self.kinds:
            raise UserError(f"DetectionScores: {kind!r} is none of {', '.join(self.kinds)}")
        shapes = {tuple(values.shape) for values in (changes, flagged, decided, used)}
        if len(shapes) != 1 or changes.dim() != 1:
            raise UserError(f"DetectionScores: tensors of shapes {sorted(shapes)}: one value an image is needed")
        if len(changes) and not 0 <= int(changes.min()) <= int(changes.max()) <= self.mutants:
            raise UserError(
                f"DetectionScores: label changes from {int(changes.min())} to {int(changes.max())} of {self.mutants}"
            )
        row = self.kinds.index(kind)
        counts = torch.bincount(changes.to(torch.int64), minlength=self.mutants + 1).to(self.histogram.device)
        place = torch.arange(len(self.kinds), device=self.histogram.device) == row
        # not in place: a state that was reset in inference mode may not be changed in place outside of it
        self.histogram = self.histogram + place[:, None] * counts
        self.flagged = self.flagged + place * int(flagged.sum())
        self.undecided = self.undecided + place * int((~decided).sum())
        self.used = self.used + place * int(used.sum())

    def compute(self) -> dict[str, KindScores]:
        """Scores of each kind, on every rank the same."""
        normal = self.histogram[self.kinds.index(NORMAL)]
        return {kind: self._scores(row, normal) for row, kind in enumerate(self.kinds)}

    def _scores(self, row: int, normal: Tensor) -> KindScores:
        counts = self.histogram[row]
        images = counts.sum()
        values = torch.arange(self.mutants + 1, device=counts.device)
        # sums of integers: exact in any order
        total, squares = (counts * values).sum().double(), (counts * values**2).sum().double()
        mean = total / images
        variance = (squares - total * mean) / (images - 1).clamp_min(1)
        interval = 1.96 * (variance.clamp_min(0) / images).sqrt() / self.mutants
        return KindScores(
            images=images,
            kappa=mean / self.mutants,
            kappa_interval=interval if int(images) > 1 else torch.full_like(mean, math.nan),
            flagged=self.flagged[row].double() / images,
            undecided=self.undecided[row].double() / images,
            mutants=self.used[row].double() / images,
            auroc=auroc(normal, counts),
        )

    def counts(self) -> dict[str, Tensor]:
        """Histograms ``(mutants + 1,)`` of label changes of each kind, over all ranks: call it on every rank."""
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        ):
            return {kind: self.histogram[row].clone() for row, kind in enumerate(self.kinds)}


def auroc(normal: Tensor, other: Tensor) -> Tensor:
    """Area under the ROC curve from two histograms over the same ordered values, a float64 scalar.

    Args:
        normal: ``(V,)`` counts of negatives.
        other: ``(V,)`` counts of positives; NaN where either is empty.
    """
    below = normal.cumsum(0) - normal
    # twice the number of pairs in the right order, equal ones counting half: integers
    pairs = (other * (2 * below + normal)).sum()
    return pairs.double() / (2 * normal.sum() * other.sum())


def roc(normal: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The ROC curve from two histograms over the same ordered values.

    Returns:
        false and true positive rates ``(V + 1,)`` float64, from (0, 0) to (1, 1), one point for each threshold.
    """

    def rates(counts: Tensor) -> Tensor:
        above = counts.flip(0).cumsum(0).double() / counts.sum()
        return torch.cat([above.new_zeros(1), above])

    return rates(normal), rates(other)


class SystemScores(NamedTuple):
    """What :class:`SystemAccuracy` computes of one set of images; float64 scalars that sum to 1, NaN without images.

    Attributes:
        right: share that is let through and classified rightly.
        rejected: share that is refused.
        fooled: share that is let through and classified wrongly.
    """

    right: Tensor
    rejected: Tensor
    fooled: Tensor


class SystemAccuracy(Metric):
    """Accuracy of a classifier that may refuse an image, on sets of images: clean ones, and those of each attack.

    States are sums: the same result on any number of ranks and with any batch size.

    Args:
        sets: names.

    Example:
        >>> system = SystemAccuracy(["clean"])
        >>> right, rejected = torch.tensor([True, True, False, False]), torch.tensor([False, True, True, False])
        >>> system.update("clean", right, rejected)
        >>> [float(share) for share in system.compute()["clean"]]
        [0.25, 0.5, 0.25]
    """

    full_state_update = False
    is_differentiable = False
    counts: Tensor

    def __init__(self, sets: Sequence[str]) -> None:
        super().__init__()
        self.sets = list(sets)
        self.add_state("counts", torch.zeros(len(sets), 3, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, name: str, right: Tensor, rejected: Tensor) -> None:
        """Count images.

        Args:
            name: of their set.
            right: ``(N,)`` bool, classified rightly.
            rejected: ``(N,)`` bool, refused.
        """
        found = torch.stack([(right & ~rejected).sum(), rejected.sum(), (~right & ~rejected).sum()])
        place = torch.arange(len(self.sets), device=self.counts.device) == self.sets.index(name)
        self.counts = self.counts + place[:, None] * found.to(self.counts.device)

    def compute(self) -> dict[str, SystemScores]:
        """Scores of each set, on every rank the same."""
        shares = self.counts.double() / self.counts.sum(1, keepdim=True)
        return {name: SystemScores(*shares[row]) for row, name in enumerate(self.sets)}

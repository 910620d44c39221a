"""The statistics of the one-pixel study (Su, Vargas, Sakurai, arXiv 1710.08864), counted exactly."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_robust.errors import UserError
from lightning_robust.metrics.checks import check_classes


class AllTargetsScores(NamedTuple):
    """What :class:`AllTargetsSuccess` computes; rates are float64 scalars in [0, 1], counts int64.

    Attributes:
        success_rate_targeted: share of the attacked pairs (image, target) whose target was reached.
        success_rate_nontargeted: share of the images of which at least one target was reached.
        success_rate_any_change: share of the images of which at least one search ended at a wrong class, be it its
            target or another one; never below ``success_rate_nontargeted``.
        confidence: mean probability of the target over the pairs whose target was reached; NaN where none was.
        mean_classes_reached: mean number of targets reached over the images.
        images: how many were attacked.
        runs: how many pairs.
        classes_reached: ``(K,)``: how many images reached 0, 1, …, K - 1 targets.
        pair_successes: ``(K, K)``: how many images of class i (row) reached class j (column).
        pair_attempts: ``(K, K)``: how many tried to.
    """

    success_rate_targeted: Tensor
    success_rate_nontargeted: Tensor
    success_rate_any_change: Tensor
    confidence: Tensor
    mean_classes_reached: Tensor
    images: Tensor
    runs: Tensor
    classes_reached: Tensor
    pair_successes: Tensor
    pair_attempts: Tensor


class NonTargetedScores(NamedTuple):
    """What :class:`NonTargetedSuccess` computes; rates are float64 scalars in [0, 1], counts int64.

    Attributes:
        success_rate_nontargeted: share of the images that the model no longer takes for their true class.
        confidence: mean probability of the class that they are taken for, over these images; NaN where there is none.
        images: how many were attacked.
        runs: the same number.
        pair_successes: ``(K, K)``: how many images of class i (row) ended as class j (column).
        attempts: ``(K,)``: how many images of each class were attacked.
    """

    success_rate_nontargeted: Tensor
    confidence: Tensor
    images: Tensor
    runs: Tensor
    pair_successes: Tensor
    attempts: Tensor


class AllTargetsSuccess(Metric):
    """Success of an attack that drives every image to every other class, one run a pair (image, target).

    Definitions, with N images of K classes and the runs that were made (N·(K - 1) of them in all):

    * targeted success: (1 / runs) Σ I(prediction = target). The paper's formula has no 1/N.
    * non-targeted success, derived as the paper does: (1/N) Σ I(at least one target was reached). The paper's formula
      names the wrong class; what it means is that the prediction is not the true class. A targeted run that misses its
      target may still end at a third class: that counts in ``success_rate_any_change`` only.
    * confidence ("adversarial probability labels"): mean target probability over the *successful* runs.
    * number of target classes: over the images, the histogram of how many classes each reached; 0 resisted everything.
    * original–target pairs: counts of successes for each ordered pair of classes, and of runs to divide them by.

    States are sums: the same result on any number of ranks and with any batch size.

    Args:
        num_classes: K, at least 2.

    Raises:
        UserError: for fewer than two classes; from ``update`` for tensors that do not fit each other, classes out of
            range, a target that is the image's own class, a pair given twice, and probabilities outside [0, 1].

    Example:
        >>> metric = AllTargetsSuccess(num_classes=3)
        >>> metric.update(  # an image of class 0 and one of class 2; only the first reaches a target, class 1
        ...     labels=torch.tensor([0, 2]),
        ...     image=torch.tensor([0, 0, 1, 1]),
        ...     target=torch.tensor([1, 2, 0, 1]),
        ...     predicted=torch.tensor([1, 0, 2, 2]),
        ...     confidence=torch.tensor([0.75, 0.1, 0.2, 0.0]),
        ... )
        >>> scores = metric.compute()
        >>> float(scores.success_rate_targeted), float(scores.success_rate_nontargeted), float(scores.confidence)
        (0.25, 0.5, 0.75)
        >>> scores.classes_reached.tolist()
        [1, 1, 0]
    """

    full_state_update = False
    is_differentiable = False
    classes_reached: Tensor
    pair_successes: Tensor
    pair_attempts: Tensor
    changed: Tensor
    confidence_sum: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = _at_least_two(num_classes, "AllTargetsSuccess")
        self.add_state("classes_reached", torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("pair_successes", "pair_attempts"):
            self.add_state(name, torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("changed", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("confidence_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, labels: Tensor, image: Tensor, target: Tensor, predicted: Tensor, confidence: Tensor) -> None:
        """Count a batch of N images and their M runs; all runs of an image belong into one update.

        Args:
            labels: ``(N,)`` true classes.
            image: ``(M,)`` which of the N images a run attacked.
            target: ``(M,)`` class that it was driven to; never the image's own.
            predicted: ``(M,)`` class that the model takes its result for: the target where it succeeded.
            confidence: ``(M,)`` probability of the target at its result, in [0, 1].
        """
        classes, count = self.num_classes, len(labels)
        labels = check_classes(labels, count, classes, "labels")
        image = check_classes(image, len(target), max(count, 1), "image").to(labels.device)
        target = check_classes(target, len(target), classes, "target").to(labels.device)
        predicted = check_classes(predicted, len(target), classes, "predicted").to(labels.device)
        confidence = _probabilities(confidence, len(target)).to(labels.device)
        original = labels[image]
        if bool((target == original).any()):
            raise UserError("AllTargetsSuccess: a target is the image's own class: a run goes to another class")
        if len((image * classes + target).unique()) < len(image):
            raise UserError("AllTargetsSuccess: a pair (image, target) is given twice in one update")
        success = predicted == target
        reached = torch.zeros(count, dtype=torch.int64, device=labels.device).index_add(0, image, success.long())
        changed = torch.zeros_like(reached).index_add(0, image, (predicted != original).long()) > 0
        # not in place: a state that was reset in inference mode may not be changed in place outside of it
        self.classes_reached = self.classes_reached + _count(reached, (classes,), self.classes_reached)
        pair = original * classes + target
        self.pair_attempts = self.pair_attempts + _count(pair, (classes, classes), self.pair_attempts)
        self.pair_successes = self.pair_successes + _count(pair[success], (classes, classes), self.pair_attempts)
        self.changed = self.changed + changed.sum().to(self.changed.device)
        self.confidence_sum = self.confidence_sum + confidence[success].sum().to(self.confidence_sum.device)

    def compute(self) -> AllTargetsScores:
        """Over all images counted, on every rank the same; rates are NaN before any image."""
        images, successes = self.classes_reached.sum(), self.pair_successes.sum()
        numbers = torch.arange(self.num_classes, device=self.classes_reached.device)
        return AllTargetsScores(
            success_rate_targeted=successes.double() / self.pair_attempts.sum(),
            success_rate_nontargeted=self.classes_reached[1:].sum().double() / images,
            success_rate_any_change=self.changed.double() / images,
            confidence=self.confidence_sum / successes,
            mean_classes_reached=(self.classes_reached * numbers).sum().double() / images,
            images=images,
            runs=self.pair_attempts.sum(),
            classes_reached=self.classes_reached,
            pair_successes=self.pair_successes,
            pair_attempts=self.pair_attempts,
        )


class NonTargetedSuccess(Metric):
    """Success of an attack that lowers the true class's probability, one run an image.

    Definitions:

    * non-targeted success: (1/N) Σ I(prediction ≠ true class). The paper's formula has no 1/N.
    * confidence: mean probability of the *predicted* class over the successes. There is no target; the paper's value
      for ImageNet is of this kind.
    * pairs: counts of successes for each ordered pair (true class, class it ended at).

    States are sums: the same result on any number of ranks and with any batch size.

    Args:
        num_classes: K, at least 2. The state takes K²·8 bytes (1000 classes: 8 MB).

    Raises:
        UserError: for fewer than two classes; from ``update`` for tensors that do not fit each other, classes out of
            range and probabilities outside [0, 1].

    Example:
        >>> metric = NonTargetedSuccess(num_classes=3)
        >>> metric.update(torch.tensor([0, 1]), predicted=torch.tensor([2, 1]), confidence=torch.tensor([0.5, 0.9]))
        >>> scores = metric.compute()
        >>> float(scores.success_rate_nontargeted), float(scores.confidence)
        (0.5, 0.5)
    """

    full_state_update = False
    is_differentiable = False
    pair_successes: Tensor
    attempts: Tensor
    confidence_sum: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = _at_least_two(num_classes, "NonTargetedSuccess")
        self.add_state("pair_successes", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("attempts", torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("confidence_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, labels: Tensor, predicted: Tensor, confidence: Tensor) -> None:
        """Count a batch.

        Args:
            labels: ``(N,)`` true classes.
            predicted: ``(N,)`` classes predicted for the adversarial images.
            confidence: ``(N,)`` probabilities of these classes, in [0, 1].
        """
        classes = self.num_classes
        labels = check_classes(labels, len(labels), classes, "labels")
        predicted = check_classes(predicted, len(labels), classes, "predicted").to(labels.device)
        confidence = _probabilities(confidence, len(labels)).to(labels.device)
        success = predicted != labels
        pair = (labels * classes + predicted)[success]
        self.attempts = self.attempts + _count(labels, (classes,), self.attempts)
        self.pair_successes = self.pair_successes + _count(pair, (classes, classes), self.pair_successes)
        self.confidence_sum = self.confidence_sum + confidence[success].sum().to(self.confidence_sum.device)

    def compute(self) -> NonTargetedScores:
        """Over all images counted, on every rank the same; rates are NaN before any image."""
        successes, images = self.pair_successes.sum(), self.attempts.sum()
        return NonTargetedScores(
            success_rate_nontargeted=successes.double() / images,
            confidence=self.confidence_sum / successes,
            images=images,
            runs=images,
            pair_successes=self.pair_successes,
            attempts=self.attempts,
        )


def _at_least_two(num_classes: int, name: str) -> int:
    if num_classes < 2:
        raise UserError(f"{name}: num_classes={num_classes}: at least two are needed, one to start from and one to end")
    return num_classes


def _probabilities(values: Tensor, count: int) -> Tensor:
    if values.shape != (count,) or not values.is_floating_point():
        raise UserError(
            f"confidence of shape {tuple(values.shape)} and type {values.dtype}: one probability a run is needed, here "
            f"({count},)"
        )
    values = values.detach().double()
    # float32's softmax may give 1 plus a rounding
    if not bool(((values >= 0) & (values <= 1 + 1e-6)).all()):
        raise UserError("confidence holds values outside [0, 1]: give probabilities, the softmax of the logits")
    return values


def _count(numbers: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
    size = 1
    for side in shape:
        size *= side
    return torch.bincount(numbers, minlength=size).view(shape).to(like.device)

"""Accuracy clean and under attack, counted exactly and class by class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_robust.errors import UserError
from lightning_robust.metrics.checks import check_classes


class RobustAccuracy(Metric):
    """Clean accuracy, robust accuracy and the attack's success rate, over all images and for each class.

    Definitions, all shares in [0, 1]:

    * ``acc``: images classified rightly before the attack, of all images.
    * ``robust_acc``: images classified rightly before *and* under attack, of all images. An image that is misclassified
      to begin with is not robust, even if the attack happens to mend it.
    * ``success_rate``: images fooled (right before, wrong under attack), of those right before the attack; 0 where none
      was right. ``robust_acc = acc · (1 - success_rate)``.
    * ``success_rate_8bit``: images that are fooled and stay so after the adversarial image is rounded to 8 bits, as a
      saved file is, of those right before the attack. Only where ``update`` was told.

    ``compute()`` gives these as a dict of float64 scalars. Accuracies are NaN before any image.

    Args:
        num_classes: number of classes.

    Raises:
        UserError: for fewer than one class; from ``update`` for tensors of another length or type and for labels out of
            range; from ``compute`` if only some updates were told of the rounding.

    Example:
        >>> metric = RobustAccuracy(num_classes=2)
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> metric.update(labels, clean_predictions=torch.tensor([0, 0, 1, 0]), adversarial_predictions=1 - labels)
        >>> {name: float(value) for name, value in metric.compute().items()}
        {'acc': 0.75, 'robust_acc': 0.0, 'success_rate': 1.0}
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    total: Tensor
    clean_correct: Tensor
    robust_correct: Tensor
    fooled: Tensor
    fooled_8bit: Tensor
    rounding_checked: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise UserError(f"RobustAccuracy: num_classes={num_classes}: at least one class is needed")
        self.num_classes = num_classes
        for name in ("total", "clean_correct", "robust_correct", "fooled", "fooled_8bit"):
            self.add_state(name, torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("rounding_checked", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        labels: Tensor,
        clean_predictions: Tensor,
        adversarial_predictions: Tensor,
        fooled_8bit: Tensor | None = None,
    ) -> None:
        """Count a batch.

        Args:
            labels: ``(N,)`` true classes.
            clean_predictions: ``(N,)`` classes predicted for the clean images; or bool: whether each is right.
            adversarial_predictions: ``(N,)`` classes predicted for the adversarial images; or bool: whether each is
                right (under several attacks: under all of them). For an untargeted attack that is ``~result.success``.
            fooled_8bit: ``(N,)`` bool, whether the model errs on the adversarial image rounded to 8 bits too
                (``result.success_8bit``). Give it with every update or with none.
        """
        labels = check_classes(labels, len(labels), self.num_classes, "labels")
        clean = self._right(clean_predictions, labels, "clean_predictions")
        robust = clean & self._right(adversarial_predictions, labels, "adversarial_predictions")
        fooled = clean & ~robust
        if fooled_8bit is not None and (fooled_8bit.dtype != torch.bool or fooled_8bit.shape != labels.shape):
            raise UserError(
                f"fooled_8bit of shape {tuple(fooled_8bit.shape)} and type {fooled_8bit.dtype}: one bool an image is "
                f"needed, here ({len(labels)},)"
            )
        # not in place: a state that was reset in inference mode may not be changed in place outside of it
        self.total = self.total + self._count(labels)
        self.clean_correct = self.clean_correct + self._count(labels[clean])
        self.robust_correct = self.robust_correct + self._count(labels[robust])
        self.fooled = self.fooled + self._count(labels[fooled])
        if fooled_8bit is not None:
            self.fooled_8bit = self.fooled_8bit + self._count(labels[fooled & fooled_8bit.to(labels.device)])
            self.rounding_checked = self.rounding_checked + len(labels)

    def compute(self) -> dict[str, Tensor]:
        """Shares over all images counted, on every rank the same."""
        total, clean = self.total.sum(), self.clean_correct.sum()
        scores = {
            "acc": clean.double() / total,
            "robust_acc": self.robust_correct.sum().double() / total,
            "success_rate": self.fooled.sum().double() / clean.clamp_min(1),
        }
        if self._knows_rounding():
            scores["success_rate_8bit"] = self.fooled_8bit.sum().double() / clean.clamp_min(1)
        return scores

    def per_class(self, class_names: Sequence[str] | None = None) -> list[dict[str, str | int | float]]:
        """A table with one row a class, summed over all ranks: call it on every rank, as ``compute``.

        Args:
            class_names: names for the column ``class``; default the class numbers.

        Returns:
            Rows of ``class``, the counts ``images``, ``clean_correct``, ``robust_correct``, ``fooled`` (and
            ``fooled_8bit``), then the shares as :meth:`compute` names them. A class without images has NaN for shares;
            one of which no image is classified rightly has a success rate of 0.

        Raises:
            UserError: unless there is one name a class.
        """
        if class_names is not None and len(class_names) != self.num_classes:
            raise UserError(f"RobustAccuracy: {len(class_names)} class names for {self.num_classes} classes")
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        ):
            rounding = self._knows_rounding()
            names = ["total", "clean_correct", "robust_correct", "fooled", "fooled_8bit"]
            counts = {name: getattr(self, name).tolist() for name in names}
        rows: list[dict[str, str | int | float]] = []
        for number in range(self.num_classes):
            images, clean, robust, fooled, fooled_8bit = (counts[name][number] for name in names)
            row: dict[str, str | int | float] = {
                "class": number if class_names is None else class_names[number],
                "images": images,
                "clean_correct": clean,
                "robust_correct": robust,
                "fooled": fooled,
            }
            if rounding:
                row["fooled_8bit"] = fooled_8bit
            row["acc"] = clean / images if images else float("nan")
            row["robust_acc"] = robust / images if images else float("nan")
            row["success_rate"] = fooled / max(clean, 1) if images else float("nan")
            if rounding:
                row["success_rate_8bit"] = fooled_8bit / max(clean, 1) if images else float("nan")
            rows.append(row)
        return rows

    def _right(self, predictions: Tensor, labels: Tensor, name: str) -> Tensor:
        if predictions.shape != labels.shape or predictions.is_floating_point():
            raise UserError(
                f"{name} of shape {tuple(predictions.shape)} and type {predictions.dtype}: one class (or one bool: is "
                f"it right?) an image is needed, here ({len(labels)},)"
            )
        predictions = predictions.to(labels.device)
        return predictions if predictions.dtype == torch.bool else predictions == labels

    def _count(self, labels: Tensor) -> Tensor:
        return torch.bincount(labels, minlength=self.num_classes).to(self.total.device)

    def _knows_rounding(self) -> bool:
        checked, total = int(self.rounding_checked), int(self.total.sum())
        if 0 < checked < total:
            raise UserError(
                f"RobustAccuracy was told of the rounding to 8 bits for {checked} of {total} images: give fooled_8bit "
                "with every update or with none"
            )
        return checked > 0

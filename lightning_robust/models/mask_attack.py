"""An attack on the masks that a network predicts, in place of the class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.attacks import PGD, ThreatModel, attacking
from lightning_robust.attacks.checks import check_finite
from lightning_robust.attacks.losses import cross_entropy
from lightning_robust.attacks.pgd import restarted
from lightning_robust.attacks.threat_model import Norm
from lightning_robust.errors import UserError
from lightning_robust.models.foreground import ForegroundNetwork


@dataclass(frozen=True, kw_only=True)
class MaskAttack:
    """PGD (arXiv 1706.06083) that makes the mask predictor of a :class:`ForegroundNetwork` err.

    Raises the mean over pixels of the cross-entropy between predicted and true mask, plus ``classification`` times the
    cross-entropy of the class. Made for training a predictor adversarially, and for asking what misled masks alone do
    to a classifier. It is no worst case of the *class*: for that, give any attack the whole network.

    Args:
        eps: budget in pixel units of [0, 1], a number or a fraction such as 8/255.
        norm: norm of the budget.
        steps: gradient steps, all of which are made.
        step_size: length of a step in pixel units; default 2.5 · eps / steps.
        random_start: start at a random point of the ball, tied to image and seed.
        classification: weight of the class's cross-entropy; 0: the masks alone.
        seed: of the random start.

    Raises:
        UserError: for settings that do not exist or do not fit.
    """

    eps: float | str = "8/255"
    norm: Norm = "linf"
    steps: int = 10
    step_size: float | str | None = None
    random_start: bool = True
    classification: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self._pgd  # refuses what PGD refuses
        if not 0 <= self.classification < float("inf"):
            raise UserError(f"MaskAttack: classification={self.classification} weighs a loss: give 0 or more")

    @property
    def _pgd(self) -> PGD:
        return PGD(
            eps=self.eps,
            norm=self.norm,
            steps=self.steps,
            step_size=self.step_size,
            random_start=self.random_start,
            stop_at_success=False,
            seed=self.seed,
        )

    @property
    def threat_model(self) -> ThreatModel:
        """Norm and budget."""
        return self._pgd.threat_model

    def __call__(
        self,
        network: ForegroundNetwork,
        images: Tensor,
        labels: Tensor,
        truth: Tensor,
        *,
        mask: Tensor | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Adversarial images ``(N, C, H, W)``, with the promise of :class:`~lightning_robust.attacks.Attack`.

        Args:
            network: classifier and mask predictor.
            images: ``(N, C, H, W)`` in [0, 1].
            labels: ``(N,)`` classes.
            truth: true masks ``(N, 1, H, W)``, bool or 0 and 1.
            mask: where pixels may change, as for any attack; ``None``: everywhere.
            seed: takes the place of the attack's own.

        Raises:
            UserError: for images outside [0, 1], and masks of another size.
        """
        if truth.shape != (len(images), 1, *images.shape[2:]):
            raise UserError(
                f"MaskAttack: true masks of shape {tuple(truth.shape)} for images of shape {tuple(images.shape)}: they "
                "are (N, 1, H, W)"
            )
        pgd, pixels = self._pgd, truth[0].numel() if len(truth) else 0
        wanted = truth.flatten(1).to(images.device)
        with attacking(network) as lent:

            def outputs(points: Tensor) -> Tensor:
                found = lent.segmenter(points)  # type: ignore[attr-defined]
                if not self.classification:
                    return found.flatten(1)
                return torch.cat((found.flatten(1), lent.classify(points, found)), 1)  # type: ignore[attr-defined]

            def loss(answers: Tensor, rows: Tensor) -> Tensor:
                of_masks = answers[:, :pixels]
                error = F.binary_cross_entropy_with_logits(of_masks, wanted[rows].to(of_masks.dtype), reduction="none")
                value = error.mean(1)
                if not self.classification:
                    return value
                return value + self.classification * cross_entropy(answers[:, pixels:], labels[rows])

            nobody = torch.zeros(len(images), dtype=torch.int64)  # there is no class to check these answers against
            problem = pgd._problem(outputs, images, nobody, None, mask, seed)
            problem.wants_logits = False
            outcome = restarted(
                problem,
                reference=torch.arange(len(images), device=images.device),
                loss=loss,
                threat_model=pgd.threat_model,
                steps=pgd.steps,
                length=pgd.length,
                random_start=pgd.random_start,
                stop_at_success=False,
            )
        return check_finite(outcome.images)

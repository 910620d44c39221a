"""Region-based classification (Cao & Gong, ACSAC 2017, arXiv 1709.05583): the neighbourhood votes."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from lightning_robust.attacks.randomness import mix_seed, uniform
from lightning_robust.attacks.threat_model import parse_number
from lightning_robust.defenses.base import Defense, asks_for_gradient, positive_integer
from lightning_robust.defenses.votes import count_votes, mean_log_probabilities, vote_logits
from lightning_robust.errors import UserError


class RegionBased(Defense):
    """The majority label of points drawn uniformly from a cube around the image.

    Region-based classification (Cao & Gong, ACSAC 2017, arXiv 1709.05583): an adversarial image that lies just past the
    decision boundary is outvoted by its neighbourhood. The points are uniform in [x - r, x + r] and clipped to [0, 1].
    The paper's radius is 0.02 on CIFAR-10 and 0.3 on MNIST; :func:`~lightning_robust.defenses.find_radius` looks for
    the one that a validation set allows. The number of votes of the paper is not known; 1000 is what the Pixel
    Robustness Manipulator's baseline took, 100 what DEEPSEC did.

    It is broken: :class:`~lightning_robust.attacks.OptMargin` (He, Li & Song, ICLR 2018) makes images whose whole
    neighbourhood fools, and so does an average over the noise (:class:`~lightning_robust.attacks.EOT`,
    arXiv 1802.00420).

    The softmax of the logits is about the share of votes, and ties go by the mean probability. A vote is flat; its
    gradient here is that of the mean probabilities of its first ``gradient_votes`` points.

    Args:
        model: as of :class:`~lightning_robust.defenses.Defense`.
        radius: half the edge of the cube, in pixel units of [0, 1], a number or a fraction.
        votes: points that vote.
        max_batch: points that go through the classifier at a time at most, which bounds the memory: lower it for
            large images.
        gradient_votes: points that the gradient is taken of, all at a time.
        seed: of the points; ``None`` for fresh ones.

    Raises:
        UserError: for settings outside these ranges.

    Example:
        >>> defense = RegionBased(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), radius="4/255", votes=20)
        >>> votes = 20.5 * defense(torch.rand(4, 3, 2, 2)).softmax(1)
        >>> votes.shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        radius: float | str = 0.02,
        votes: int = 1000,
        max_batch: int = 512,
        gradient_votes: int = 8,
        seed: int | None = 0,
    ) -> None:
        super().__init__(model, seed=seed)
        self.radius = parse_number(radius, "radius")
        if not 0 < self.radius <= 1:
            raise UserError(f"RegionBased: radius={radius}: give pixel units above 0 and up to 1, for example 0.02")
        self.votes = positive_integer(self, "votes", votes)
        self.max_batch = positive_integer(self, "max_batch", max_batch)
        self.gradient_votes = min(positive_integer(self, "gradient_votes", gradient_votes), self.votes)

    def decide(self, images: Tensor, keys: Tensor) -> Tensor:
        """The vote."""
        with torch.no_grad():
            parts = [
                self._vote(some.detach(), theirs)
                for some, theirs in zip(images.split(self.max_batch), keys.split(self.max_batch), strict=True)
            ]
            votes = torch.cat([logits for logits, _ in parts]).to(parts[0][1])
        if not asks_for_gradient(images):
            return votes
        points = self._points(images, keys, range(self.gradient_votes))
        logits = self.protected()(points.flatten(0, 1)).view(len(images), self.gradient_votes, -1)
        near = mean_log_probabilities(logits.unbind(1))
        return votes + (near - near.detach())

    def single(self, images: Tensor, keys: Tensor) -> Tensor:
        """The classifier's logits at one point of each image's cube."""
        return self.protected()(self._points(images, keys, range(1))[:, 0])

    def _vote(self, images: Tensor, keys: Tensor) -> tuple[Tensor, torch.dtype]:
        """Logits of the vote of ``max_batch`` images at most, and the type that the classifier gives its own in."""
        model, count = self.protected(), len(images)
        each = max(self.max_batch // count, 1)
        votes, probabilities = [], []
        dtype = images.dtype
        for start in range(0, self.votes, each):
            points = self._points(images, keys, range(start, min(start + each, self.votes)))
            logits = model(points.flatten(0, 1))
            dtype = logits.dtype
            some, likely = count_votes(logits.view(count, points.shape[1], -1))
            votes.append(some)
            probabilities.append(likely)
        return vote_logits(sum(votes[1:], votes[0]), sum(probabilities[1:], probabilities[0]) / self.votes), dtype

    def _points(self, images: Tensor, keys: Tensor, numbers: range) -> Tensor:
        """The points ``(N, V, C, H, W)`` with the numbers ``numbers``: the same ones however the votes are split."""
        streams = _streams(self.votes)[numbers.start : numbers.stop].to(keys.device)
        own = (keys[:, None] + streams).flatten()
        noise = uniform(own, (len(own), *images.shape[1:]), images.dtype).mul_(2 * self.radius).sub_(self.radius)
        return (images[:, None] + noise.view(len(images), -1, *images.shape[1:])).clamp(0, 1)

    def extra_repr(self) -> str:
        """What ``print`` says of the settings."""
        return f"radius={self.radius:.6g}, votes={self.votes}, max_batch={self.max_batch}, seed={self.seed}"


@lru_cache(maxsize=8)
def _streams(votes: int) -> Tensor:
    """What is added to an image's key for each vote ``(votes,)``; a key with something added is another key."""
    return torch.tensor([mix_seed(number, 0x566F7465) for number in range(votes)])

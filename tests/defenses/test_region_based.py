"""The neighbourhood's vote: against closed forms, and the search for its radius."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from defense_cases import Recorder, Trained, tiny
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust.defenses import RegionBased, find_radius
from lightning_robust.errors import UserError


class Linear(nn.Module):
    """Two classes: class 1 where the sum of the pixels is above a threshold."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, images: Tensor) -> Tensor:
        lead = images.flatten(1).sum(1) - self.threshold
        return torch.stack([-lead, lead], dim=1)


def irwin_hall(x: float, n: int) -> float:
    """P(U_1 + … + U_n ≤ x) of n uniform numbers in [0, 1]."""
    return sum((-1) ** k * math.comb(n, k) * (x - k) ** n for k in range(math.floor(x) + 1)) / math.factorial(n)


def share_of_class_1(defense: RegionBased, images: Tensor) -> Tensor:
    """Share of the votes; the logits also count half a vote, split by the mean probabilities."""
    return defense(images).double().softmax(1)[:, 1]


@pytest.mark.parametrize("pixels", [1, 2, 3, 8])
def test_many_votes_on_a_linear_model_have_the_closed_form(pixels: int) -> None:
    """The share of votes goes to P(w·(x + u) > t), the distribution of a sum of uniform numbers, as 1/√m."""
    votes, radius = 20_000, 0.1
    images = torch.linspace(0.46, 0.54, 9).view(-1, 1, 1, 1).expand(-1, 1, 1, pixels).contiguous()
    defense = RegionBased(Linear(0.5 * pixels), radius=radius, votes=votes, max_batch=4096)
    found = share_of_class_1(defense, images)
    for image, share in zip(images, found, strict=True):
        # Σ (x + r (2 U - 1)) > t  ⇔  Σ U > (t - Σ x + n r) / 2 r
        bound = (0.5 * pixels - float(image.sum()) + pixels * radius) / (2 * radius)
        expected = 1 - irwin_hall(bound, pixels)
        assert abs(float(share) - expected) < 4 * (max(expected * (1 - expected), 1e-3) / votes) ** 0.5 + 1 / votes
    # and so the verdict goes to the side of the boundary that x is on
    assert defense(images).argmax(1).tolist() == [0] * 4 + [int(found[4] > 0.5)] + [1] * 4


def test_points_are_clipped_to_the_pixel_range() -> None:
    """At a black pixel half of the cube is cut off: a sum above zero has probability 1/2, above r never."""
    images = torch.zeros(3, 1, 1, 1)
    for threshold, expected in ((1e-6, 0.5), (0.05, 0.25), (0.1, 0.0)):
        share = share_of_class_1(RegionBased(Linear(threshold), radius=0.1, votes=10_000), images[:1])
        assert float(share) == pytest.approx(expected, abs=0.02)


def test_points_are_uniform_in_the_cube() -> None:
    class Kept(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            points.append(images)
            return images.flatten(1)[:, :2]

    points: list[Tensor] = []
    images = 0.2 + 0.6 * torch.rand(2, 3, 4, 4)
    RegionBased(Kept(), radius="8/255", votes=500, max_batch=100)(images)
    moved = torch.cat([part.view(2, -1, 3, 4, 4) for part in points], dim=1) - images[:, None]
    assert moved.shape[1] == 500
    assert moved.abs().max() <= 8 / 255 + 1e-6
    scaled = (moved * 255 / 8 + 1) / 2
    for power, moment in ((1, 1 / 2), (2, 1 / 3), (4, 1 / 5)):
        assert float(scaled.pow(power).mean()) == pytest.approx(moment, abs=0.01)
    flat = scaled.flatten(2) - 0.5
    # values of one point, points of one image, and images have nothing to do with each other
    assert abs(float((flat[:, :, 0] * flat[:, :, 1]).mean())) < 0.01
    assert abs(float((flat[:, :-1] * flat[:, 1:]).mean())) < 0.003
    assert abs(float((flat[0] * flat[1]).mean())) < 0.003


@pytest.mark.parametrize(("count", "max_batch"), [(1, 7), (3, 7), (5, 64), (9, 4), (2, 1)])
def test_no_more_than_max_batch_points_at_a_time(count: int, max_batch: int) -> None:
    images = torch.rand(9, 3, 8, 8, dtype=torch.float64)[:count]
    model = Recorder(tiny().double())
    found = RegionBased(model, radius=0.2, votes=30, max_batch=max_batch)(images)
    assert max(model.sizes) <= max_batch
    assert sum(model.sizes) == 30 * count
    torch.testing.assert_close(found, RegionBased(model, radius=0.2, votes=30)(images), rtol=0, atol=1e-9)


def test_the_vote_is_the_majority_and_not_the_mean() -> None:
    class Sure(nn.Module):
        """Class 1 barely, but class 0 with certainty where the pixel is low."""

        def forward(self, images: Tensor) -> Tensor:
            low = images.flatten(1)[:, 0] < 0.48
            return torch.stack([torch.where(low, 20.0, 0.0), torch.full_like(low, 0.1, dtype=torch.float32)], dim=1)

    image = torch.full((1, 1, 1, 1), 0.5)
    logits = RegionBased(Sure(), radius=0.1, votes=1000)(image)  # 60 % of the cube lie above 0.48
    assert logits.argmax(1).tolist() == [1]
    assert logits.softmax(1)[0].tolist() == pytest.approx([0.4, 0.6], abs=0.06)


def test_logits_of_a_unanimous_vote_are_finite(digits: Trained) -> None:
    class Loud(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return 1000 * digits.model(images)

    logits = RegionBased(Loud(), radius=0.01, votes=10)(digits.images[:50])
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits.argmax(1), digits.model(digits.images[:50]).argmax(1))


def test_the_gradient_is_that_of_the_mean_probabilities_of_the_first_votes() -> None:
    images, labels = torch.rand(3, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2])
    defense = RegionBased(tiny().double(), radius=0.1, votes=50, gradient_votes=4)
    points = images.clone().requires_grad_()
    (found,) = torch.autograd.grad(defense(points).gather(1, labels[:, None]).sum(), points)
    near = defense._points(points, defense.keys(images), range(4))
    mean = defense.model(near.flatten(0, 1)).softmax(1).view(3, 4, 5).mean(1)
    (expected,) = torch.autograd.grad(mean.log().gather(1, labels[:, None]).sum(), points)
    torch.testing.assert_close(found, expected)


# -- the radius --------------------------------------------------------------------------------------------------------


def far_and_near() -> tuple[Tensor, Tensor]:
    """Ten images of one pixel and class 1: one at 0.555 and nine at 0.9."""
    images = torch.full((10, 1, 1, 1), 0.9)
    images[0] = 0.555
    return images, torch.ones(10, dtype=torch.int64)


class _Band(nn.Module):
    """Class 1 from 0.5 to 0.57 and above 0.8: the neighbourhood of 0.555 turns where its width, 2r, is twice 0.07."""

    def forward(self, images: Tensor) -> Tensor:
        value = images.flatten(1)[:, 0]
        one = ((value > 0.5) & (value < 0.57)) | (value > 0.8)
        return torch.stack([~one, one], dim=1).float()


def test_the_radius_grows_while_accuracy_stays() -> None:
    images, labels = far_and_near()
    batches = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    # 0.07 / 2r of the cube around 0.555 are of class 1: a majority up to r = 0.07
    found = find_radius(RegionBased(_Band(), votes=2001), batches, step=0.01, tolerance=0.05)
    assert found.clean == 1
    assert found.radius in (0.06, 0.07)
    assert found.defense.radius == found.radius
    assert found.defense.votes == 2001
    assert [radius for radius, _ in found.tried] == [round(0.01 * n, 2) for n in range(1, len(found.tried) + 1)]
    assert [accuracy for _, accuracy in found.tried] == [1.0] * (len(found.tried) - 1) + [0.9]
    # a tolerance of one image lets it grow until the others turn: 0.9 is outvoted by [0.57, 0.8] at no r below 0.3
    wider = find_radius(RegionBased(_Band(), votes=501), batches, step=0.05, tolerance=0.1, largest=0.15)
    assert (wider.radius, len(wider.tried)) == (0.15, 3)


def test_the_search_reads_a_data_loader_and_leaves_the_model_alone(digits: Trained) -> None:
    loader = DataLoader(TensorDataset(digits.images[:60], digits.labels[:60]), batch_size=25)
    model = tiny(10, 1).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_radius(RegionBased(model, votes=5), loader, tolerance=0.99, largest=0.02)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    found = find_radius(RegionBased(digits.model, votes=31), loader, step=0.05, tolerance=0.05, largest=1.0)
    assert 0.05 <= found.radius < 1
    assert found.clean - found.tried[-1][1] > 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step": 0}, "step=0, largest=0.3: they are radii"),
        ({"step": 0.2, "largest": 0.1}, "0 < step ≤ largest"),
        ({"largest": 2}, "largest=2"),
        ({"tolerance": 1}, "tolerance=1: give a share"),
        ({"tolerance": 0.0, "step": 0.1}, "accuracy falls from 1.0000 to 0.9000 at the first radius, 0.1: begin with"),
        ({"batches": []}, "holds no image"),
        ({"batches": iter([far_and_near()])}, "only once"),
        ({"batches": [far_and_near()[0]]}, r"must yield \(images, labels\)"),
    ],
)
def test_bad_input_of_the_search(settings: dict[str, Any], message: str) -> None:
    settings = {"batches": [far_and_near()], **settings}
    with pytest.raises(UserError, match=message):
        find_radius(RegionBased(_Band(), votes=501), settings.pop("batches"), **settings)


def test_the_search_wants_a_classifier() -> None:
    with pytest.raises(UserError, match="no classifier to protect"):
        find_radius(RegionBased(), [far_and_near()])

"""The shift by one pixel: which shifts there are, what they do, and what the vote and its gradient are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from defense_cases import Recorder, tiny
from torch import Tensor, nn

from lightning_robust.attacks.base import Problem
from lightning_robust.attacks.losses import cross_entropy
from lightning_robust.defenses import PixelShift
from lightning_robust.defenses.pixel_shift import KING, shifted


def where_the_dot_went(images: Tensor) -> list[tuple[int, int]]:
    """Rows and columns by which the one white pixel, at (3, 3) of 7 × 7, was moved."""
    places = images.flatten(1).argmax(1)
    return [(int(place) // 7 - 3, int(place) % 7 - 3) for place in places]


def dots(count: int) -> Tensor:
    """Images with one white pixel, each with another background, so that each draws for itself."""
    images = 0.5 * torch.rand(count, 1, 7, 7)
    images[:, :, 3, 3] = 1
    return images


def test_shifts_are_exactly_the_kings_moves() -> None:
    assert len(KING) == len(set(KING)) == 8
    assert all(max(abs(down), abs(right)) == 1 for down, right in KING)
    moved = PixelShift(nn.Identity()).transform(dots(2000))
    counts = {move: where_the_dot_went(moved).count(move) for move in set(where_the_dot_went(moved))}
    assert set(counts) == set(KING)
    # each with probability 1/8: within 4 standard deviations
    assert all(abs(count - 250) < 4 * (2000 * 1 / 8 * 7 / 8) ** 0.5 for count in counts.values())
    moved = PixelShift(nn.Identity(), shifts=9).transform(dots(2000))
    assert set(where_the_dot_went(moved)) == {*KING, (0, 0)}


@pytest.mark.parametrize("count", [8, 9])
def test_draws_are_all_shifts_each_once(count: int) -> None:
    class Where(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)

    images = dots(1)
    moves = [where_the_dot_went(draw(images))[0] for draw in PixelShift(Where(), shifts=count).draws(30)]
    assert len(moves) == count
    assert set(moves) == ({*KING} if count == 8 else {*KING, (0, 0)})


def test_shifted_pads_with_zeros() -> None:
    image = torch.arange(1.0, 10).view(1, 1, 3, 3)
    assert shifted(image, (0, 0)).equal(image)
    assert shifted(image, (1, -1))[0, 0].tolist() == [[0, 0, 0], [2, 3, 0], [5, 6, 0]]
    assert shifted(image, (-1, 1))[0, 0].tolist() == [[0, 4, 5], [0, 7, 8], [0, 0, 0]]
    for shift in KING:
        rolled = image.roll(shift, (2, 3)).clone()
        if shift[0]:
            rolled[:, :, 0 if shift[0] == 1 else -1] = 0
        if shift[1]:
            rolled[:, :, :, 0 if shift[1] == 1 else -1] = 0
        assert shifted(image, shift).equal(rolled)


def test_the_drawn_shift_is_one_of_the_draws() -> None:
    images = torch.rand(20, 3, 9, 6)
    moved = PixelShift(nn.Identity()).transform(images)
    for image, original in zip(moved, images, strict=True):
        assert sum(torch.equal(image, shifted(original[None], shift)[0]) for shift in KING) == 1


def test_the_average_over_the_draws_is_the_expectation() -> None:
    """EOT's gradient is that of the mean loss over all eight outcomes."""
    images, labels = torch.rand(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    defense = PixelShift(tiny().double())
    keys = torch.zeros(4, dtype=torch.int64)
    problem = Problem(defense, images, labels, None, None, keys, draws=lambda: defense.draws(30))
    value, gradient, _ = problem.loss_and_gradient(images, torch.arange(4), lambda z, r: cross_entropy(z, labels[r]))
    points = images.clone().requires_grad_()
    losses = [F.cross_entropy(defense.model(shifted(points, shift)), labels, reduction="none") for shift in KING]
    expected = torch.stack(losses).mean(0)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), points)[0])


class _Says(nn.Module):
    """Logits that are looked up by where the white pixel is."""

    def __init__(self, table: dict[tuple[int, int], list[float]]) -> None:
        super().__init__()
        self.table = table

    def forward(self, images: Tensor) -> Tensor:
        return torch.tensor([self.table[move] for move in where_the_dot_went(images)]).log()


def test_the_vote_is_the_majority_and_ties_go_by_the_mean_probability() -> None:
    image = dots(1)
    moves = [*KING, (0, 0)]
    # five for class 1, though class 0 has nearly all probability elsewhere
    majority = dict(zip(moves, [[0.4, 0.6, 0.0]] * 5 + [[1.0, 0.0, 0.0]] * 4, strict=True))
    logits = PixelShift(_Says(majority), mode="vote")(image)
    assert logits.argmax(1).tolist() == [1]
    assert logits.softmax(1)[0].tolist() == pytest.approx([(4 + 3 / 9) / 9.5, (5 + 1.5 / 9) / 9.5, 0], abs=1e-3)
    tie = dict(zip(moves[:8], [[0.4, 0.6, 0.0]] * 4 + [[0.0, 0.49, 0.51]] * 4, strict=True))
    assert PixelShift(_Says(tie), mode="vote", shifts=8)(image).argmax(1).tolist() == [1]
    tie = dict(zip(moves[:8], [[0.49, 0.51, 0.0]] * 4 + [[0.0, 0.1, 0.9]] * 4, strict=True))
    assert PixelShift(_Says(tie), mode="vote", shifts=8)(image).argmax(1).tolist() == [2]


def test_a_tie_within_the_rounding_of_float32() -> None:
    image = dots(1)
    tie = dict(zip(KING, [[0.5 + 1e-7, 0.5 - 1e-7]] * 4 + [[0.5 - 2e-7, 0.5 + 2e-7]] * 4, strict=True))
    logits = PixelShift(_Says(tie), mode="vote", shifts=8)(image)
    assert logits.dtype == torch.float32
    assert logits.argmax(1).tolist() == [1]


def test_the_votes_gradient_is_that_of_the_mean_probabilities() -> None:
    images, labels = torch.rand(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    defense = PixelShift(tiny().double(), mode="vote")
    points = images.clone().requires_grad_()
    (found,) = torch.autograd.grad(defense(points).gather(1, labels[:, None]).sum(), points)
    mean = torch.stack([defense.model(shifted(points, s)).softmax(1) for s in defense.shifts]).mean(0)
    (expected,) = torch.autograd.grad(mean.log().gather(1, labels[:, None]).sum(), points)
    torch.testing.assert_close(found, expected)


def test_one_pass_for_a_draw_and_nine_for_a_vote() -> None:
    model = Recorder(tiny())
    PixelShift(model)(torch.rand(5, 3, 8, 8))
    assert model.sizes == [5]
    PixelShift(model, mode="vote")(torch.rand(5, 3, 8, 8))
    assert model.sizes == [5] * 10

"""Image mutants: what papers and code say of the operators, and that only image, seed and number decide."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_robust.detectors import ImageMutation
from lightning_robust.errors import UserError

OPERATORS = ("mixed", "light", "occlusion", "blackout", "noise", "shift", "rotation")


def images(count: int = 3, channels: int = 3, height: int = 9, width: int = 7) -> Tensor:
    return 0.2 + 0.6 * torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("channels", [1, 3])
def test_promise(operator: str, channels: int) -> None:
    given = images(channels=channels)
    mutants = ImageMutation(operator=operator).mutants(given, range(12))
    assert mutants.shape == (3, 12, *given.shape[1:])
    assert mutants.dtype == given.dtype
    assert float(mutants.min()) >= 0
    assert float(mutants.max()) <= 1
    assert not torch.equal(mutants, given[:, None].expand_as(mutants))


@pytest.mark.parametrize("operator", OPERATORS)
def test_depends_on_image_seed_and_number_alone(operator: str) -> None:
    given, mutation = images(), ImageMutation(operator=operator, seed=3)
    torch.manual_seed(1)
    whole = mutation.mutants(given, range(10))
    state = torch.get_rng_state()
    parts = [mutation.mutants(given[[row]], [number]) for row in (2, 0, 1) for number in (9, 0, 4)]
    assert torch.equal(torch.get_rng_state(), state)
    for part, (row, number) in zip(parts, [(r, n) for r in (2, 0, 1) for n in (9, 0, 4)], strict=True):
        assert torch.allclose(part[0, 0], whole[row, number], rtol=0, atol=1e-7)
    other = ImageMutation(operator=operator, seed=4).mutants(given, range(10))
    assert not torch.equal(other, whole)
    # another image has other mutants: their changes are not one image's
    assert not torch.allclose(whole[0] - given[0], whole[1] - given[1])


def test_light_is_one_small_shift_of_all_pixels() -> None:
    given = images(count=40, height=4, width=4)
    change = ImageMutation(operator="light").mutants(given, range(50)) - given[:, None]
    shift = change.flatten(2)
    assert float((shift - shift[..., :1]).abs().max()) < 1e-6
    assert 0 < float(shift.abs().max()) <= 0.005
    # u is uniform about 0.5: as many up as down
    assert abs(float((shift[..., 0] > 0).double().mean()) - 0.5) < 0.05


def test_occlusion_stays_in_a_rectangle() -> None:
    given = images(count=30)
    change = ImageMutation(operator="occlusion").mutants(given, range(40)) - given[:, None]
    assert 0 < float(change.abs().max()) <= 0.005 + 1e-6
    sides = rectangles((change.abs() > 0).any(2).flatten(0, 1))
    assert {height for height, _ in sides} == {width for _, width in sides} == {1, 2, 3}


def rectangles(moved: Tensor) -> list[tuple[int, int]]:
    found = []
    for of in moved:
        if of.any():
            rows, columns = of.any(1).nonzero()[:, 0], of.any(0).nonzero()[:, 0]
            found.append((int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1))
    return found


def test_rectangles_reach_every_corner() -> None:
    given = images(count=30, height=5, width=6)
    mutants = ImageMutation(operator="blackout").mutants(given, range(60))
    black = (mutants == 0).any(2).flatten(0, 1)
    seen = black.any(0)
    assert bool(seen.all())


def test_blackout_blackens_half_of_the_time() -> None:
    given = images(count=40)
    mutants = ImageMutation(operator="blackout").mutants(given, range(60))
    changed = (mutants != given[:, None]).any(2)
    assert bool((mutants[(mutants != given[:, None])] == 0).all())
    # all channels of a pixel at once
    assert torch.equal(changed, (mutants == 0).all(2))
    share = float(changed.flatten(2).any(2).double().mean())
    assert 0.46 < share < 0.54
    sides = rectangles(changed.flatten(0, 1))
    assert {height for height, _ in sides} == {width for _, width in sides} == {1, 2, 3}


def test_mixed_is_each_of_the_three_a_third_of_the_time() -> None:
    given = images(count=60, height=8, width=8)
    change = ImageMutation(operator="mixed").mutants(given, range(100)) - given[:, None]
    moved = (change.abs() > 1e-9).any(2).flatten(2).sum(2)
    light = (moved == 64).double().mean()
    black = (change.abs().flatten(2).amax(2) > 0.1).double().mean()
    still = (moved == 0).double().mean()
    assert float(light) == pytest.approx(1 / 3, abs=0.03)
    assert float(black) == pytest.approx(1 / 6, abs=0.03)
    assert float(still) == pytest.approx(1 / 6, abs=0.03)


def test_strength_is_a_factor() -> None:
    given = images(count=20)
    for operator in ("light", "occlusion", "noise"):
        small = ImageMutation(operator=operator, strength=0.01).mutants(given, range(5)).double() - given[:, None]
        large = ImageMutation(operator=operator, strength=0.02).mutants(given, range(5)).double() - given[:, None]
        assert torch.allclose(2 * small, large, atol=1e-6)


def test_noise_is_normal() -> None:
    given = 0.45 + 0.1 * torch.rand(8, 1, 20, 20)
    change = ImageMutation(operator="noise", strength=0.05).mutants(given, range(10)) - given[:, None]
    assert float(change.mean()) == pytest.approx(0, abs=1e-3)
    assert float(change.std()) == pytest.approx(0.05, rel=0.02)


def test_shift_moves_whole_pixels_and_repeats_the_edge() -> None:
    given = images(count=1, channels=1, height=6, width=5)
    mutants = ImageMutation(operator="shift", strength=1).mutants(given, range(80))[0]
    padded = torch.nn.functional.pad(given, (1, 1, 1, 1), mode="replicate")[0]
    wanted = [padded[:, row : row + 6, column : column + 5] for row in range(3) for column in range(3)]
    found = [next(place for place, one in enumerate(wanted) if torch.equal(one, mutant)) for mutant in mutants]
    assert set(found) == set(range(9))


def test_rotation_by_90_degrees() -> None:
    """The angle is drawn; a picture that is symmetric but for one bright spot says how far it was turned."""
    given = torch.zeros(1, 1, 31, 31)
    given[0, 0, 4:7, 14:17] = 1  # above the middle
    mutants = ImageMutation(operator="rotation", strength=90).mutants(given, range(60))[0, :, 0]
    weights = mutants / mutants.sum((1, 2), keepdim=True)
    middle = torch.arange(31.0) - 15
    up, right = -(weights.sum(2) * middle).sum(1), (weights.sum(1) * middle).sum(1)
    angle = torch.atan2(right, up).rad2deg()
    assert torch.allclose((up**2 + right**2).sqrt(), torch.tensor(10.0), atol=0.3)
    assert float(angle.abs().max()) <= 91
    assert float(angle.max()) > 60
    assert float(angle.min()) < -60


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradient_goes_to_the_image(operator: str) -> None:
    given = images().requires_grad_()
    mutants = ImageMutation(operator=operator).mutants(given, range(3))
    (gradient,) = torch.autograd.grad(mutants.sum(), given)
    assert float(gradient.abs().sum()) > 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"operator": "blur"}, "choose one of mixed"),
        ({"strength": 0.0}, "above 0"),
        ({"operator": "noise", "strength": 1.5}, "up to 1"),
        ({"operator": "rotation", "strength": 200}, "up to 180"),
        ({"operator": "shift", "strength": 1.5}, "whole pixels"),
    ],
)
def test_refuses(settings: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ImageMutation(**settings)


def test_refuses_a_shift_of_the_whole_image() -> None:
    with pytest.raises(UserError, match="leaves nothing"):
        ImageMutation(operator="shift", strength=7).mutants(images(), [0])

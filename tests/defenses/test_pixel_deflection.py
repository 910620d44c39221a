"""Pixel deflection: what may be copied where, how often, and what is left of the map and the denoising."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from defense_cases import Recorder, tiny
from torch import Tensor, nn

from lightning_robust.attacks.randomness import image_keys, uniform
from lightning_robust.cli import main
from lightning_robust.defenses import PixelDeflection
from lightning_robust.defenses.pixel_deflection import deflect


def numbered(count: int, channels: int, height: int, width: int) -> Tensor:
    """Images in which every value occurs once."""
    values = torch.arange(count * channels * height * width, dtype=torch.float64)
    return (values / values.numel()).view(count, channels, height, width)


def origins(moved: Tensor, images: Tensor) -> Tensor:
    """Row, column and channel ``(N, C, H, W, 3)`` that each value came from; fails for a value that there was not."""
    height, width = images.shape[2:]
    index = (moved[:, :, :, :, None] == images.flatten(1)[:, None, None, None, :]).double()
    assert (index.sum(-1) == 1).all()  # every value is one of the same image
    place = index.argmax(-1)
    return torch.stack([place % (height * width) // width, place % width, place // (height * width)], dim=-1)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("window", [1, 3, 50])
def test_it_copies_only_values_of_the_image_from_the_window(window: int, per_channel: bool) -> None:
    images = numbered(5, 3, 9, 7)
    moved = deflect(images, image_keys(images, 0), 30, window, per_channel=per_channel)
    changed = moved != images
    assert 0 < int(changed.flatten(1).sum(1).max()) <= (30 if per_channel else 90)
    from_row, from_column, channel = origins(moved, images).unbind(-1)
    assert torch.equal(channel, torch.arange(3)[:, None, None].expand_as(channel))
    far = torch.maximum((from_row - torch.arange(9)[:, None]).abs(), (from_column - torch.arange(7)).abs())
    assert 1 <= int(far.max()) <= window
    if per_channel:
        assert not torch.equal(changed[:, 0], changed[:, 1])
        assert all(int(changed[:, channel].flatten(1).sum(1).max()) <= 10 for channel in range(3))  # in turn
    else:  # one way and with all channels: a pixel is replaced by one pixel
        assert torch.equal(changed[:, 0], changed[:, 2])
        assert torch.equal(from_row[:, 0], from_row[:, 2])
        assert torch.equal(from_column[:, 0], from_column[:, 1])


@pytest.mark.parametrize("mapped", [False, True])
def test_it_is_the_loop_of_the_paper(mapped: bool) -> None:
    """For each deflection: a pixel, another from the window inside the image, and its value, from the same draws."""
    images, count, window = torch.rand(4, 3, 8, 6, dtype=torch.float64), 60, 2
    importance = torch.rand(4, 8, 6) if mapped else None
    keys = image_keys(images, 3)
    found = deflect(images, keys, count, window, importance)
    drawn = uniform(keys, (4, 3, count), torch.float64)
    for image, draw, result, number in zip(images, drawn, found, range(4), strict=True):
        expected = image.clone()
        shares = None
        if importance is not None:
            shares = (1 - importance[number].flatten().double()).cumsum(0)
        for first, second, third in draw.T.tolist():
            place = int(first * 48)
            if shares is not None:
                place = int((shares <= first * float(shares[-1])).sum())
            row, column = divmod(place, 6)
            rows = [r for r in range(8) if abs(r - row) <= window]
            columns = [c for c in range(6) if abs(c - column) <= window]
            source = rows[int(second * len(rows))], columns[int(third * len(columns))]
            expected[:, row, column] = image[:, source[0], source[1]]
        assert torch.equal(result, expected)


def test_pixels_are_drawn_in_proportion_to_what_the_map_leaves() -> None:
    """As drawing again with the map's probability does: frequency ∝ 1 - importance, none where it is 1."""
    importance = torch.tensor([[1.0, 0.75, 0.5, 0.0]])
    images = numbered(1, 1, 1, 4).expand(4000, 1, 1, 4).contiguous()
    keys = image_keys(torch.rand(4000, 1, 2, 2), 0)
    moved = deflect(images, keys, 1, 1, importance.expand(4000, 1, 4))
    changed = (moved != images).double().mean(0).flatten()
    # a pixel inside is replaced by one of two others in two of three cases, one at the edge in one of two
    expected = torch.tensor([0, 0.25 * 2 / 3, 0.5 * 2 / 3, 1 / 2]) / 1.75
    assert (changed - expected).abs().max() < 4 * (0.25 / 4000) ** 0.5
    assert changed[0] == 0


def test_a_map_of_ones_leaves_all_pixels_alike() -> None:
    images = numbered(200, 1, 4, 4)
    keys = image_keys(images, 0)
    assert torch.equal(deflect(images, keys, 20, 2, torch.ones(200, 4, 4)), deflect(images, keys, 20, 2))


def test_how_many_pixels_are_hit() -> None:
    """200 draws of 1024 pixels hit 1024 (1 - (1 - 1/1024)^200) of them, and 1 in 21² copies a pixel to itself."""
    images = torch.rand(50, 3, 32, 32)
    defense = PixelDeflection(nn.Identity(), cam=None, sigma=0)
    assert (defense.deflections, defense.window) == (200, 10)
    hit = (defense.transform(images) != images).any(1).flatten(1).sum(1).double().mean()
    expected = 1024 * (1 - (1 - 1 / 1024) ** 200) * (1 - 1 / 15**2)  # windows at the edge are smaller
    assert float(hit) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("cam", ["geometric", "rank"])
def test_the_map_protects_what_the_classifier_looks_at(cam: Any) -> None:
    pytest.importorskip("captum")
    images = torch.rand(60, 3, 16, 16)
    defense = PixelDeflection(tiny(), cam=cam, sigma=0, deflections=60, window=3)
    importance = defense.importance(images)
    assert importance is not None
    changed = (defense.transform(images) != images).any(1).double()
    seen, unseen = importance > 0.8, importance < 0.2
    assert float(changed[seen].mean()) < 0.5 * float(changed[unseen].mean())


def test_deflection_and_denoising_come_one_after_the_other() -> None:
    from lightning_robust.defenses.wavelet import denoise

    pytest.importorskip("ptwt")
    images = torch.rand(4, 3, 32, 32)
    defense = PixelDeflection(nn.Identity(), cam=None)
    keys = defense.keys(images)
    moved = deflect(images, keys, 200, 10)
    assert torch.equal(defense.transform(images), denoise(moved, 0.04).clamp(0, 1))
    assert not torch.equal(defense.transform(images), moved)


def test_the_backward_pass_is_the_identity() -> None:
    """The gradient is the classifier's at the deflected image, handed on as if that were the image."""
    images = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    defense = PixelDeflection(tiny().double(), deflections=10, window=2)
    points = images.clone().requires_grad_()
    (found,) = torch.autograd.grad(defense(points)[:, 0].sum(), points)
    moved = defense.transform(images).requires_grad_()
    (expected,) = torch.autograd.grad(defense.model(moved)[:, 0].sum(), moved)
    torch.testing.assert_close(found, expected)


def test_draws_ask_for_the_map_once() -> None:
    """Six passes for the map of five classes, and one for each draw."""
    pytest.importorskip("captum")
    model = Recorder(tiny())
    defense = PixelDeflection(model, deflections=10, window=2)
    images = torch.rand(4, 3, 8, 8)
    defense(images)  # which layer the map is taken from is found out
    model.sizes.clear()
    draws = defense.draws(10)
    each = [draw(images.clone()) for draw in draws]
    assert len(model.sizes) == 6 + 10
    assert not torch.equal(each[0], each[1])
    assert torch.equal(each[0], defense.single(images, defense.keys(images, 1)))
    draws[0](images.flip(0))  # other images have another map
    assert len(model.sizes) == 16 + 7 + 7


def test_no_map_is_a_word_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """``null`` reaches a setting inside a dictionary as text; there ``none`` says the same."""
    words = ["test", "--config", "study/prm_graybox", "--trainer.callbacks.defenses.pixel_deflection.cam", "none"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--print_config"])
    said = capsys.readouterr()
    assert not ended.value.code, said.err
    settings = yaml.safe_load(said.out)["trainer"]["callbacks"][0]["init_args"]["defenses"]["pixel_deflection"]
    assert PixelDeflection(**settings["init_args"]).cam is None

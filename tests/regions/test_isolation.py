"""The four regions are a partition; an attack held by a mask has its region inside; blobs blank and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_robust.attacks import FGSM, PGD, Attack
from lightning_robust.errors import UserError
from lightning_robust.regions import (
    REGION_NAMES,
    Blobs,
    Region,
    Threshold,
    blob,
    isolate,
    load_blobs,
    neutralize,
    pixel_change,
    region_shares,
    save_blobs,
)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_the_partition_is_exact(count: int, height: int, width: int, u: float, v: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    roi = torch.rand(count, height, width, generator=generator) < u
    roa = torch.rand(count, height, width, generator=generator) < v
    regions = isolate(roi, roa)
    parts = torch.stack([regions == region for region in Region])
    assert (parts.sum(0) == 1).all()  # disjoint, and covering
    assert torch.equal(parts[Region.UV], roi & roa)
    assert torch.equal(parts[Region.U_ONLY], roi & ~roa)
    assert torch.equal(parts[Region.V_ONLY], ~roi & roa)
    assert torch.equal(parts[Region.NEITHER], ~(roi | roa))
    shares = region_shares(regions)
    assert shares.shape == (count, 4)
    torch.testing.assert_close(shares.sum(-1), torch.ones(count).double())
    torch.testing.assert_close(shares, parts.double().mean((-2, -1)).T)
    assert set(REGION_NAMES) == set(Region)


@pytest.mark.parametrize("attack", [FGSM(eps=0.2), PGD(eps=0.2, steps=5), PGD(eps=1.0, norm="l2", steps=5)])
def test_an_attack_held_by_a_mask_has_its_region_inside(attack: Attack) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4))
    images, labels = torch.rand(6, 3, 8, 8), torch.arange(6) % 4
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[1:4, 2:7] = True
    adversarial = attack.to_the_end()(model, images, labels, mask=mask)
    region = Threshold("relative", 0.5).region(pixel_change(images, adversarial))
    assert region.flatten(1).any(1).all()
    assert not (region & ~mask).any()
    held_everywhere = Threshold("relative", 0.5).region(
        pixel_change(images, attack.to_the_end()(model, images, labels))
    )
    assert (held_everywhere & ~mask).any()


def test_masks_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="roi of 2×2 and roa of 3×3"):
        isolate(torch.ones(2, 2).bool(), torch.ones(3, 3).bool())
    with pytest.raises(UserError, match=r"roa of shape \(2, 2\) and type torch.float32"):
        isolate(torch.ones(2, 2).bool(), torch.ones(2, 2))


def test_blobs_blank_their_pixels_and_no_other() -> None:
    frequency = torch.tensor([[0.1, 0.5], [0.9, 0.0]])
    assert blob(frequency, 0.5).tolist() == [[False, True], [True, False]]
    images = torch.rand(3, 2, 2, 2, requires_grad=True)
    masks = torch.stack([blob(frequency, 0.5), blob(frequency, 0.9), torch.zeros(2, 2).bool()])
    blanked = neutralize(images, masks, torch.tensor([1.0, 0.0, 1.0]))
    inside = masks[:, None].expand_as(blanked)
    assert torch.equal(blanked[~inside], images[~inside])
    assert (blanked[0][:, masks[0]] == 1).all()
    assert (blanked[1][:, masks[1]] == 0).all()
    (gradient,) = torch.autograd.grad(blanked.sum(), images)
    assert torch.equal(gradient == 0, inside)
    assert torch.equal(neutralize(images, masks[0], 0)[:, :, 0, 1], torch.zeros(3, 2))
    with pytest.raises(UserError, match="theta=0"):
        blob(frequency, 0)


def test_blobs_are_written_and_read(tmp_path: Path) -> None:
    masks = torch.rand(2, 5, 4) < 0.3
    blobs = Blobs(masks, torch.tensor([0.0, 1.0]), ("cat", "dog"))
    again = load_blobs(save_blobs(tmp_path / "blobs.npz", blobs))
    assert torch.equal(again.masks, masks)
    assert again.fill.tolist() == [0, 1]
    assert again.class_names == ("cat", "dog")


def test_blobs_that_are_none(tmp_path: Path) -> None:
    some = torch.zeros(2, 3, 3, dtype=torch.bool)
    some[0, 0, 0] = True
    for masks, fill, message in (
        (some.float(), torch.zeros(2), "type torch.float32"),
        (some[0], torch.zeros(2), r"shape \(3, 3\)"),
        (some, torch.zeros(3), "one number a class"),
        (some, torch.tensor([0.0, 0.5]), "each 0 .* or 1"),
        (torch.zeros_like(some), torch.zeros(2), "every class's blob is empty"),
        (some | torch.tensor([False, True])[:, None, None], torch.zeros(2), "that of class 1 is the whole image"),
    ):
        with pytest.raises(UserError, match=message):
            Blobs(masks, fill)
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    np.save(tmp_path / "single.npy", np.zeros(3))
    for file, message in (
        ("none.npz", "do not exist"),
        ("text.npz", "cannot be read"),
        ("single.npy", "cannot be read"),
        ("other.npz", "hold no array 'masks'"),
    ):
        with pytest.raises(UserError, match=message):
            load_blobs(tmp_path / file)

"""Masks: files, sizes, batches, augmentation, and splits that keep groups together."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning import LightningModule, Trainer
from torch.utils.data import DataLoader
from torchmetrics import SumMetric

from lightning_robust.attacks import PGD
from lightning_robust.batch import as_batch
from lightning_robust.datamodules import Augmentation, ImageDataset, MaskedImageFolder, MaskedTensorSource, TensorSource
from lightning_robust.datamodules.augmentation import image_keys
from lightning_robust.datamodules.dataset import collate, resize_and_centre
from lightning_robust.datamodules.masks import (
    checked_mask,
    hold_out_groups,
    read_mask,
    resize_mask_and_centre,
    resize_masks,
    threshold_masks,
    write_mask,
)
from lightning_robust.errors import UserError


def blobs(count: int = 20, size: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that are white just where their masks are."""
    rng = np.random.default_rng(0)
    masks = torch.zeros(count, 1, size, size, dtype=torch.bool)
    for mask in masks:
        top, left = rng.integers(0, size - 5, 2)
        mask[0, top : top + 4, left : left + 5] = True
    return masks.expand(-1, 3, -1, -1).byte() * 255, masks


def data(augmentation: str | None = None) -> ImageDataset:
    images, masks = blobs()
    labels = np.arange(20) % 4
    chain = Augmentation(augmentation, 5, (12, 12)) if augmentation else None
    return ImageDataset(MaskedTensorSource(images, labels, masks), np.arange(20), labels, chain)


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_has_its_masks_and_reads_as_one() -> None:
    chosen = data()
    image, label, mask = chosen[7]
    assert (image.shape, label, mask.shape, mask.dtype) == ((3, 12, 12), 3, (1, 12, 12), torch.bool)
    for collate_fn in (None, collate):
        (values,) = DataLoader(chosen, batch_size=20, collate_fn=collate_fn)
        batch = as_batch(values)
        assert batch.mask is not None
        assert torch.equal(batch.mask[7], mask)
        assert torch.equal(batch.images, batch.mask.expand(-1, 3, -1, -1).float())
    assert torch.equal(pickle.loads(pickle.dumps(chosen))[7][2], mask)


def test_without_masks_a_batch_is_a_pair() -> None:
    images, _ = blobs()
    plain = ImageDataset(
        TensorSource(images, np.zeros(20, dtype=np.int64)), np.arange(20), np.zeros(20, dtype=np.int64)
    )
    assert len(plain[0]) == 2
    assert len(next(iter(DataLoader(plain, batch_size=20, collate_fn=collate)))) == 2


@pytest.mark.parametrize("name", ["crop", "flip", "crop_flip", "imagenet"])
def test_augmentation_moves_mask_and_image_together(name: str) -> None:
    chosen = data(name)
    keys = [(3, index) for index in range(20)]
    batch = chosen.__getitems__(keys)
    assert batch.masks is not None
    assert batch.masks.dtype == torch.bool
    plain = chosen.__getitems__(range(20))
    assert not torch.equal(batch.masks, data().__getitems__(range(20)).masks)
    assert not torch.equal(batch.masks, plain.masks)  # epoch 0 is another draw
    white = batch.images[:, :1]
    assert torch.equal(white > 0.5, batch.masks)
    # and does not ask who else is in the batch
    assert torch.equal(chosen.__getitems__([keys[9], keys[2]]).masks, batch.masks[[9, 2]])  # type: ignore[arg-type]


def test_a_mask_does_not_change_what_its_image_gets() -> None:
    images, masks = blobs()
    keys = image_keys(0, 0, np.arange(20))
    chain = Augmentation("imagenet", 0, (8, 8))
    for image, mask, key in zip(images, masks, keys, strict=True):
        assert torch.equal(chain.cut(image, key)[0], chain.cut(image, key, mask)[0])


def test_attacks_take_the_masks_of_a_batch() -> None:
    torch.manual_seed(0)
    batch = as_batch(next(iter(DataLoader(data(), batch_size=20, collate_fn=collate))))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(432, 4))
    moved = PGD(eps=0.2, steps=3, stop_at_success=False)(model, batch.images, batch.labels, mask=batch.mask)
    assert batch.mask is not None
    outside = ~batch.mask.expand_as(moved)
    assert torch.equal(moved[outside], batch.images[outside])
    assert not torch.equal(moved, batch.images)


@pytest.mark.parametrize(
    "masks",
    [torch.ones(20, 1, 12, 12), torch.ones(20, 12, 12, dtype=torch.bool), torch.ones(19, 1, 12, 12, dtype=torch.bool)],
)
def test_masks_that_do_not_fit_their_images(masks: torch.Tensor) -> None:
    with pytest.raises(UserError, match=r"masks of shape .* they are bool \(20, 1, 12, 12\)"):
        MaskedTensorSource(blobs()[0], np.zeros(20, dtype=np.int64), masks)


class Sums(LightningModule):
    """Adds up what the test batches hold."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.count = SumMetric(), SumMetric()

    def test_step(self, values: Any, batch_idx: int) -> None:
        batch = as_batch(values)
        assert batch.mask is not None
        self.inside.update((batch.images * batch.mask).double().sum())
        self.count.update(batch.mask.double().sum())
        self.log_dict({"inside": self.inside, "count": self.count})


def test_masks_are_counted_once_on_one_and_two_processes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    masks = rng.random((13, 6, 6)) < 0.4
    images = rng.integers(0, 256, (13, 6, 6, 3), dtype=np.uint8)
    for number, (image, mask) in enumerate(zip(images, masks, strict=True)):
        for place, pixels in (("images", image), ("masks", mask.astype(np.uint8) * 255)):
            (tmp_path / place / f"{number % 2}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / place / f"{number % 2}" / f"{number}.png")
    torch.set_num_threads(1)  # ranks are forked, which threads under way do not survive
    for devices in (1, 2):
        trainer = Trainer(
            accelerator="cpu",
            devices=devices,
            strategy="ddp_fork" if devices > 1 else "auto",
            logger=False,
            enable_progress_bar=False,
        )
        folder = MaskedImageFolder(root=str(tmp_path), test_size=1.0, eval_batch_size=3, num_workers=0)
        (found,) = trainer.test(Sums(), folder, verbose=False)
        assert found["count"] == masks.sum()
        assert found["inside"] == pytest.approx((images * masks[..., None]).sum() / 255, rel=1e-6)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_masks_survive_their_file(tmp_path: Path) -> None:
    mask = blobs()[1][0, 0].numpy()
    write_mask(tmp_path / "a.png", mask)
    assert np.array_equal(read_mask(tmp_path / "a.png"), mask)
    for number, values in enumerate((mask * 255, mask * 1)):
        Image.fromarray(values.astype(np.uint8)).save(tmp_path / f"{number}.bmp")
        assert np.array_equal(read_mask(tmp_path / f"{number}.bmp"), mask)
    Image.fromarray(np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)).save(tmp_path / "rgb.png")
    assert np.array_equal(read_mask(tmp_path / "rgb.png"), mask)


def test_full_masks_are_allowed_and_empty_ones_are_not() -> None:
    assert checked_mask(np.full((3, 4), 255, dtype=np.uint8), "it").all()
    for empty in (np.zeros((3, 4), dtype=np.uint8), np.zeros((3, 4), dtype=bool)):
        with pytest.raises(UserError, match="it is empty: it needs at least one pixel"):
            checked_mask(empty, "it")


@pytest.mark.parametrize(("values", "named"), [((0, 128), "0, 128"), ((0, 1, 255), "0, 1, 255"), ((0, 18), "0, 18")])
def test_other_values_are_named(values: tuple[int, ...], named: str) -> None:
    with pytest.raises(UserError, match=rf"has the values {named}: a mask is 0 on background"):
        checked_mask(np.array([values], dtype=np.uint8), "the mask m.png")


def test_files_that_are_no_masks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.png does not exist"):
        read_mask(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match=r"text\.png cannot be read"):
        read_mask(tmp_path / "text.png")
    Image.fromarray(np.array([[[255, 0, 0]]], dtype=np.uint8)).save(tmp_path / "red.png")
    with pytest.raises(UserError, match=r"red\.png is in colour"):
        read_mask(tmp_path / "red.png")


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_resizing_keeps_the_pixels_that_are_half_covered() -> None:
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, :4, :] = True
    assert torch.equal(resize_masks(mask, (4, 4))[0], torch.arange(4)[:, None].expand(4, 4) < 2)
    assert resize_masks(mask, (8, 8)) is mask
    line = torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    line[0, 0, :, 7] = True
    small = resize_masks(line, (8, 8))
    assert small[0].any(-1).all()  # a thin object is not lost
    assert not small[1].any()
    assert resize_masks(torch.ones(1, 1, 9, 7, dtype=torch.bool), (5, 4)).all()


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (32, 32), (7, 9)])
@pytest.mark.parametrize("share", [1.0, 0.6])
def test_a_mask_is_cut_where_its_image_is(shape: tuple[int, int], share: float) -> None:
    mask = torch.zeros(1, *shape, dtype=torch.bool)
    mask[0, shape[0] // 4 : shape[0] // 2, shape[1] // 3 :] = True
    image = resize_and_centre(mask.float().expand(3, -1, -1), (16, 16), share)
    cut = resize_mask_and_centre(mask, (16, 16), share)
    assert cut.shape == (1, 16, 16)
    assert torch.equal(cut[0], image[0] >= 0.5 - 1e-3)


def test_thresholds_leave_no_mask_empty() -> None:
    images = torch.tensor([[[[0, 127, 128, 255]]], [[[0, 3, 90, 90]]]], dtype=torch.uint8)
    expected = torch.tensor([[[[0, 0, 1, 1]]], [[[0, 0, 1, 1]]]], dtype=torch.bool)
    assert torch.equal(threshold_masks(images, 0.5), expected)
    assert torch.equal(threshold_masks(images.float() / 255, 0.5), expected)


# ---- groups ----------------------------------------------------------------------------------------------------------


def test_no_group_is_divided_and_classes_keep_their_share() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 150, 900)
    labels = groups % 3
    kept, held = hold_out_groups(labels, groups, 0.2, seed=0)
    assert len(kept) + len(held) == 900
    assert not set(groups[kept]) & set(groups[held])
    np.testing.assert_allclose(np.bincount(labels[held]) / np.bincount(labels), 0.2, atol=0.03)
    assert np.array_equal(held, hold_out_groups(labels, groups, 0.2, seed=0)[1])
    assert not np.array_equal(held, hold_out_groups(labels, groups, 0.2, seed=1)[1])
    assert abs(len(hold_out_groups(labels, groups, 90, seed=0)[1]) - 90) < 20


def test_classes_of_which_nothing_is_held_out_are_named() -> None:
    labels = np.repeat([0, 1], [40, 60])
    groups = np.concatenate([np.repeat([0, 1], 20), np.arange(2, 62)])
    with pytest.warns(UserWarning, match=r"val_size=0\.1: no image is held out of 1 of 2 classes \(number 0\)"):
        kept, _ = hold_out_groups(labels, groups, 0.1, seed=0)
    assert (labels[kept] == 0).sum() == 40
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, held = hold_out_groups(labels, groups, 0.5, seed=0)
    assert set(labels[held]) == {0, 1}


def test_one_group_cannot_be_divided() -> None:
    with pytest.raises(UserError, match=r"test_size=0\.5 cannot be held out of 6 images in 1 groups"):
        hold_out_groups(np.array([0, 0, 0, 1, 1, 1]), np.zeros(6, dtype=np.int64), 0.5, 0, name="test_size")

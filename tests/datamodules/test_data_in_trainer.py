"""What the Trainer makes of the data modules: counted on one and two processes, and after a resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from lightning_robust.datamodules import Arrays
from lightning_robust.errors import UserError


class Recorder(LightningModule):
    """Trains one number and writes down which images it saw, by a number in their first two pixels."""

    def __init__(self, folder: Path | str = "") -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.folder = Path(folder)

    def record(self, stage: str, images: torch.Tensor) -> None:
        pixels = (images[:, 0, 0, :2] * 255).round().long()
        seen = (pixels[:, 0] * 256 + pixels[:, 1]).tolist()
        with (self.folder / f"{stage}-{self.global_rank}").open("a") as file:
            file.write(f"{self.current_epoch} {seen} {images.double().sum():.9f}\n")

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        self.record("train", batch[0])
        return (self.weight**2).sum()

    def validation_step(self, batch: Any, _: int) -> None:
        self.record("val", batch[0])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.record("test", batch[0])

    def predict_step(self, batch: Any, _: int) -> torch.Tensor:
        self.record("predict", batch[0])
        return batch[1]  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def numbered(tmp_path: Path) -> Callable[..., Arrays]:
    """Arrays of 41 training, 13 validation and 7 test images; the first two pixels are the image's number."""
    rng = np.random.default_rng(0)
    files = {}
    for split, n in (("train", 41), ("val", 13), ("test", 7)):
        images = rng.integers(0, 256, (n, 4, 4), dtype=np.uint8)
        images[:, 0, 0], images[:, 0, 1] = 0, np.arange(n)
        files[split] = str(tmp_path / f"{split}.npz")
        np.savez(files[split], images=images, labels=np.arange(n) % 2)
    return lambda **settings: Arrays(**{**files, "batch_size": 6, "eval_batch_size": 3, **settings})


def trainer(tmp_path: Path, devices: int = 1, **settings: Any) -> Trainer:
    torch.set_num_threads(1)  # ranks are forked, which threads under way do not survive
    return Trainer(
        **{
            "accelerator": "cpu",
            "devices": devices,
            "strategy": "ddp_fork" if devices > 1 else "auto",
            "max_epochs": 2,
            "num_sanity_val_steps": 0,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
            **settings,
        }
    )


def lines(folder: Path, stage: str) -> list[list[tuple[int, list[int], float]]]:
    """Read what each rank wrote: epoch, images and their sum per batch."""
    ranks = []
    for file in sorted(folder.glob(f"{stage}-*")):
        rank = []
        for line in file.read_text().splitlines():
            epoch, rest = line.split(" ", 1)
            seen, total = rest.rsplit(" ", 1)
            rank.append((int(epoch), [int(x) for x in seen.strip("[]").split(",")], float(total)))
        ranks.append(rank)
    return ranks


@pytest.mark.parametrize("injected", [True, False])
@pytest.mark.parametrize("devices", [1, 2])
def test_evaluation_counts_each_image_once(
    numbered: Callable[..., Arrays], tmp_path: Path, devices: int, injected: bool
) -> None:
    run = trainer(tmp_path, devices, use_distributed_sampler=injected)
    run.validate(Recorder(tmp_path), numbered(), verbose=False)
    run.test(Recorder(tmp_path), numbered(), verbose=False)
    run.predict(Recorder(tmp_path), numbered(), return_predictions=False)
    for stage, n in (("val", 13), ("test", 7), ("predict", 7)):
        ranks = lines(tmp_path, stage)
        assert len(ranks) == devices
        assert sorted(image for rank in ranks for _, seen, _ in rank for image in seen) == list(range(n))


@pytest.mark.parametrize("injected", [True, False])
def test_two_devices_train_on_the_batches_of_one(
    numbered: Callable[..., Arrays], tmp_path: Path, injected: bool
) -> None:
    seen = {}
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        settings = {"use_distributed_sampler": injected}
        trainer(folder, devices, **settings).fit(Recorder(folder), numbered(augmentation="flip"))
        ranks = lines(folder, "train")
        # What the ranks' k-th batches are together. A flip moves the numbers in the first two pixels, the same way for
        # an image in both runs: the sum of the pixels and the moved numbers must agree.
        seen[devices] = [
            (rows[0][0], sorted(image for row in rows for image in row[1]), round(sum(row[2] for row in rows), 6))
            for rows in zip(*ranks, strict=True)
        ]
        val = [image for rank in lines(folder, "val") for epoch, images, _ in rank if epoch == 1 for image in images]
        assert sorted(val) == list(range(13))
    assert seen[1] == seen[2]
    assert len(seen[1]) == 2 * (41 // 6)
    assert [epoch for epoch, _, _ in seen[1]] == [0] * 6 + [1] * 6
    assert seen[1][0] != seen[1][6]


class StopAfter(Callback):
    """Save a checkpoint after a number of batches, and stop."""

    def __init__(self, batches: int, path: Path) -> None:
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.batches:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True
            raise _Stopped


class _Stopped(Exception):
    pass


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batches", [4, 6, 8])
@pytest.mark.filterwarnings("error:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_resumed_run_sees_the_same_images(
    numbered: Callable[..., Arrays], tmp_path: Path, workers: int, batches: int
) -> None:
    """Stopped inside the first epoch, at its end, and inside the second."""

    def data() -> Arrays:
        return numbered(augmentation="crop_flip", num_workers=workers)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    trainer(whole, max_epochs=3).fit(Recorder(whole), data())
    stop = StopAfter(batches, tmp_path / "stopped.ckpt")
    with pytest.raises(_Stopped):
        trainer(parts, max_epochs=3, callbacks=[stop]).fit(Recorder(parts), data())
    assert len(lines(parts, "train")[0]) == batches
    trainer(parts, max_epochs=3).fit(Recorder(parts), data(), ckpt_path=stop.path, weights_only=True)
    assert len(lines(whole, "train")[0]) == 18
    assert lines(parts, "train") == lines(whole, "train")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumed_from_an_end_of_epoch_checkpoint_sees_the_same_images(
    numbered: Callable[..., Arrays], tmp_path: Path, workers: int
) -> None:
    from pytorch_lightning.callbacks import ModelCheckpoint

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    trainer(whole, max_epochs=3).fit(Recorder(whole), numbered(num_workers=workers))
    save = ModelCheckpoint(parts, filename="last", save_top_k=1)
    trainer(parts, max_epochs=1, callbacks=[save], enable_checkpointing=True).fit(Recorder(parts), numbered())
    path = parts / "last.ckpt"
    trainer(parts, max_epochs=3).fit(Recorder(parts), numbered(num_workers=workers), ckpt_path=path, weights_only=True)
    assert lines(parts, "train") == lines(whole, "train")


def test_overfitting_on_batches_sees_the_same_images_each_epoch(
    numbered: Callable[..., Arrays], tmp_path: Path
) -> None:
    trainer(tmp_path, overfit_batches=2).fit(Recorder(tmp_path), numbered())
    (rank,) = lines(tmp_path, "train")
    assert [seen for _, seen, _ in rank] == [list(range(6)), list(range(6, 12))] * 2


def test_no_validation(numbered: Callable[..., Arrays], tmp_path: Path) -> None:
    trainer(tmp_path).fit(Recorder(tmp_path), numbered(val=None, val_size=0))
    assert len(lines(tmp_path, "train")[0]) == 2 * (41 // 6)
    assert not list(tmp_path.glob("val-*"))


def test_a_batch_that_the_devices_cannot_share_is_an_error(numbered: Callable[..., Arrays], tmp_path: Path) -> None:
    with pytest.raises(
        torch.multiprocessing.ProcessRaisedException, match=r"batch_size=5 .* cannot be divided over 2 devices"
    ):
        trainer(tmp_path, 2).fit(Recorder(tmp_path), numbered(batch_size=5))


def test_alone_after_a_distributed_run_the_data_are_whole(numbered: Callable[..., Arrays], tmp_path: Path) -> None:
    data = numbered()
    trainer(tmp_path, 2).test(Recorder(tmp_path), data, verbose=False)
    assert sum(len(labels) for _, labels in data.test_dataloader()) == 7


def test_ranks_share_the_check_for_corrupt_images(write_folder: Callable[..., Path], tmp_path: Path) -> None:
    from lightning_robust.datamodules import ImageFolder

    root = write_folder({"a": 5, "b": 6})
    (root / "b" / "003.png").write_bytes(b"")
    (root / "a" / "002.png").write_bytes(b"")
    data = ImageFolder(root=str(root), test_size=1.0, on_corrupt="skip", num_workers=0)
    trainer(tmp_path, 2).test(Recorder(tmp_path), data, verbose=False)
    assert sum(len(seen) for rank in lines(tmp_path, "test") for _, seen, _ in rank) == 9


def test_a_missing_split_is_a_user_error(numbered: Callable[..., Arrays], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no test images"):
        trainer(tmp_path).test(Recorder(tmp_path), numbered(test=None), verbose=False)

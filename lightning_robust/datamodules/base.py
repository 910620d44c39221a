"""The base of all data modules: splits, exact loaders, and what the model must know before data are read."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from math import isnan
from typing import Any, Final, Literal

import numpy as np
import torch
import torch.distributed as dist
from pytorch_lightning import LightningDataModule
from pytorch_lightning.trainer.states import TrainerFn, TrainerStatus
from torch.utils.data import DataLoader

from lightning_robust.datamodules.augmentation import Augmentation, augmentation_steps
from lightning_robust.datamodules.dataset import ImageDataset, ImageSource, TensorSource, collate
from lightning_robust.datamodules.masks import hold_out_groups
from lightning_robust.datamodules.sampler import EpochLoader, EpochSampler, UnpaddedSampler, share_of_batch
from lightning_robust.datamodules.selection import Rows, balanced_limit, hold_out, keep_classes
from lightning_robust.errors import UserError

Split = Literal["train", "val", "test"]
SPLITS: Final[tuple[Split, ...]] = ("train", "val", "test")


class ImageDataModule(LightningDataModule, ABC):
    """Labelled images for a Trainer, or for use alone through :meth:`dataset`.

    Batches are ``(images float32 in [0, 1] (N, C, H, W), labels int64 (N,))``, and where the data have masks ``(images,
    labels, masks bool (N, 1, H, W))`` (:mod:`lightning_robust.batch` reads both). Evaluation counts each image exactly
    once on any number of devices; training sees the same batches and the same augmentations on any number of devices
    and workers and after a resume, inside an epoch too (:mod:`lightning_robust.datamodules.sampler`). What the data
    set has no validation split for is held out from its training images, each class in proportion.

    A new data set is a subclass that sets its own attributes, calls this constructor, and says four things:
    :attr:`all_class_names`, :attr:`source_shape`, :meth:`read`, and how to get what is missing (:meth:`mend`).

    Args:
        root: Folder of the data.
        batch_size: Training images per optimizer step over all devices together; each device takes an equal share.
            With gradient accumulation: per accumulated batch.
        eval_batch_size: Images per batch and device in validation, test and prediction.
        val_size: Share (below 1) or number of training images held out for validation where the data set has no
            validation split of its own; 0 for no validation.
        seed: Seed of the splits, the order and the augmentation.
        classes: Keep only these class numbers, renumbered 0, 1, … in the order given; all classes if not given.
        limit: Use at most so many images per split, class-balanced: a number, or one each as
            ``{train: 1000, test: 200}``.
        augmentation: What to do to training images: ``none``, ``crop``, ``flip``, ``crop_flip`` (as is usual for
            CIFAR), ``imagenet`` (random resized crop and flip), or a list of these.
        image_size: Resize images to this height and width (one number for both).
        num_workers: Worker processes per loader; if not given, 0 for images in memory and otherwise a device's share
            of the processor cores, at most 8.

    Attributes:
        num_classes: Number of classes, known as soon as the object exists.
        image_shape: Shape (C, H, W) of one image, known as soon as the object exists.
        class_names: Names of the classes in the order of their numbers.

    Raises:
        UserError: If a setting cannot be right, or the data are missing or damaged; the message says how to mend it.
    """

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        eval_batch_size: int = 512,
        val_size: int | float = 0.1,
        seed: int = 0,
        classes: list[int] | None = None,
        limit: int | dict[str, int] | None = None,
        augmentation: list[str] | str | None = None,
        image_size: int | tuple[int, int] | None = None,
        num_workers: int | None = None,
    ) -> None:
        super().__init__()
        self.root = root
        self.batch_size = _at_least(1, batch_size=batch_size)
        self.eval_batch_size = _at_least(1, eval_batch_size=eval_batch_size)
        self.seed = _at_least(0, seed=seed)
        self.num_workers = None if num_workers is None else _at_least(0, num_workers=num_workers)
        self.val_size = checked_size(val_size, "val_size")
        self.image_size = checked_image_size(image_size)
        augmentation_steps(augmentation)
        self.augmentation = augmentation
        names = self.all_class_names
        self.classes = _checked_classes(classes, names)
        self.class_names: list[str] = names if self.classes is None else [names[c] for c in self.classes]
        self.num_classes: int = len(self.class_names)
        self.limit = _checked_limit(limit, self.num_classes)
        shape = self.source_shape
        self.image_shape: tuple[int, int, int] = (shape[0], *(self.image_size or shape[1:]))
        self._sources: dict[Split, ImageSource | None] = {}
        self._chosen: dict[Split, tuple[ImageSource, Rows, Rows]] = {}

    # ---- what a subclass says ------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def all_class_names(self) -> list[str]:
        """Names of all classes of the data set, before ``classes`` chooses among them."""

    @property
    @abstractmethod
    def source_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of the images, before ``image_size`` changes it."""

    @abstractmethod
    def read(self, split: Split) -> ImageSource | None:
        """Read a split, with the labels of all classes; None where the data set has no such split."""

    def mend(self, split: Split) -> str:
        """Say what the user can do if a split is missing."""
        return "choose a data set that has it."

    # ---- data sets -----------------------------------------------------------------------------------------------

    def dataset(self, split: Split, *, augment: bool = False) -> ImageDataset:
        """Return one split as a data set of its own, reading it on the first call.

        Args:
            split: ``train``, ``val`` or ``test``.
            augment: Whether to augment the images, as training does.

        Raises:
            UserError: If there is no such split, or its data are missing or damaged.
        """
        if split not in SPLITS:
            raise UserError(f"there is no split {split!r}: choose from {', '.join(SPLITS)}.")
        if split not in self._chosen:
            source, rows, labels = self._choose(split)
            limit = self.limit.get(split)
            if limit is not None:
                chosen = balanced_limit(labels, limit, self.seed)
                rows, labels = rows[chosen], labels[chosen]
            self._chosen[split] = source, rows, labels
        source, rows, labels = self._chosen[split]
        chain = Augmentation(self.augmentation, self.seed, self.image_shape[1:]) if augment else None
        return ImageDataset(source, rows, labels, chain)

    @property
    def has_val(self) -> bool:
        """Whether there is a validation split: the data set's own, or one held out from the training images."""
        return self._source("val") is not None or (self.val_size > 0 and self._source("train") is not None)

    def _choose(self, split: Split) -> tuple[ImageSource, Rows, Rows]:
        """Find a split's source, and the rows and labels that ``classes`` and ``val_size`` leave of it."""
        source = self._source(split)
        held_out = split == "val" and source is None and self.val_size > 0
        if held_out:
            source = self._source("train")
        if source is None:
            raise UserError(f"{type(self).__name__} has no {split} images: {self.mend(split)}")
        labels = source.labels
        rows = np.arange(len(labels))
        if self.classes is not None:
            rows, labels = keep_classes(labels, self.classes)
        if not len(rows):
            raise UserError(f"{type(self).__name__} has no {split} image of the classes {self.class_names}.")
        if held_out or (split == "train" and self.val_size > 0 and self._source("val") is None):
            groups = getattr(source, "groups", None)
            if groups is None:
                kept, held = hold_out(labels, self.val_size, self.seed)
            else:
                kept, held = hold_out_groups(labels, groups[rows], self.val_size, self.seed)
            part = held if held_out else kept
            rows, labels = rows[part], labels[part]
        return source, rows, labels

    def _source(self, split: Split) -> ImageSource | None:
        """Read and check a split once."""
        if split not in self._sources:
            source = self.read(split)
            if source is not None:
                name = f"{type(self).__name__}'s {split} split"
                check_labels(source.labels, len(self.all_class_names), name)
            if isinstance(source, TensorSource):
                _check_images(source, name)
                if self.image_size is not None:
                    source = source.resized(self.image_size)
            self._sources[split] = source
        return self._sources[split]

    # ---- Lightning's hooks ---------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Read what a stage needs, so that mistakes show before the model moves to a device."""
        if stage in (None, "fit"):
            share_of_batch(self.batch_size, self._replicas()[0])
            self.dataset("train")
        if stage == "validate" or (stage in (None, "fit") and self.has_val):
            self.dataset("val")
        if stage in ("test", "predict"):
            self.dataset("test")

    def train_dataloader(self) -> EpochLoader:
        """Return the loader of this rank's share of the training batches."""
        dataset = self.dataset("train", augment=True)
        replicas, rank = self._replicas()
        sampler = EpochSampler(dataset, self.batch_size, self.seed, replicas, rank)
        return EpochLoader(
            dataset, batch_size=sampler.local_batch_size, sampler=sampler, **self._loader_settings(dataset)
        )

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Return the loader of this rank's share of the validation images; an empty list if there are none."""
        fitting = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        return [] if fitting and not self.has_val else self._eval_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the loader of this rank's share of the test images."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the loader of this rank's share of the test images."""
        return self._eval_loader("test")

    def _eval_loader(self, split: Split) -> DataLoader[Any]:
        dataset = self.dataset(split)
        sampler = UnpaddedSampler(dataset, *self._replicas())
        return DataLoader(dataset, batch_size=self.eval_batch_size, sampler=sampler, **self._loader_settings(dataset))

    def _loader_settings(self, dataset: ImageDataset) -> dict[str, Any]:
        workers = self.num_workers
        devices = 1 if self.trainer is None else self.trainer.num_devices
        if workers is None:
            workers = 0 if isinstance(dataset.source, TensorSource) else max(1, min(8, cores() // devices))
        on_cuda = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": on_cuda,
            "collate_fn": collate,
        }

    def _replicas(self) -> tuple[int, int]:
        """Return the number of model replicas and this one's number; (1, 0) outside a distributed run."""
        # A Trainer that is not running may have ended a distributed run in other processes.
        if self.trainer is not None and self.trainer.state.status == TrainerStatus.RUNNING:
            settings = self.trainer.distributed_sampler_kwargs
            if settings:
                return int(settings["num_replicas"]), int(settings["rank"])
        if dist.is_available() and dist.is_initialized():
            return dist.get_world_size(), dist.get_rank()
        return 1, 0


def cores() -> int:
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _at_least(lowest: int, **setting: int) -> int:
    ((name, value),) = setting.items()
    if value < lowest:
        raise UserError(f"{name}={value} is too small: give at least {lowest}.")
    return value


def checked_size(size: int | float, name: str) -> int | float:
    """Check a share below 1 or a whole number of images.

    Raises:
        UserError: If it is neither.
    """
    if size < 0 or (size >= 1 and size != int(size)):
        raise UserError(f"{name}={size} is neither a share from 0 to below 1 nor a number of images.")
    # From a float 1.0 nobody can tell whether all images or one image is meant.
    if isinstance(size, float) and size == 1:
        raise UserError(f"{name}=1.0 leaves nothing: give a share below 1, or 1 for one image.")
    return size


def checked_image_size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """Return (height, width), or None.

    Raises:
        UserError: If a side is not positive.
    """
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise UserError(f"image_size={size} is not one positive number or a pair (height, width).")
    return pair[0], pair[1]


def _checked_classes(classes: list[int] | None, names: list[str]) -> list[int] | None:
    if classes is None:
        return None
    unknown = [c for c in classes if not 0 <= c < len(names)]
    if unknown or not classes:
        raise UserError(f"classes={classes}: choose from the class numbers 0 to {len(names) - 1}.")
    if len(set(classes)) < len(classes):
        raise UserError(f"classes={classes} names a class twice.")
    return list(classes)


def _checked_limit(limit: int | dict[str, int] | None, num_classes: int) -> dict[str, int]:
    if limit is None:
        return {}
    limits = dict.fromkeys(SPLITS, limit) if isinstance(limit, int) else dict(limit)
    for split, number in limits.items():
        if split not in SPLITS:
            raise UserError(f"limit has no split {split!r}: choose from {', '.join(SPLITS)}.")
        if number < num_classes:
            raise UserError(
                f"limit={number} for {split} is below the number of classes, {num_classes}: "
                "give at least one image per class."
            )
    return {str(split): number for split, number in limits.items()}


def check_labels(labels: Rows, num_classes: int, name: str) -> None:
    """Check that there are labels and that they are class numbers.

    Raises:
        UserError: If there are none, or one lies outside 0…num_classes-1.
    """
    if not len(labels):
        raise UserError(f"{name} is empty: it needs at least one image.")
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise UserError(
            f"{name} has {len(wrong)} labels outside 0 to {num_classes - 1}, the first at image {wrong[0]}: "
            f"{labels[wrong[0]]}."
        )


def _check_images(source: TensorSource, name: str) -> None:
    if len(source.images) != len(source.labels):
        raise UserError(f"{name} has {len(source.images)} images and {len(source.labels)} labels.")
    if source.images.is_floating_point():
        low, high = (float(bound) for bound in torch.aminmax(source.images))
        if isnan(low) or isnan(high):
            raise UserError(f"{name} has pixels that are NaN: mend or remove those images.")
        if low < 0 or high > 1:
            raise UserError(
                f"{name} has pixels from {low:.4g} to {high:.4g}, outside [0, 1]: scale float images to [0, 1] without "
                "normalisation (the model normalises), or give uint8."
            )

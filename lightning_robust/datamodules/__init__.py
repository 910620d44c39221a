"""Data modules: labelled images for a Trainer, exact on any number of devices, or for use alone.

Each is an :class:`ImageDataModule` and takes its settings::

    lightning-robust fit --data CIFAR10 --data.root data --data.batch_size 256 --data.augmentation crop_flip

    >>> from lightning_robust.datamodules import Digits
    >>> data = Digits(classes=[3, 8], limit=100)
    >>> data.class_names, data.image_shape, len(data.dataset("test"))
    (['3', '8'], (1, 8, 8), 72)
"""

from lightning_robust.datamodules.arrays import Arrays
from lightning_robust.datamodules.augmentation import AUGMENTATIONS, Augmentation
from lightning_robust.datamodules.base import ImageDataModule, Split
from lightning_robust.datamodules.cats_dogs import CatsDogs
from lightning_robust.datamodules.cifar import CIFAR10, CIFAR100
from lightning_robust.datamodules.coco import COCOIC
from lightning_robust.datamodules.coco_build import build_coco_ic
from lightning_robust.datamodules.coco_rules import CocoRules, CocoSplit
from lightning_robust.datamodules.dataset import FileSource, ImageDataset, ImageSource, MaskedSource, TensorSource
from lightning_robust.datamodules.digits import Digits
from lightning_robust.datamodules.gtsrb import GTSRBIC
from lightning_robust.datamodules.image_folder import ImageFolder
from lightning_robust.datamodules.malaria import Malaria
from lightning_robust.datamodules.masked_folder import MaskedImageFolder
from lightning_robust.datamodules.masks import MaskedFileSource, MaskedTensorSource
from lightning_robust.datamodules.mnist import MNIST, FashionMNIST
from lightning_robust.datamodules.sampler import EpochLoader, EpochSampler, UnpaddedSampler

__all__ = [
    "AUGMENTATIONS",
    "CIFAR10",
    "CIFAR100",
    "COCOIC",
    "GTSRBIC",
    "MNIST",
    "Arrays",
    "Augmentation",
    "CatsDogs",
    "CocoRules",
    "CocoSplit",
    "Digits",
    "EpochLoader",
    "EpochSampler",
    "FashionMNIST",
    "FileSource",
    "ImageDataModule",
    "ImageDataset",
    "ImageFolder",
    "ImageSource",
    "Malaria",
    "MaskedFileSource",
    "MaskedImageFolder",
    "MaskedSource",
    "MaskedTensorSource",
    "Split",
    "TensorSource",
    "UnpaddedSampler",
    "build_coco_ic",
]

"""A small network, a few digits and a quiet trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_robust.datamodules import Digits
from lightning_robust.loggers import RunLogger
from lightning_robust.modules import ImageClassifier, OptimizerSettings


def _network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 10)
    )


@pytest.fixture(scope="session")
def weights() -> dict[str, Tensor]:
    """Of a network that classifies most digits, so that attacks fool some images and not others."""
    torch.manual_seed(0)
    network = _network()
    dataset = Digits().dataset("train")
    batch = dataset.__getitems__(range(len(dataset)))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(batch.images), batch.labels).backward()
        optimizer.step()
    return network.state_dict()


@pytest.fixture
def model(weights: dict[str, Tensor]) -> Callable[..., ImageClassifier]:
    """Make a module with those weights."""

    def make(**settings: Any) -> ImageClassifier:
        network = settings.pop("network", None)
        if network is None:
            network = _network()
            network.load_state_dict(weights)
        settings = {"optimizer": OptimizerSettings(lr=0.01), **settings}
        return ImageClassifier(network, num_classes=10, image_shape=(1, 8, 8), **settings)

    return make


@pytest.fixture
def digits() -> Callable[..., Digits]:
    """Make a data module of 48 training, 21 validation and 23 test images."""

    def make(**settings: Any) -> Digits:
        settings = {"limit": {"train": 48, "val": 21, "test": 23}, "val_size": 0.2, "batch_size": 24} | settings
        return Digits(**{"eval_batch_size": 10, **settings})

    return make


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    """Make a trainer on the CPU; ``logger=True`` gives it a run's folder below ``tmp_path / "runs"``."""

    def make(*callbacks: pl.Callback, devices: int = 1, logger: Any = False, **settings: Any) -> pl.Trainer:
        torch.set_num_threads(1)  # ranks are forked, which threads under way do not survive
        if logger is True:
            logger = RunLogger(str(tmp_path / "runs"), "run")
            logger.prepare()  # before ranks are forked
        saves = any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks)
        return pl.Trainer(
            **{
                "accelerator": "cpu",
                "devices": devices,
                "strategy": "ddp_fork" if devices > 1 else "auto",
                "max_epochs": 1,
                "num_sanity_val_steps": 0,
                "logger": logger,
                "callbacks": list(callbacks),
                "enable_checkpointing": saves,
                "enable_progress_bar": any(isinstance(callback, pl.callbacks.ProgressBar) for callback in callbacks),
                "enable_model_summary": False,
                "default_root_dir": tmp_path,
                **settings,
            }
        )

    return make

"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# The tests' tensors are tiny: several threads gain nothing, and spin against whatever else the machine runs. Set before
# torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)
# A shell starts background jobs with SIGINT ignored, and Python keeps it so; the tests of Ctrl-C raise it on purpose.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets that LIGHTNING_ROBUST_DATA names; skips where there is none."""
    folder = os.environ.get("LIGHTNING_ROBUST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("set LIGHTNING_ROBUST_DATA to a folder of real data sets to run this test")
    return Path(folder)


@pytest.fixture(autouse=True)
def _quiet_and_seeded(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts from one seed and keeps Weights & Biases' files out of the checkout."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wandb")
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(folder))
    monkeypatch.setenv("WANDB_MODE", "offline")

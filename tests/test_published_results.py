"""The results that the project's issues ask for, through the command line, on real data. Long: marked slow."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_robust.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.real_data, pytest.mark.timeout(3600)]


def results(tmp_path: Path, *words: str) -> dict[str, float]:
    main(
        [
            *words,
            "--run.root",
            str(tmp_path / "runs"),
            "--run.name",
            "run",
            "--run.version",
            "only",
            "--run.wandb",
            "off",
        ]
    )
    return json.loads((tmp_path / "runs" / "run" / "only" / "results.json").read_text())


@pytest.fixture
def cifar10_test(real_data: Path, tmp_path: Path) -> Path:
    images = np.asarray(Image.open(real_data / "cifar10" / "test_images.png")).reshape(-1, 32, 32, 3)
    path = tmp_path / "cifar10_test.npz"
    np.savez(path, images=images, labels=np.load(real_data / "cifar10" / "test_labels.npz")["labels"].astype(np.int64))
    return path


def test_the_public_resnet20_has_its_published_error_and_no_robustness(
    real_data: Path, cifar10_test: Path, tmp_path: Path
) -> None:
    (weights,) = (real_data / "weights" / "pytorch_resnet_cifar10").glob("resnet20*.th")
    words = ["test", "--config", "cifar10/evaluate", "--data", "Arrays", "--data.test", str(cifar10_test)]
    found = results(tmp_path, *words, "--model.weights", str(weights))
    assert found["test/acc"] == pytest.approx(1 - 0.0827, abs=0.001)  # the error that its repository reports
    assert found["test/robust_acc/pgd20"] < 0.001
    assert found["test/robust_acc/apgd20"] <= found["test/robust_acc/pgd20"]  # equal steps
    assert found["test/robust_acc/pgd20"] <= found["test/robust_acc/fgsm"]


def test_adversarial_training_on_fashion_mnist_withstands_what_its_natural_twin_does_not(
    real_data: Path, tmp_path: Path
) -> None:
    words = ["train", "--config", "fashion_mnist/at", "--data.root", str(real_data)]
    robust = results(tmp_path / "adversarial", *words)
    natural = results(tmp_path / "natural", *words, "--model.objective", "Natural")
    assert robust["test/robust_acc/pgd20"] >= 0.60
    assert natural["test/robust_acc/pgd20"] <= 0.10
    assert natural["test/acc"] > robust["test/acc"] > 0.80

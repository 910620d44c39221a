"""The neutralizer's study: a planted weakness found and blanked, exact on devices, tuned on validation images alone."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_robust.attacks import CW, FGSM, PGD
from lightning_robust.callbacks import NeutralizerStudy, RegionMaps
from lightning_robust.datamodules import Arrays, ImageFolder
from lightning_robust.defenses import Neutralizer
from lightning_robust.errors import UserError
from lightning_robust.modules import ImageClassifier, OptimizerSettings
from lightning_robust.regions import ActivationMap, Threshold, load_blobs

Make = Callable[..., Any]
SMALL = {
    "roi_thresholds": [Threshold("relative", 0.5)],
    "roa_thresholds": [Threshold("relative", 0.5)],
    "thetas": [0.5],
}


class Planted(nn.Module):
    """What tells the classes apart is in the lower half; the upper two rows are a trap that blanking closes.

    Two feature maps, global average pooling and a linear layer. The second map's sine is 0 at 0, 1/2 and 1: on clean
    and on blanked images nothing is seen there, and an attack sees nothing else.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = Channels()
        self.head = nn.Linear(2, 2)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[-1.0, -5.0], [1.0, 5.0]]))
            self.head.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images).mean((2, 3)))
        return logits


class Channels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        evidence, trap = torch.zeros_like(images), torch.zeros_like(images)
        evidence[:, :, 8:] = images[:, :, 8:] - 0.5
        trap[:, :, 0] = torch.sin(2 * math.pi * images[:, :, 0])
        trap[:, :, 1] = -torch.sin(2 * math.pi * images[:, :, 1])
        return torch.cat([evidence, trap], 1) * self.gain


@pytest.fixture
def data(tmp_path: Path) -> Make:
    """Noise in the lower half around two brightnesses; the rest is grey."""

    def make(**settings: Any) -> Arrays:
        rng = np.random.default_rng(0)
        files = {}
        for split, count in (("train", 40), ("val", 22), ("test", 25)):
            labels = np.arange(count) % 2
            images = np.full((count, 1, 16, 16), 0.5, dtype=np.float32)
            images[:, 0, 8:] += (0.25 * (2 * labels - 1))[:, None, None] + rng.uniform(-0.2, 0.2, (count, 8, 16))
            files[split] = str(tmp_path / f"{split}.npz")
            np.savez(
                files[split], images=images.astype(np.float32), labels=labels, classes=np.array(["dark", "bright"])
            )
        return Arrays(**{**files, "layout": "NCHW", "eval_batch_size": 10, **settings})

    return make


@pytest.fixture
def module() -> Make:
    def make(network: nn.Module | None = None) -> ImageClassifier:
        network = Planted() if network is None else network
        return ImageClassifier(network, 2, (1, 16, 16), optimizer=OptimizerSettings(lr=0.01))

    return make


def measured(run: Any) -> dict[str, float]:
    start = "test/neutralizer/"
    found = run.callback_metrics
    return {name.removeprefix(start): float(value) for name, value in found.items() if name.startswith(start)}


def test_a_planted_weakness_is_found_and_blanked(
    trainer: Make, module: Make, data: Make, tmp_path: Path, capsys: Any
) -> None:
    study = NeutralizerStudy({"fgsm": FGSM(eps=0.1)}, adaptive_steps=5, build_images=None, tune_images=None)
    run = trainer(study, logger=True)
    run.test(module(), data(), verbose=False)
    found = measured(run)
    for key in ("dark_to_bright", "bright_to_dark"):
        assert found[f"clean/{key}"] == 1
        assert found[f"fgsm/{key}/adv"] == 0
        assert found[f"fgsm/{key}/leak"] == 0  # the blob does not say what class it is of
        for case in ("known", "pair", "predicted"):
            assert found[f"fgsm/{key}/{case}/mod"] == 1
            assert found[f"fgsm/{key}/{case}/write"] == 0  # who may write into the blob is not kept out
        for case in ("known", "pair"):
            assert found[f"fgsm/{key}/{case}/held"] == 1  # the clean score is back
            assert found[f"fgsm/{key}/{case}/adaptive"] == 1
    folder = tmp_path / "runs" / "run" / "version_0"
    blobs = load_blobs(folder / "tables" / "neutralizer_fgsm_blobs_test.npz")
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[:2] = True
    assert torch.equal(blobs.masks, expected.expand(2, -1, -1))
    assert blobs.class_names == ("dark", "bright")
    assert Neutralizer(module(), blobs=folder / "tables" / "neutralizer_fgsm_blobs_test.npz").class_names
    with (folder / "tables" / "neutralizer_test.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["direction"], row["blob_of"]) for row in rows] == [
        (direction, case) for direction in ("dark → bright", "bright → dark") for case in ("known", "predicted", "pair")
    ]
    assert float(rows[0]["held"]) == 1
    assert 0.5 < float(rows[0]["held_low"]) < 1 == float(rows[0]["held_high"])
    with (folder / "tables" / "neutralizer_tuning_test.csv").open() as file:
        tried = list(csv.DictReader(file))
    assert {row["images"] for row in tried} == {"11"}  # of the validation images
    assert sum(row["chosen"] == "True" for row in tried) == 2
    for name in ("neutralizer_test", "neutralizer_fgsm_blobs_test"):
        assert (folder / "figures" / f"{name}.png").is_file()
    said = capsys.readouterr().out
    assert "Table II" in said
    assert "Table III" in said
    assert "Tuned on validation images" in said


def test_the_same_on_any_number_of_devices_and_batch_size(
    trainer: Make, module: Make, data: Make, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2))
    attacks = {"fgsm": FGSM(eps=0.05), "pgd": PGD(eps=0.05, steps=3)}
    weights = fitted(network, data())
    found, blobs = [], []
    for version, (devices, size) in enumerate(((1, 30), (1, 4), (2, 6))):
        network.load_state_dict(weights)
        study = NeutralizerStudy(attacks, adaptive_steps=3, build_images=30, tune_images=14)
        run = trainer(study, devices=devices, precision="64-true", logger=True)
        run.test(module(network), data(eval_batch_size=size), verbose=False)
        found.append(measured(run))
        folder = tmp_path / "runs" / "run" / f"version_{version}" / "tables"
        blobs.append([load_blobs(folder / f"neutralizer_{name}_blobs_test.npz") for name in attacks])
    assert found[1] == found[0]
    assert found[2] == found[0]
    for other in blobs[1:]:
        for mine, first in zip(other, blobs[0], strict=True):
            assert torch.equal(mine.masks, first.masks)
            assert torch.equal(mine.fill, first.fill)


def fitted(network: nn.Module, arrays: Arrays) -> dict[str, Tensor]:
    dataset = arrays.dataset("train")
    batch = dataset.__getitems__(range(len(dataset)))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(batch.images), batch.labels).backward()
        optimizer.step()
    return {name: value.clone() for name, value in network.state_dict().items()}


def test_a_class_without_validation_images_is_refused_before_anything_runs(
    trainer: Make, module: Make, data: Make, tmp_path: Path
) -> None:
    data()
    with np.load(tmp_path / "val.npz") as file:
        arrays = dict(file)
    dark = arrays["labels"] == 0
    np.savez(
        tmp_path / "dark.npz", images=arrays["images"][dark], labels=arrays["labels"][dark], classes=arrays["classes"]
    )
    network = Planted()
    passes: list[int] = []
    network.register_forward_hook(lambda *given: passes.append(1))
    with pytest.raises(UserError, match="validation images taken there is none of the source class of bright → dark"):
        trainer(NeutralizerStudy({"fgsm": FGSM(eps=0.1)}, **SMALL)).test(
            module(network), data(val=str(tmp_path / "dark.npz")), verbose=False
        )
    assert not passes


def test_the_papers_numbers_stand_beside_its_attack_alone(
    trainer: Make, module: Make, data: Make, tmp_path: Path
) -> None:
    attacks = {"fgsm": FGSM(eps=0.1), "steps": FGSM(eps=0.1, steps=2), "pgd": PGD(eps=0.1, steps=2)}
    study = NeutralizerStudy(attacks, adaptive_steps=0, published="malaria", **SMALL)
    trainer(study, RegionMaps(attacks, published="mnist01", permutations=9, examples=0), logger=True).test(
        module(), data(), verbose=False
    )
    folder = tmp_path / "runs" / "run" / "version_0" / "tables"
    for name, column, told in (("neutralizer", "paper_mod_adv", 0.4611), ("regions", "paper_ssim", 0.2178)):
        with (folder / f"{name}_test.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert {row["attack"] for row in rows if row[column]} == {"fgsm"}
        assert float(rows[0][column]) == told


def test_test_images_have_no_say_in_the_tuning(trainer: Make, module: Make, data: Make, tmp_path: Path) -> None:
    found = []
    for version, limit in enumerate((None, {"test": 4})):
        study = NeutralizerStudy({"fgsm": FGSM(eps=0.1)}, adaptive_steps=0)
        trainer(study, logger=True).test(module(), data(limit=limit), verbose=False)
        folder = tmp_path / "runs" / "run" / f"version_{version}" / "tables"
        found.append((folder / "neutralizer_tuning_test.csv").read_text())
    assert found[0] == found[1]


def test_the_criterion(trainer: Make, module: Make, data: Make, tmp_path: Path) -> None:
    """Of all that was tried, the best under attack among those that keep the clean score."""
    study = NeutralizerStudy(
        {"fgsm": FGSM(eps=0.1)},
        roi_thresholds=[Threshold("relative", 0.5), Threshold("quantile", 0.99)],
        roa_thresholds=[Threshold("relative", 0.5)],
        thetas=[0.05, 0.5, 1.0],
        adaptive_steps=0,
    )
    trainer(study, logger=True).test(module(), data(), verbose=False)
    with (tmp_path / "runs" / "run" / "version_0" / "tables" / "neutralizer_tuning_test.csv").open() as file:
        rows = list(csv.DictReader(file))
    for direction in ("dark → bright", "bright → dark"):
        mine = [row for row in rows if row["direction"] == direction]
        keeping = [row for row in mine if row["keeps_clean"] == "True"]
        (chosen,) = [row for row in mine if row["chosen"] == "True"]
        assert 0 < len(keeping) < len(mine)  # a blob over the lower half costs everything
        assert chosen in keeping
        best = max(float(row["mod_adv"]) for row in keeping)
        assert float(chosen["mod_adv"]) == best
        smallest = min(float(row["blob_share"]) for row in keeping if float(row["mod_adv"]) == best)
        assert float(chosen["blob_share"]) == smallest


def test_where_no_blob_keeps_the_clean_score_it_says_so(trainer: Make, module: Make, data: Make) -> None:
    study = NeutralizerStudy(
        {"fgsm": FGSM(eps=0.1)},
        roi_thresholds=[Threshold("quantile", 0.999)],
        roa_thresholds=[Threshold("relative", 0.1)],
        thetas=[0.05],
        fills=[1],
        adaptive_steps=0,
    )
    with pytest.warns(UserWarning, match="every blob costs more than 2% of the clean score"):
        trainer(study).test(module(), data(), verbose=False)


def test_a_blob_that_says_its_class_is_seen_to_leak(trainer: Make, module: Make, data: Make) -> None:
    """White over the lower half makes any image a bright one: the score is kept, and worth nothing."""
    study = NeutralizerStudy(
        {"fgsm": FGSM(eps=0.1)},
        roi_thresholds=[Threshold("quantile", 0.999)],
        roa_thresholds=[Threshold("relative", 0.1)],
        thetas=[0.05],
        adaptive_steps=5,
    )
    run = trainer(study)
    run.test(module(), data(), verbose=False)
    found = measured(run)
    assert (found["fgsm/dark_to_bright/fill"], found["fgsm/bright_to_dark/fill"]) == (0, 1)
    for key in ("dark_to_bright", "bright_to_dark"):
        assert found[f"fgsm/{key}/known/adaptive"] == 1
        assert found[f"fgsm/{key}/leak"] == 1


def test_it_measures_in_test_alone(trainer: Make, module: Make, data: Make) -> None:
    run = trainer(NeutralizerStudy({"fgsm": FGSM(eps=0.1)}, **SMALL))
    with pytest.warns(UserWarning, match="measures in test alone"):
        run.validate(module(), data(), verbose=False)
    assert not any("neutralizer" in name for name in run.callback_metrics)


def test_bad_input(trainer: Make, module: Make, data: Make, tmp_path: Path) -> None:
    for settings, message in (
        ({"attacks": {}}, "at least one attack"),
        ({"thetas": [0]}, r"thetas=\[0\]"),
        ({"fills": [2]}, r"fills=\[2\]: 0 \(black\), 1 \(white\) or both"),
        ({"roi_thresholds": []}, "at least one of roi_thresholds"),
        ({"tolerance": -1}, "tolerance is a share"),
        ({"tune_reading": "hold"}, "choose write, held or adaptive"),
        ({"build_images": 0}, "build_images=0"),
        ({"attacks": {"cw": CW()}}, "give the attack an eps"),
        ({"published": "mnist"}, "the paper has tables of"),
        ({"limit_images": 0}, "limit_images=0"),
    ):
        with pytest.raises(UserError, match=message):
            NeutralizerStudy(**settings)
    assert NeutralizerStudy({"cw": CW()}, adaptive_steps=0).adaptive_steps == 0
    empty = NeutralizerStudy({"fgsm": FGSM(eps=0.1)}, roa_thresholds=[Threshold("absolute", 0.5)])
    with pytest.raises(UserError, match=r"no threshold leaves a blob: of 15 choices .* 15 give an empty one"):
        trainer(empty).test(module(), data(), verbose=False)
    with pytest.raises(UserError, match="has all three"):
        trainer(NeutralizerStudy(**SMALL)).test(module(), data(val_size=0, val=None, train=None), verbose=False)
    wrong = Planted()
    with torch.no_grad():
        wrong.head.bias[0] = 100.0
    with pytest.raises(UserError, match="of bright → dark no training image is classified rightly"):
        trainer(NeutralizerStudy(**SMALL)).test(module(wrong), data(), verbose=False)
    with pytest.raises(UserError, match="no such layer"):
        trainer(NeutralizerStudy(activation=ActivationMap(layer="x"), **SMALL)).test(module(), data(), verbose=False)
    with pytest.raises(UserError, match="two of them log under the name"):
        trainer(NeutralizerStudy(**SMALL), NeutralizerStudy(**SMALL)).test(module(), data(), verbose=False)


def test_validation_images_that_are_the_test_images_are_refused(trainer: Make, module: Make, tmp_path: Path) -> None:
    from PIL import Image

    for split in ("train", "val"):
        for name in ("a", "b"):
            folder = tmp_path / "folder" / split / name
            folder.mkdir(parents=True)
            for number in range(2):
                Image.fromarray(np.full((16, 16), 40 * number, dtype=np.uint8)).save(folder / f"{number}.png")
    with (
        pytest.warns(UserWarning, match="are the test images too"),
        pytest.raises(UserError, match="nothing may be tuned on these"),
    ):
        trainer(NeutralizerStudy(**SMALL)).test(
            module(), ImageFolder(root=str(tmp_path / "folder"), channels=1, num_workers=0), verbose=False
        )

"""Masked PGD: equal to an experiment by hand, on any number of devices, with a map of its own or of a file."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lightning_robust.attacks import PGD
from lightning_robust.attacks.randomness import image_keys, mix_seed, uniform
from lightning_robust.callbacks import AttackProgress, InputGradientMap, MaskedPGD
from lightning_robust.callbacks.pixel_map import load_map
from lightning_robust.errors import UserError

Make = Callable[..., Any]
ATTACK = PGD(eps=0.2, steps=5)
FEW = [0.125, 0.25, 0.5]


def measured(run: Any, name: str = "masked_pgd", stage: str = "test") -> dict[str, float]:
    start = f"{stage}/{name}/"
    return {
        name.removeprefix(start): float(value) for name, value in run.callback_metrics.items() if name.startswith(start)
    }


def map_by_hand(module: Any, dataset: Any) -> np.ndarray:
    maps = []
    for index in range(len(dataset)):
        image, label = dataset[index]
        image = image[None].double().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(module(image), torch.tensor([label])), image)
        maps.append(gradient[0].abs().mean(0).numpy())
    return np.mean(maps, axis=0)


def first(order: np.ndarray, share: float) -> np.ndarray:
    """The pixels that come first in an order, largest value first."""
    mask = np.zeros(order.size, bool)
    mask[np.argsort(-order.ravel(), kind="stable")[: round(share * order.size)]] = True
    return mask.reshape(order.shape)


def by_hand(module: Any, dataset: Any, count: int, within: bool = False) -> dict[str, float]:
    """Image by image; the map is of all images, and ``count`` of them are attacked."""
    module = module.double().eval()
    values = map_by_hand(module, dataset)
    right: dict[str, list[bool]] = {}
    for index in range(count):
        image, label = dataset[index]
        image, labels = image[None].double(), torch.tensor([label])
        clean = int(module(image).argmax()) == label
        adversarial = ATTACK.replace(stop_at_success=False)(module, image, labels)
        drawn = uniform(image_keys(image, mix_seed(0)), torch.Size((1, 8, 8)), torch.float64)[0].numpy()
        cases = {"clean": image, "attacked": adversarial}
        for kind, order in {"top": values, "bottom": -values, "random": drawn}.items():
            for share in FEW:
                mask = torch.from_numpy(first(order, share))
                cases[f"{kind}/p={100 * share:g}"] = mask * adversarial + ~mask * image
                if within:
                    cases[f"{kind}_within/p={100 * share:g}"] = ATTACK(module, image, labels, mask=mask)
        for name, case in cases.items():
            right.setdefault(name, []).append(clean and int(module(case).argmax()) == label)
    return {name: float(np.mean(values)) for name, values in right.items()}


@pytest.mark.parametrize("within", [False, True])
def test_equals_an_experiment_by_hand(
    model: Make, trainer: Make, digits: Make, tmp_path: Path, capsys: Any, within: bool
) -> None:
    callback = MaskedPGD(ATTACK, FEW, attack_within_mask=within, limit_images=17)
    run = trainer(callback, logger=True, precision="64-true")
    run.test(model(), digits(), verbose=False)
    found, wanted = measured(run), by_hand(model(), digits().dataset("test"), 17, within)
    held = np.mean([wanted[f"bottom/p={100 * share:g}"] >= wanted[f"top/p={100 * share:g}"] for share in FEW])
    assert found.pop("bottom_at_least_top") == held == 1
    if within:
        found.pop("bottom_at_least_top_within")
        # what may only change the mask makes more of it than a cut of what was made for all pixels
        assert sum(found[f"top_within/p={p}"] for p in (12.5, 25, 50)) < sum(
            found[f"top/p={p}"] for p in (12.5, 25, 50)
        )
    assert found == pytest.approx(wanted)
    assert found["attacked"] < found["top/p=50"] < found["bottom/p=50"] < found["clean"]
    folder = tmp_path / "runs" / "run" / "version_0"
    with (folder / "tables" / "masked_pgd_test.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(float(row["p"]), int(row["pixels"])) for row in rows] == [(12.5, 8), (25, 16), (50, 32)]
    assert [float(row["random"]) for row in rows] == [found[f"random/p={100 * share:g}"] for share in FEW]
    assert [row["bottom_at_least_top"] for row in rows] == ["True"] * 3
    assert (folder / "figures" / "masked_pgd_test.png").is_file()
    written = np.load(folder / "tables" / "masked_pgd_map_test.npy")
    np.testing.assert_allclose(written, map_by_hand(model().double().eval(), digits().dataset("test")), atol=1e-12)
    assert "bottom ≥ top" in capsys.readouterr().out


@pytest.mark.parametrize("function", ["test", "validate"])
def test_the_same_on_any_number_of_devices_and_batch_size(
    model: Make, trainer: Make, digits: Make, function: str
) -> None:
    found = []
    for devices, size in ((1, 23), (1, 5), (2, 4)):
        callback = MaskedPGD(ATTACK, FEW, attack_within_mask=True, limit_images=11)
        run = trainer(callback, devices=devices, precision="64-true")
        getattr(run, function)(model(), digits(eval_batch_size=size), verbose=False)
        found.append(measured(run, stage="val" if function == "validate" else "test"))
    assert 0 < found[0]["top/p=25"] < 1
    assert found[1] == found[0]
    assert found[2] == found[0]


def test_fewer_images_than_devices(model: Make, trainer: Make, digits: Make) -> None:
    """One image is attacked: the other rank has none, but its images count for the map."""
    found = []
    for devices in (1, 2):
        run = trainer(MaskedPGD(ATTACK, [0.5], limit_images=1), devices=devices, precision="64-true")
        run.test(model(), digits(), verbose=False)
        found.append(measured(run))
    assert found[1] == found[0]


def test_map_of_a_file_is_that_of_input_gradient_map(model: Make, trainer: Make, digits: Make, tmp_path: Path) -> None:
    run = trainer(InputGradientMap(), MaskedPGD(ATTACK, FEW), logger=True, precision="64-true")
    run.test(model(), digits(), verbose=False)
    folder = tmp_path / "runs" / "run" / "version_0" / "tables"
    file = folder / "input_gradient_test.npy"
    np.testing.assert_array_equal(np.load(folder / "masked_pgd_map_test.npy"), np.load(file))
    again = trainer(MaskedPGD(ATTACK, FEW, map=str(file)), precision="64-true")
    again.test(model(), digits(), verbose=False)
    assert measured(again) == measured(run)
    # another map is really used
    other = tmp_path / "other.npy"
    np.save(other, -np.load(file))
    turned = trainer(MaskedPGD(ATTACK, FEW, map=str(other)), precision="64-true")
    turned.test(model(), digits(), verbose=False)
    assert measured(turned)["top/p=25"] == measured(run)["bottom/p=25"]
    assert measured(turned)["bottom_at_least_top"] == 0


def test_the_map_respects_limit_test_batches_and_workers(
    model: Make, trainer: Make, digits: Make, tmp_path: Path
) -> None:
    """The loader's own workers persist and have begun to read: the map must not take batches from them."""
    data = digits(eval_batch_size=4, num_workers=1)
    run = trainer(MaskedPGD(ATTACK, FEW), logger=True, precision="64-true", limit_test_batches=3)
    run.test(model(), data, verbose=False)
    firsts = torch.utils.data.Subset(digits().dataset("test"), range(12))
    written = np.load(tmp_path / "runs" / "run" / "version_0" / "tables" / "masked_pgd_map_test.npy")
    np.testing.assert_allclose(written, map_by_hand(model().double().eval(), firsts), atol=1e-12)
    found = measured(run)
    del found["bottom_at_least_top"]
    assert found == pytest.approx(by_hand(model(), firsts, 12))


def test_progress(model: Make, trainer: Make, digits: Make) -> None:
    bar = AttackProgress()
    seen: list[str] = []
    bar.refresh = lambda hard=False: seen.extend(task.description for task in bar.progress.tasks if task.visible)
    trainer(bar, MaskedPGD(PGD(eps=0.2, steps=3), [0.5]), enable_progress_bar=True).test(
        model(), digits(), verbose=False
    )
    assert any("Mean |∇x| map" in text for text in seen)
    assert any("masked_pgd all pixels 3/3" in text for text in seen)
    assert "·" not in seen[-1]


def test_bad_input(model: Make, trainer: Make, digits: Make, tmp_path: Path) -> None:
    for settings, message in (
        ({"shares": [10, 20]}, "did you mean 0.1"),
        ({"shares": [0.0]}, "between 0 and 1"),
        ({"shares": []}, "between 0 and 1"),
        ({"acceleration": "fast"}, "choose exact, bf16 or none"),
        ({"limit_images": 0}, "limit_images=0"),
        ({"name": ""}, "cannot be a name"),
    ):
        with pytest.raises(UserError, match=message):
            MaskedPGD(**settings)
    np.save(tmp_path / "small.npy", np.ones((4, 4)))
    np.save(tmp_path / "nan.npy", np.full((8, 8), np.nan))
    (tmp_path / "text.npy").write_text("no array")
    for file, message in (
        ("small.npy", r"shape \(4, 4\), and the images have 8×8"),
        ("nan.npy", "NaN or infinity"),
        ("text.npy", "cannot be read"),
        ("none.npy", "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            trainer(MaskedPGD(map=str(tmp_path / file))).test(model(), digits(), verbose=False)
        with pytest.raises(UserError, match=message):
            load_map(tmp_path / file, (8, 8))
    with pytest.raises(UserError, match="two of them log under the name 'masked_pgd'"):
        trainer(MaskedPGD(), MaskedPGD()).test(model(), digits(), verbose=False)

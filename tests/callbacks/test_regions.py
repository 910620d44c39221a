"""Region maps: equal to what is computed by hand, on any number of devices and batch sizes, in fit and in test."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust.attacks import FGSM, PGD
from lightning_robust.callbacks import RegionMaps
from lightning_robust.callbacks.regions_directions import directions, rounds
from lightning_robust.errors import UserError
from lightning_robust.metrics import map_similarity
from lightning_robust.regions import ActivationMap, Threshold, importance, isolate, pixel_change, unit_scale

Make = Callable[..., Any]
ATTACKS = {"fgsm": FGSM(eps=0.2), "pgd": PGD(eps=0.2, steps=3)}
HIRES = ActivationMap(method="hires_cam")


def measured(run: Any, stage: str = "test") -> dict[str, float]:
    start = f"{stage}/regions/"
    found = run.callback_metrics
    return {name.removeprefix(start): float(value) for name, value in found.items() if name.startswith(start)}


def tables(tmp_path: Path, name: str, version: int = 0) -> np.ndarray:
    return np.load(tmp_path / "runs" / "run" / f"version_{version}" / "tables" / f"{name}.npy")


def test_equals_an_experiment_by_hand(model: Make, trainer: Make, digits: Make, tmp_path: Path, capsys: Any) -> None:
    callback = RegionMaps(ATTACKS, HIRES, roi_threshold=Threshold("relative", 0.5), permutations=19)
    run = trainer(callback, logger=True, precision="64-true")
    run.test(model(), digits(), verbose=False)
    found = measured(run)
    module, dataset = model().double().eval(), digits().dataset("test")
    activation = None
    kept: dict[int, list[Any]] = {}
    for index in range(len(dataset)):
        image, label = dataset[index]
        images, labels = image[None].double(), torch.tensor([label])
        activation = activation or HIRES.resolved(module, images)
        if int(module(images).argmax()) != label:
            continue
        looked = importance(module, images, labels, activation)
        change = pixel_change(images, ATTACKS["fgsm"].to_the_end()(module, images, labels))
        regions = isolate(Threshold("relative", 0.5).region(looked), Threshold("relative", 0.5).region(change))
        kept.setdefault(label, []).append((looked, change, regions, map_similarity(looked, unit_scale(change))))
    folder = tmp_path / "runs" / "run" / "version_0"
    means, changes = tables(tmp_path, "regions_importance_test"), tables(tmp_path, "regions_fgsm_change_test")
    for label, values in kept.items():
        start = f"fgsm/{label}/"
        looked, change, regions, ssim = (torch.cat(part) for part in zip(*values, strict=True))
        assert found[f"{start}images"] == len(values)
        assert found[f"{start}ssim"] == pytest.approx(float(ssim.mean()), abs=1e-10)
        for number, name in enumerate(("share_uv", "share_u_only", "share_v_only", "share_neither")):
            assert found[start + name] == pytest.approx(float((regions == number).double().mean()))
        np.testing.assert_allclose(means[label], looked.mean(0), atol=1e-12)
        np.testing.assert_allclose(changes[label], change.mean(0), atol=1e-12)
        of_means = map_similarity(unit_scale(looked.mean(0))[None], unit_scale(change.mean(0))[None])
        assert found[f"{start}ssim_representatives"] == pytest.approx(float(of_means), abs=1e-10)
        written = tables(tmp_path, "regions_fgsm_regions_test")[label]
        expected = isolate(Threshold().region(looked.mean(0)), Threshold().region(change.mean(0)))
        np.testing.assert_array_equal(written, expected)
    with (folder / "tables" / "regions_test.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 10
    assert {"moran_importance_p", "components_change", "ssim_low", "mean_moran_cross"} <= rows[0].keys()
    for name in ATTACKS:
        for kind in ("examples", "representatives"):
            assert (folder / "figures" / f"regions_{name}_{kind}_test.png").is_file()
    assert "SSIM, mean of samples" in capsys.readouterr().out


def test_the_same_on_any_number_of_devices_and_batch_size(
    model: Make, trainer: Make, digits: Make, tmp_path: Path
) -> None:
    found, arrays = [], []
    for version, (devices, size) in enumerate(((1, 23), (1, 5), (2, 4))):
        callback = RegionMaps(ATTACKS, HIRES, permutations=9, examples=0)
        run = trainer(callback, devices=devices, precision="64-true", logger=True)
        run.test(model(), digits(eval_batch_size=size), verbose=False)
        found.append(measured(run))
        names = ("regions_importance_test", "regions_fgsm_change_test", "regions_pgd_regions_test")
        arrays.append([tables(tmp_path, name, version) for name in names])
    assert len(found[0]) > 50
    for other, maps in zip(found[1:], arrays[1:], strict=True):
        assert other == pytest.approx(found[0], rel=1e-10, abs=1e-12)
        for array, expected in zip(maps, arrays[0], strict=True):
            np.testing.assert_allclose(array, expected, rtol=1e-10, atol=1e-12)


def test_directions_of_two_classes(trainer: Make, model: Make, digits: Make) -> None:
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(256, 2)
    )
    module = model(network=network)
    module.num_classes = 2
    run = trainer(RegionMaps({"fgsm": FGSM(eps=0.2)}, permutations=9, examples=0))
    run.test(module, digits(classes=[3, 8], limit=None), verbose=False)
    assert {name.split("/")[1] for name in measured(run)} == {"3_to_8", "8_to_3"}


def test_pairs_are_attacked_towards_their_target(model: Make, trainer: Make, digits: Make, tmp_path: Path) -> None:
    """Two pairs of one source are two attacks, each held to its own target."""
    pairs = [[3, 5], [3, 8], [4, 5]]
    run = trainer(RegionMaps({"fgsm": ATTACKS["fgsm"]}, pairs=pairs, examples=0, permutations=9), logger=True)
    run.test(model(), digits(), verbose=False)
    found = measured(run)
    assert {name.split("/")[1] for name in found} == {"3_to_5", "3_to_8", "4_to_5"}
    module, dataset = model().eval(), digits().dataset("test")
    changes = []
    for index in range(len(dataset)):
        image, label = dataset[index]
        if label == 3 and int(module(image[None]).argmax()) == 3:
            labels, targets = torch.tensor([3]), torch.tensor([8])
            adversarial = ATTACKS["fgsm"].to_the_end()(module, image[None], labels, targets=targets)
            changes.append(pixel_change(image[None], adversarial))
    written = tables(tmp_path, "regions_fgsm_change_test")
    np.testing.assert_allclose(written[1], torch.cat(changes).double().mean(0), atol=1e-6)
    assert not np.allclose(written[0], written[1])


def test_an_attack_that_masks_hold_has_its_region_inside(
    model: Make, trainer: Make, digits: Make, tmp_path: Path
) -> None:
    dataset = digits().dataset("test")
    batch = dataset.__getitems__(range(len(dataset)))
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:5, 1:7] = True
    masks = mask.expand(len(dataset), 1, 8, 8)
    loader = DataLoader(TensorDataset(batch.images, batch.labels, masks), 8)
    for held in (True, False):
        module = model()
        module.attack_pixels = "foreground" if held else "image"
        run = trainer(RegionMaps({"pgd": ATTACKS["pgd"]}, HIRES, examples=0, permutations=9), logger=True)
        run.test(module, loader, verbose=False)
        changed = np.nansum(tables(tmp_path, "regions_pgd_change_test", 0 if held else 1), axis=0)
        assert (changed[~mask.numpy()] == 0).all() == held
        regions = tables(tmp_path, "regions_pgd_regions_test", 0 if held else 1)
        attacked = ((regions == 0) | (regions == 2)).any(0)
        assert attacked.any()
        assert (attacked <= mask.numpy()).all() == held


def test_in_fit_every_n_epochs(model: Make, trainer: Make, digits: Make, tmp_path: Path) -> None:
    callback = RegionMaps({"fgsm": ATTACKS["fgsm"]}, every_n_epochs=2, permutations=9, examples=1)
    run = trainer(callback, max_epochs=4, logger=True)
    run.fit(model(), digits())
    figures = sorted(path.name for path in (tmp_path / "runs" / "run" / "version_0" / "figures").iterdir())
    assert figures == [
        f"regions_fgsm_{kind}_val_epoch{epoch:03d}.png" for kind in ("examples", "representatives") for epoch in (1, 3)
    ]


def test_unions_are_larger(model: Make, trainer: Make, digits: Make, tmp_path: Path) -> None:
    found = []
    for version, union in enumerate((False, True)):
        run = trainer(RegionMaps({"pgd": ATTACKS["pgd"]}, HIRES, union=union, examples=0, permutations=9), logger=True)
        run.test(model(), digits(), verbose=False)
        found.append(tables(tmp_path, "regions_pgd_regions_test", version))
    assert ((found[1] == 0) | (found[1] == 1)).sum() > ((found[0] == 0) | (found[0] == 1)).sum()


def test_memory_does_not_grow_with_the_images(model: Make, trainer: Make, digits: Make) -> None:
    sizes = []
    for limit in (40, 300):
        callback = RegionMaps({"fgsm": ATTACKS["fgsm"]}, permutations=9, examples=2)
        run = trainer(callback)
        run.test(model(), digits(limit={"train": 48, "val": 21, "test": limit}, eval_batch_size=20), verbose=False)
        counted = callback._counted["fgsm"]
        metrics = [
            callback._importance,
            counted.change,
            counted.regions,
            counted.similarity,
            *counted.statistics.values(),
        ]
        states = sum(getattr(metric, name).numel() for metric in metrics for name in metric._defaults)
        sizes.append((states, sum(len(kept) for kept in counted.examples.values())))
    assert sizes[0] == sizes[1]


def test_a_class_without_a_rightly_classified_image_is_named(
    model: Make, trainer: Make, digits: Make, tmp_path: Path
) -> None:
    module = model()
    with torch.no_grad():
        module.network[4].bias[7] -= 100
    with pytest.warns(UserWarning, match="of 7 no image was classified rightly.*train the model further"):
        trainer(RegionMaps(permutations=9), logger=True).test(module, digits(), verbose=False)
    with (tmp_path / "runs" / "run" / "version_0" / "tables" / "regions_test.csv").open() as file:
        rows = {row["direction"]: row for row in csv.DictReader(file)}
    assert rows["7"]["images"] == "0"
    assert rows["7"]["ssim"] == "nan"
    assert int(rows["3"]["images"]) > 0
    with torch.no_grad():  # all are taken for a class that none of them is of
        module.network[4].weight.zero_()
        module.network[4].bias.copy_(torch.eye(10)[9])
    with pytest.raises(UserError, match="of 0 → 1, 1 → 0 no image was classified rightly"):
        trainer(RegionMaps(pairs=[[0, 1], [1, 0]])).test(module, digits(), verbose=False)


def test_flat_maps_are_told_with_the_mend(model: Make, trainer: Make, digits: Make) -> None:
    """Behind this network's last map are weights of each place: their means, which Grad-CAM goes by, are negative."""
    with pytest.warns(UserWarning, match=r"activation map of \d+% of the images is flat.*hires_cam"):
        trainer(RegionMaps({"fgsm": FGSM(eps=0.2)}, permutations=9)).test(model(), digits(), verbose=False)


def test_regions_that_thresholds_leave_empty_or_full_are_told(model: Make, trainer: Make, digits: Make) -> None:
    callback = RegionMaps(
        {"fgsm": FGSM(eps=0.2)},
        roa_threshold=Threshold("absolute", 0.5),
        representative_threshold=Threshold("absolute", 0.001),
        permutations=9,
    )
    with pytest.warns(UserWarning, match="every image's region of attack is empty: lower roa_threshold"):
        trainer(callback).test(model(), digits(), verbose=False)


def test_directions_and_rounds() -> None:
    found = directions(["T-shirt/top", "Pull over"])
    assert [(d.label, d.key) for d in found] == [
        ("T-shirt/top → Pull over", "T-shirt_top_to_Pull_over"),
        ("Pull over → T-shirt/top", "Pull_over_to_T-shirt_top"),
    ]
    assert rounds(found, 2)[0].target is None
    assert [d.label for d in directions(["a", "b", "c"])] == ["a", "b", "c"]
    parts = rounds(directions(["a", "b", "c"], [[0, 1], [0, 2], [2, 1]]), 3)
    labels = torch.tensor([0, 1, 2])
    assert [part.groups(labels).tolist() for part in parts] == [[0, -1, 2], [1, -1, -1]]
    targets = [part.targets(labels) for part in parts]
    assert targets[0] is not None
    assert (int(targets[0][0]), int(targets[0][2])) == (1, 1)


def test_bad_input(model: Make, trainer: Make, digits: Make) -> None:
    for settings, message in (
        ({"attacks": {}}, "at least one attack"),
        ({"attacks": {"a/b": FGSM()}}, "cannot be a name"),
        ({"permutations": 0}, "permutations is 1 or more"),
        ({"pairs": [[2]]}, "two class numbers"),
        ({"pairs": [1, 2]}, "two class numbers"),
        ({"pairs": [["a", "b"]]}, "two class numbers"),
        ({"pairs": [[2, 3], [2, 3]]}, "each once"),
        ({"pairs": []}, "at least one pair"),
        ({"pairs": [[2, 2]]}, r"the pair \[2, 2\] has one class as source and target"),
        ({"published": "imagenet"}, "the paper has tables of mnist01, fashion"),
        ({"every_n_epochs": -1}, "every_n_epochs=-1"),
    ):
        with pytest.raises(UserError, match=message):
            RegionMaps(**settings)
    for settings, message in (
        ({"pairs": [[2, 12]]}, "the classes are 0 to 9"),
        ({"activation": ActivationMap(layer="none")}, r"no such layer; these would do: network\.0 \(4×4\)"),
    ):
        with pytest.raises(UserError, match=message):
            trainer(RegionMaps(**settings)).test(model(), digits(), verbose=False)
    with pytest.raises(UserError, match="two of them log under the name 'regions'"):
        trainer(RegionMaps(), RegionMaps()).test(model(), digits(), verbose=False)

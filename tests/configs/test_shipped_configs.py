"""Every shipped config says how it is run, parses, and runs from data to the table on data that the test writes."""

from __future__ import annotations

import re
import shlex
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lightning_robust.cli import main
from lightning_robust.cli.configs import shipped
from lightning_robust.models import create_network

CONFIGS = shipped()
TRAINERS = [name for name in CONFIGS if name.startswith("trainer/")]
ATTACKS = [name for name in CONFIGS if name.startswith("attack/")]
STUDIES = [name for name in CONFIGS if name not in (*TRAINERS, *ATTACKS)]
TIME = re.compile(r"\b(seconds|minutes?|hours?|days)\b")


def comment(name: str) -> str:
    """The comment that opens a config."""
    lines = CONFIGS[name].read_text(encoding="utf-8").splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:end])


def commands(name: str) -> list[list[str]]:
    """The commands in it, as words after the program's name."""
    text = comment(name).replace("\\\n", " ")
    found = re.findall(r"(?:lightning-robust|-m lightning_robust) (\w+ --.*)", text)
    return [shlex.split(command, comments=True) for command in found]


@pytest.mark.parametrize("name", CONFIGS)
def test_begins_with_its_command(name: str) -> None:
    assert commands(name)
    assert all(name in words for words in commands(name))


@pytest.mark.parametrize("name", [*STUDIES, *ATTACKS])
def test_begins_with_time_and_result(name: str) -> None:
    first, *rest = comment(name).splitlines()
    assert TIME.search(first)
    assert re.search(r"[Ee]xpect|[Pp]ublish|reach|paper's|falls", " ".join(rest))


@pytest.mark.parametrize("name", CONFIGS)
def test_its_commands_parse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands(name):
        with pytest.raises(SystemExit) as ended:
            main([*words, "--print_config"])
        said = capsys.readouterr()
        assert not ended.value.code, said.err
        assert yaml.safe_load(said.out)["model"]["class_path"].endswith("Classifier")


def test_every_file_is_found() -> None:
    assert set(STUDIES) >= {"quickstart", "fashion_mnist/at", "cifar10/at", "cifar10/evaluate", "imagenet/evaluate"}
    assert set(TRAINERS) >= {"trainer/slurm", "trainer/torchrun", "trainer/multi_gpu"}


# -- data that the tests write -----------------------------------------------------------------------------------------


def write_idx(folder: Path, count: int) -> None:
    """MNIST's four files with random images."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split in ("train", "t10k"):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels.tobytes())


def write_arrays(path: Path, count: int, classes: int) -> None:
    """An .npz of random images; CIFAR's own files have checksums that no small file meets."""
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(count) % classes)


def write_folders(root: Path) -> None:
    """ImageNet's layout with five classes."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for wnid in ("n01440764", "n01443537", "n01484850", "n01491361", "n01494475"):
            folder = root / split / wnid
            folder.mkdir(parents=True)
            for number in range(2):
                pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.JPEG")


def write_masked_folders(root: Path) -> list[str]:
    """Images in two classes with masks of their middle, and what reads them in place of a config's data."""
    rng = np.random.default_rng(0)
    mask = np.zeros((36, 36), dtype=np.uint8)
    mask[8:28, 8:28] = 255
    for split in ("train", "test"):
        for name in ("round", "square"):
            for kind in ("images", "masks"):
                (root / kind / split / name).mkdir(parents=True)
            for number in range(4):
                pixels = rng.integers(0, 256, (36, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / "images" / split / name / f"{number}.png")
                Image.fromarray(mask).save(root / "masks" / split / name / f"{number}.png")
    data = ["--data", "MaskedImageFolder", "--data.root", str(root), "--data.num_workers", "0"]
    study = ["--trainer.callbacks.strong_images", "0", "--trainer.callbacks.radii", "[1]"]
    return [*data, "--data.image_size", "32", "--data.val_size", "2", "--model.network_args", "{width: 2}", *study]


SHORT = {
    "OnePixel": {"population": 4, "generations": 1},
    "JSMA": {"gamma": 0.002},
    "DeepFool": {"steps": 1},
    "CW": {"steps": 2, "binary_search_steps": 1},
    "PGD": {"steps": 1},
    "APGD": {"steps": 2},
    "Square": {"queries": 4},
    "OptMargin": {"steps": 2, "binary_search_steps": 1, "surrogates": 2},
    "RegionBased": {"votes": 2},
    "Randomization": {"resize_back": "true"},  # the small network takes images of one size
    "PixelDeflection": {"deflections": 2, "cam_classes": 1},
    "DistillationStudy": {"limit_images": 2, "max_features": 4, "pgd_steps": 1, "cw_steps": 1},
}


def short(name: str) -> list[str]:
    """What makes a study's attacks and defenses short, and its manipulator narrow."""
    given = yaml.safe_load(CONFIGS[name].read_text(encoding="utf-8"))
    words = ["--model.prm.width", "2"] if given["model"]["class_path"] == "PRMClassifier" else []

    def walk(node: dict, path: str) -> None:
        for setting, value in SHORT.get(node.get("class_path", ""), {}).items():
            words.extend([f"{path}.{setting}", str(value)])
        for key, value in node.items():
            if isinstance(value, dict):
                walk(value, path if key == "init_args" else f"{path}.{key}")

    walk(given["trainer"]["callbacks"][-1], "--trainer.callbacks")
    return words


def write_mnist(root: Path, name: str, count: int) -> list[str]:
    write_idx(root / name / "raw", count)
    return ["--data.root", str(root), "--data.val_size", str(count // 2)]


def small_detection(name: str, root: Path) -> list[str]:
    """One detector that any network passes; an untrained one must get some of the validation images right."""
    rate = 0.1 if name.endswith("cifar10") else 0.3  # at which some labels change, and some do not
    model = f"{{class_path: ModelMutation, init_args: {{rate: {rate}, min_accuracy: 0}}}}"
    detector = f"{{nai: {{class_path: MutationTestingDetector, init_args: {{cap: 5, mutation: {model}}}}}}}"
    callback = "--trainer.callbacks"
    words = [
        *[f"{callback}.detectors", detector, f"{callback}.adaptive", "null", f"{callback}.limit_images", "5"],
        *[f"{callback}.attacks.cw.steps", "2", f"{callback}.attacks.cw.binary_search_steps", "1"],
    ]
    if name.endswith("cifar10"):
        write_arrays(root / "train.npz", 400, 10)
        write_arrays(root / "test.npz", 20, 10)
        files = ["--data.train", str(root / "train.npz"), "--data.test", str(root / "test.npz")]
        return ["--data", "Arrays", *files, "--data.val_size", "0.5", "--model.network", "small_cnn", *words]
    words += [f"{callback}.attacks.one_pixel.population", "4", f"{callback}.attacks.one_pixel.generations", "1"]
    return [*write_mnist(root, "MNIST", 400), *words]


def small_regions(name: str, root: Path) -> list[str]:
    """Noise of two classes, and for a study a network that takes half of it for each of them."""
    noise, suffix = np.random.default_rng(0), "png"
    if "mnist01" in name or "fashion" in name:
        folder = "MNIST" if "mnist01" in name else "FashionMNIST"
        write_idx(root / folder / "raw", 200)
        data, shape, mean = ["--data.root", str(root), "--data.val_size", "10"], (1, 28, 28), None
    elif "cifar10" in name:
        for split in ("train", "test"):
            write_arrays(root / f"{split}.npz", 40, 2)
        files = [
            "--data.train",
            str(root / "train.npz"),
            "--data.test",
            str(root / "test.npz"),
            "--data.val_size",
            "10",
        ]
        data, shape, mean = ["--data", "Arrays", *files], (3, 32, 32), "cifar10"
    else:
        for split in ("train", "test"):
            for name_of_class in ("cat", "dog") if "cats" in name else ("Parasitized", "Uninfected"):
                (root / split / name_of_class).mkdir(parents=True)
                for number in range(20):
                    pixels = noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(root / split / name_of_class / f"C{number}P1_{number}.{suffix}")
        data, shape, mean = (
            ["--data.root", str(root), "--data.image_size", "32", "--data.num_workers", "0"],
            (3, 32, 32),
            None,
        )
    data += ["--model.network", "small_cnn"]
    if not name.startswith("study/"):
        return data
    network = create_network("small_cnn", 2, shape, mean=mean).eval()
    with torch.no_grad():
        logits = network(torch.from_numpy(noise.integers(0, 256, (200, *shape))).float() / 255)
        network.network[-1].bias[0] -= (logits[:, 0] - logits[:, 1]).median()
    torch.save(network.network.state_dict(), root / "half.pt")
    callback = "--trainer.callbacks"
    short = [f"{callback}.adaptive_steps", "1", f"{callback}.thetas", "[0.1,0.6]", f"{callback}.attacks.pgd.steps", "1"]
    return [*data, "--model.weights", str(root / "half.pt"), *short]


def small(name: str, root: Path) -> list[str]:
    """What makes a config small enough for a test: its data, and a small network."""
    family = name.partition("/")[0]
    if family in ("quickstart", "prm_digits"):
        return ["--data.limit", "10"]
    if family in ("mnist", "fashion_mnist"):
        return write_mnist(root, {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[family], 20)
    if "regions/" in name:
        return small_regions(name, root)
    if name.startswith("study/mutation_detection"):
        return small_detection(name, root)
    if name == "study/distillation":
        return [*write_mnist(root, "MNIST", 20), *short(name)]
    if name == "study/binarization":
        return [*write_mnist(root, "MNIST", 20), *short(name)]
    if family == "gtsrb" or name.startswith("study/foreground"):
        return write_masked_folders(root)
    quick: list[str] = []
    if family == "study":
        quick = short(name)
        family = next((family for family in ("imagenet", "cifar100") if name.endswith(family)), "cifar10")
    if family in ("cifar10", "cifar100"):
        classes = 100 if family == "cifar100" else 10
        write_arrays(root / "train.npz", 2 * classes, classes)
        write_arrays(root / "test.npz", 10 if classes == 10 else classes, classes)
        files = ["--data.train", str(root / "train.npz"), "--data.test", str(root / "test.npz")]
        limits = ["--data.val_size", "0.5"]
        return ["--data", "Arrays", *files, *limits, "--model.network", "small_cnn", *quick]
    assert family == "imagenet"
    write_folders(root)
    network = ["--model.network", "small_cnn", "--model.pretrained", "false"]
    return ["--data.root", str(root), "--data.image_size", "32", "--data.num_workers", "0", *network, *quick]


@pytest.mark.parametrize("name", STUDIES)
def test_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    command = commands(name)[0][0]
    given = small(name, tmp_path / "data")
    main([command, "--config", name, *given, "--trainer.accelerator", "cpu", "--trainer.fast_dev_run", "true"])
    assert "Running in `fast_dev_run` mode" in caplog.text
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", TRAINERS)
def test_trainer_configs_merge_with_any(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", "quickstart", "--config", name, "--print_config"])
    said = capsys.readouterr()
    assert not ended.value.code, said.err
    merged = yaml.safe_load(said.out)["trainer"]
    assert (merged["accelerator"], merged["strategy"]) == ("gpu", "ddp")
    assert merged["max_epochs"] == 30


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_configs_add_to_an_evaluation(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    def callbacks_of(*configs: str) -> list[str]:
        words = [word for config in configs for word in ("--config", config)]
        with pytest.raises(SystemExit) as ended:
            main(["test", *words, "--print_config"])
        said = capsys.readouterr()
        assert not ended.value.code, said.err
        return [callback["class_path"] for callback in yaml.safe_load(said.out)["trainer"]["callbacks"]]

    alone = callbacks_of("cifar10/evaluate")
    assert callbacks_of("cifar10/evaluate", name) == [*alone, "lightning_robust.callbacks.AdversarialAccuracy"]

"""What the benchmarks share: networks and data, the peers' attacks behind one signature, timing, tables and files."""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from lightning_robust.models import create_network

Run = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, images, labels) to adversarial images."""

console = Console()


def number(text: str) -> float:
    """A number or a fraction such as 8/255, for argparse."""
    numerator, _, denominator = text.partition("/")
    return float(numerator) / float(denominator or 1)


def common_arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    parser.add_argument("--output", type=Path, help="also write the rows to this .json or .csv file")
    return parser


# -- networks and data -------------------------------------------------------------------------------------------------


def load_images(data: Path | None, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) in [0, 1] and labels, of an .npz file (`images` N, H, W, 3 uint8; `labels`) or made up.

    The made-up classes are smooth random patterns under noise: a network learns them in a few steps, naturally.
    """
    generator = torch.Generator().manual_seed(seed)
    if data is not None:
        with np.load(data) as file:
            images, labels = file["images"], file["labels"]
        order = torch.randperm(len(images), generator=generator)[:count]
        chosen = torch.from_numpy(images[order.numpy()]).permute(0, 3, 1, 2).float() / 255
        return chosen.contiguous(), torch.from_numpy(labels[order.numpy()]).long()
    patterns = F.interpolate(
        torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(99)), size=32, mode="bicubic"
    )
    labels = torch.randint(0, 10, (count,), generator=generator)
    noise = torch.randn(count, 3, 32, 32, generator=generator)
    return (0.5 + 0.15 * (patterns[labels] - 0.5) + 0.1 * noise).clamp(0, 1), labels


def natural_resnet18(data: Path | None, steps: int, weights: Path | None) -> nn.Module:
    """ResNet-18 with the CIFAR stem, trained without attacks for some steps; kept in ``weights`` for the next time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_network("resnet18", 10, (3, 32, 32))
    if weights is not None and weights.exists():
        model.load_state_dict(torch.load(weights, weights_only=True))
        return model
    images, labels = load_images(data, 64 * max(steps, 1), seed=1)
    model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    with progress_bar() as bar:
        for number in bar.track(range(steps), description="training a natural ResNet-18"):
            batch = slice(64 * number % len(images), 64 * number % len(images) + 64)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(images[batch].to(memory_format=torch.channels_last))
            F.cross_entropy(logits.float(), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    # after few steps the running statistics lie far behind the weights: average those of the last batches
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        for start in range(0, len(images[: 64 * min(steps, 5)]), 64):
            model(images[start : start + 64])
    for norm in norms:
        norm.momentum = 0.1
    model.to(memory_format=torch.contiguous_format)
    if weights is not None:
        torch.save(model.state_dict(), weights)
    return model


# -- peers -------------------------------------------------------------------------------------------------------------


def published_network(args: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor, str]:
    """The published ResNet-20 and test images of CIFAR-10 where ``--root`` has them, else the benchmarks' ResNet-18."""
    root: Path | None = getattr(args, "root", None)
    weights = root and root / "weights/pytorch_resnet_cifar10/resnet20-12fca82f.th"
    if root and weights and weights.exists():
        from PIL import Image

        model = create_network("resnet20", 10, (3, 32, 32), weights=weights, mean="imagenet")
        pixels = np.asarray(Image.open(root / "cifar10/test_images.png")).reshape(-1, 32, 32, 3)[:256]
        images = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float() / 255
        labels = torch.from_numpy(np.load(root / "cifar10/test_labels.npz")["labels"][:256]).long()
        return model.eval(), images.contiguous(), labels, "ResNet-20, CIFAR-10"
    model = natural_resnet18(args.data, getattr(args, "train_steps", 60), args.weights).eval()
    images, labels = load_images(args.test_data or args.data, 256, seed=2)
    return model, images, labels, "ResNet-18"


def module_or_none(name: str) -> Any:
    """A module if it is installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def art_classifier(model: nn.Module, shape: Sequence[int], classes: int) -> Any:
    """ART's wrapper around a model."""
    art = importlib.import_module("art.estimators.classification")
    return art.PyTorchClassifier(model, nn.CrossEntropyLoss(), tuple(shape), classes, clip_values=(0.0, 1.0))


def peers_pgd(eps: float, step_size: float, steps: int) -> tuple[dict[str, Run], list[str]]:
    """PGD with a random start in the L∞ ball, by every peer that is installed; and the names of those that are not."""
    runs: dict[str, Run] = {}
    missing = []
    if torchattacks := module_or_none("torchattacks"):
        runs["torchattacks"] = lambda model, images, labels: torchattacks.PGD(model, eps, step_size, steps)(
            images, labels
        )
    else:
        missing.append("torchattacks")
    if foolbox := module_or_none("foolbox"):

        def by_foolbox(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            attack = foolbox.attacks.LinfProjectedGradientDescentAttack(abs_stepsize=step_size, steps=steps)
            return attack(foolbox.PyTorchModel(model, bounds=(0, 1)), images, labels, epsilons=eps)[1]

        runs["foolbox"] = by_foolbox
    else:
        missing.append("foolbox")
    if module_or_none("art"):
        art = importlib.import_module("art.attacks.evasion")

        def by_art(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            classes = 10 if images.shape[-1] == 32 else model(images[:1]).shape[1]
            attack = art.ProjectedGradientDescentPyTorch(
                art_classifier(model, images.shape[1:], classes),
                eps=eps,
                eps_step=step_size,
                max_iter=steps,
                num_random_init=1,
                batch_size=len(images),
                verbose=False,
            )
            return torch.from_numpy(attack.generate(images.numpy(), labels.numpy()))

        runs["ART"] = by_art
    else:
        missing.append("adversarial-robustness-toolbox")
    if module_or_none("cleverhans"):
        cleverhans = importlib.import_module("cleverhans.torch.attacks.projected_gradient_descent")
        runs["cleverhans"] = lambda model, images, labels: cleverhans.projected_gradient_descent(
            model, images, eps, step_size, steps, np.inf, 0, 1, labels, rand_init=True, sanity_checks=False
        ).detach()
    else:
        missing.append("cleverhans")
    return runs, missing


# -- timing and output -------------------------------------------------------------------------------------------------


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


class Seconds(NamedTuple):
    """What one call took: by the clock on the wall, and of all processors together."""

    wall: float
    cpu: float


def interleaved(contenders: dict[str, Callable[[], Any]], rounds: int, title: str) -> dict[str, list[Seconds]]:
    """Seconds of each contender in each round; one round to warm up is not counted.

    All run in each round, one after the other and from another one on each time, so that whatever else the machine does
    falls on all of them. On a busy machine the wall clock says more about the neighbours than about the contender:
    processor time with one thread is the figure to trust there.
    """
    seconds: dict[str, list[Seconds]] = {name: [] for name in contenders}
    names = list(contenders)
    with progress_bar() as bar:
        task = bar.add_task(title, total=(rounds + 1) * len(names))
        for turn in range(rounds + 1):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                bar.update(task, description=f"{title}: {name}")
                wall, cpu = time.perf_counter(), time.process_time()
                contenders[name]()
                if turn > 0:
                    seconds[name].append(Seconds(time.perf_counter() - wall, time.process_time() - cpu))
                bar.advance(task)
    return seconds


def speed(seconds: dict[str, list[Seconds]], reference: str, images: int) -> dict[str, dict[str, float]]:
    """Images a second, and times the reference by either clock: ratio of medians, and its range over the rounds."""

    def median(name: str, clock: str) -> float:
        return statistics.median(getattr(taken, clock) for taken in seconds[name])

    rows = {}
    for name, taken in seconds.items():
        ratios = [theirs.cpu / mine.cpu for theirs, mine in zip(seconds[reference], taken, strict=True)]
        rows[name] = {
            "images_per_second": images / median(name, "wall"),
            "times_by_wall": median(reference, "wall") / median(name, "wall"),
            "times_by_cpu": median(reference, "cpu") / median(name, "cpu"),
            "lowest_by_cpu": min(ratios),
            "highest_by_cpu": max(ratios),
        }
    return rows


def machine() -> str:
    """What the figures were taken on."""
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """Rows of equal keys as a table; the first column is the name."""
    table = Table(title=title, title_justify="left")
    for column, name in enumerate(rows[0]):
        table.add_column(name.replace("_", " "), justify="left" if column == 0 else "right")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) and abs(v) < 1000 else str(v) for v in row.values()))
    console.print(table)


def write_rows(path: Path, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Rows to .csv, or rows with what they were measured on to .json."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(json.dumps({"about": about, "rows": rows}, indent=2, default=str) + "\n")
    console.print(f"written: {path}")

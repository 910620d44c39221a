"""AutoAttack ("standard", L∞): ours, plain and on faster stand-ins, against pyautoattack and torchattacks.

With ``--root`` (real data and published weights): the ResNet-20 for CIFAR-10 at ε = 1/255, where some images withstand,
and the provably robust network for MNIST at ε = 0.1, where nearly all do. Always: the CIFAR ResNet-18 at ``--eps``,
where a naturally trained network loses every image to the first attack. What withstands costs thousands of passes an
image: ``--batch`` and ``--rounds`` say how many images and how often.

Everyone gets the same images, which the network gets right. ``robust`` is the share of them that withstands, judged on
the network itself; ``other_verdicts`` counts images on which pyautoattack disagrees.
"""

from __future__ import annotations

import argparse
import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _common import (
    Run,
    console,
    interleaved,
    load_images,
    machine,
    module_or_none,
    natural_resnet18,
    print_table,
    speed,
)
from torch import Tensor, nn

from lightning_robust.attacks import accelerate
from lightning_robust.attacks.autoattack import AutoAttack
from lightning_robust.models import create_network

REFERENCE = "pyautoattack"


class Case(NamedTuple):
    """A network, images that it gets right, and a budget."""

    name: str
    model: nn.Module
    images: Tensor
    labels: Tensor
    eps: float


def right(name: str, model: nn.Module, images: Tensor, labels: Tensor, eps: float, count: int) -> Case:
    model.eval().requires_grad_(False)
    with torch.no_grad():
        rows = (model(images).argmax(1) == labels).nonzero()[:count, 0]
    return Case(name, model, images[rows], labels[rows], eps)


def cifar(root: Path, count: int) -> Case:
    from PIL import Image

    weights = root / "weights/pytorch_resnet_cifar10/resnet20-12fca82f.th"
    model = create_network("resnet20", 10, (3, 32, 32), weights=weights, mean="imagenet")
    images = np.asarray(Image.open(root / "cifar10/test_images.png")).reshape(-1, 32, 32, 3)[: 2 * count]
    labels = torch.from_numpy(np.load(root / "cifar10/test_labels.npz")["labels"][: 2 * count]).long()
    pixels = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).contiguous().float() / 255
    return right("ResNet-20, 1/255", model, pixels, labels, 1 / 255, count)


def mnist(root: Path, count: int) -> Case:
    from torchvision.datasets import MNIST

    model = nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip
    weights = root / "weights/convex_adversarial/mnist.pth"
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    data = MNIST(str(root), train=False)
    pixels, labels = data.data[: 2 * count, None].float() / 255, data.targets[: 2 * count]
    return right("robust MNIST network, 0.1", model, pixels, labels, 0.1, count)


def cases(args: argparse.Namespace) -> list[Case]:
    count = getattr(args, "batch", 64)
    model = natural_resnet18(args.data, getattr(args, "train_steps", 60), args.weights)
    images, labels = load_images(args.test_data or args.data, 4 * count, seed=2)
    eps = getattr(args, "eps", 8 / 255)
    found = [right(f"ResNet-18, {255 * eps:g}/255", model, images, labels, eps, count)]
    if args.root is not None:
        found += [cifar(args.root, count), mnist(args.root, count)]
    return found


def contenders(case: Case) -> tuple[dict[str, Run], list[str]]:
    runs: dict[str, Run] = {}
    missing = []
    if peer := module_or_none("pyautoattack.autoattack"):
        logging.getLogger("auto-attack").setLevel(logging.ERROR)
        # its count of zero gradients views tensors flat that are not, as some networks' gradients are
        importlib.import_module("pyautoattack.autopgd_base").check_zero_gradients = lambda grad, logger=None: None
        runs["pyautoattack"] = lambda model, images, labels: peer.AutoAttack(
            model, norm="Linf", eps=case.eps, seed=0
        ).run_standard_evaluation(images, labels, batch_size=len(images))[0]
    else:
        missing.append("pyautoattack")
    if torchattacks := module_or_none("torchattacks"):
        runs["torchattacks"] = lambda model, images, labels: torchattacks.AutoAttack(model, eps=case.eps, seed=0)(
            images, labels
        )
    else:
        missing.append("torchattacks")
    attack = AutoAttack(eps=case.eps)

    def ours(stand_in: Any) -> Run:
        return lambda model, images, labels: attack.run(model, images, labels, stand_in=stand_in, rounding=False).images

    runs["ours, plain"] = ours(None)
    runs["ours, fold + channels_last"] = ours(accelerate(case.model))
    runs["ours, fold + channels_last + bf16"] = ours(accelerate(case.model, dtype=torch.bfloat16))
    return runs, missing


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of images a second, × pyautoattack, robust accuracy and verdicts that differ from pyautoattack's."""
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for number, case in enumerate(cases(args)):
        runs, missing = contenders(case)
        for name in missing if number == 0 else ():
            console.print(f"{name} is not installed: left out")
        reference = REFERENCE if REFERENCE in runs else next(iter(runs))
        if getattr(args, "only", None):
            runs = {name: run for name, run in runs.items() if name in (*args.only, reference)}
        found: dict[str, Tensor] = {}

        def timed(name: str, run: Run, case: Case = case, found: dict[str, Tensor] = found) -> Callable[[], None]:
            def call() -> None:
                adversarial = run(case.model, case.images, case.labels)
                with torch.no_grad():
                    found[name] = case.model(adversarial).argmax(1) == case.labels

            return call

        title = f"AutoAttack, {case.name}"
        seconds = interleaved({name: timed(name, run) for name, run in runs.items()}, args.rounds, title)
        table = [
            {
                "contender": name,
                **figures,
                "robust": float(found[name].double().mean()),
                "other_verdicts": int((found[name] != found[reference]).sum()),
            }
            for name, figures in speed(seconds, reference, len(case.images)).items()
        ]
        print_table(f"{title}, {len(case.images)} images ({machine()})", table)
        rows += [{"network": case.name, **row} for row in table]
    return rows

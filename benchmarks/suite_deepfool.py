"""DeepFool in L2 and L∞ on the CIFAR ResNet-18: ours, plain and on a faster stand-in, against the peers.

Everyone attacks the same images, which the network gets right, with 50 steps and the overshoot of the original, 0.02.
There is no bfloat16 here: next to the boundary its rounding hides which side a point is on, and costs more steps than
it saves.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any

import torch
from _common import (
    Run,
    art_classifier,
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
from lightning_robust.attacks.deepfool import DeepFool

STEPS = 50
OVERSHOOT = 0.02
IMAGES = 20


def peers(norm: str) -> tuple[dict[str, Run], list[str]]:
    """DeepFool by every peer that is installed and has it in this norm; and the names of those not installed."""
    runs: dict[str, Run] = {}
    missing = []
    if torchattacks := module_or_none("torchattacks"):
        if norm == "l2":
            runs["torchattacks"] = lambda model, images, labels: torchattacks.DeepFool(
                model, steps=STEPS, overshoot=OVERSHOOT
            )(images, labels)
    else:
        missing.append("torchattacks")
    if foolbox := module_or_none("foolbox"):
        make = foolbox.attacks.L2DeepFoolAttack if norm == "l2" else foolbox.attacks.LinfDeepFoolAttack
        runs["foolbox"] = lambda model, images, labels: make(steps=STEPS, overshoot=OVERSHOOT)(
            foolbox.PyTorchModel(model, bounds=(0, 1)), images, labels, epsilons=None
        )[1]
    else:
        missing.append("foolbox")
    if module_or_none("art"):
        art = importlib.import_module("art.attacks.evasion")

        def by_art(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            attack = art.DeepFool(
                art_classifier(model, images.shape[1:], 10),
                max_iter=STEPS,
                epsilon=OVERSHOOT,
                batch_size=len(images),
                verbose=False,
            )
            return torch.from_numpy(attack.generate(images.numpy(), labels.numpy()))

        if norm == "l2":
            runs["ART"] = by_art
    else:
        missing.append("adversarial-robustness-toolbox")
    return runs, missing


def ours(norm: str, model: nn.Module) -> dict[str, Run]:
    """Ours, on the network itself, and on a stand-in with every success confirmed on the network."""
    attack = DeepFool(norm=norm, steps=STEPS, overshoot=OVERSHOOT)

    def on(stand_in: Any) -> Run:
        def run(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            return attack.run(model, images, labels, stand_in=stand_in, rounding=False).images

        return run

    return {
        "ours, plain": attack,
        "ours, fold + channels_last": on(accelerate(model)),
    }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of images a second, × the reference (torchattacks; foolbox in L∞), success and mean norm."""
    torch.set_num_threads(args.threads)
    model = natural_resnet18(args.data, getattr(args, "train_steps", 60), args.weights).eval()
    images, labels = load_images(args.test_data or args.data, 20 * IMAGES, seed=2)
    with torch.no_grad():
        right = model(images).argmax(1) == labels
    images, labels = images[right][:IMAGES], labels[right][:IMAGES]
    rows: list[dict[str, Any]] = []
    for norm, order in (("l2", 2), ("linf", torch.inf)):
        runs, missing = peers(norm)
        for name in missing if norm == "l2" else ():
            console.print(f"{name} is not installed: left out")
        reference = next(iter(runs or ours(norm, model)))
        runs |= ours(norm, model)
        if getattr(args, "only", None):
            runs = {name: run for name, run in runs.items() if name in (*args.only, reference)}
        found: dict[str, Tensor] = {}

        def timed(name: str, run: Run, found: dict[str, Tensor] = found) -> Callable[[], None]:
            def call() -> None:
                found[name] = run(model, images, labels)

            return call

        title = f"DeepFool, {norm}"
        seconds = interleaved({name: timed(name, run) for name, run in runs.items()}, args.rounds, title)
        table = []
        for name, figures in speed(seconds, reference, len(images)).items():
            model.eval()
            with torch.no_grad():
                success = model(found[name]).argmax(1) != labels
            size = (found[name] - images).flatten(1).norm(p=order, dim=1)
            table.append(
                {
                    "contender": name,
                    "norm": norm,
                    "reference": reference,
                    **figures,
                    "success": float(success.double().mean()),
                    "mean_norm": float(size[success].double().mean()),
                }
            )
        shown = [{key: value for key, value in row.items() if key not in ("norm", "reference")} for row in table]
        print_table(f"{title}, × {reference}, {len(images)} images ({machine()})", shown)
        rows += table
    return rows

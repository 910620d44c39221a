"""CW in L2: ours, plain and on faster stand-ins, against the peers.

Two tasks, on images that the network gets right:

* one constant: c = 1 and 50 steps, without a search for c, since torchattacks has none. It stops as soon as the loss of
  the whole batch rises, which with these settings is after about ten steps; what counts is time and norm together. Ours
  also with 20 steps.
* search: 5 rounds of 100 steps from c = 0.01, as foolbox and cleverhans have it. (ART has it, too, and would take as
  long as everyone else together: at one constant it has about 1/60 of torchattacks' speed.)

Success is that on the network itself; of bfloat16 it is said how many successes a confirmation costs without searching
again ("success_unconfirmed_lost").
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
    machine,
    module_or_none,
    print_table,
    published_network,
    speed,
)
from torch import Tensor, nn

from lightning_robust.attacks import accelerate
from lightning_robust.attacks.cw import CW

IMAGES = 32
SETTINGS: dict[str, dict[str, Any]] = {
    "one constant": {"steps": 50, "binary_search_steps": 1, "initial_const": 1.0},
    "search": {"steps": 100, "binary_search_steps": 5, "initial_const": 0.01},
}


def peers(task: str) -> tuple[dict[str, Run], list[str]]:
    """CW by every peer that is installed and can do the task; and the names of those not installed."""
    settings = SETTINGS[task]
    steps, rounds, const = settings["steps"], settings["binary_search_steps"], settings["initial_const"]
    runs: dict[str, Run] = {}
    missing = []
    if torchattacks := module_or_none("torchattacks"):
        if task == "one constant":
            runs["torchattacks"] = lambda model, images, labels: torchattacks.CW(
                model, c=const, kappa=0, steps=steps, lr=0.01
            )(images, labels)
    else:
        missing.append("torchattacks")
    if foolbox := module_or_none("foolbox"):
        runs["foolbox"] = lambda model, images, labels: foolbox.attacks.L2CarliniWagnerAttack(
            binary_search_steps=rounds, steps=steps, stepsize=0.01, initial_const=const
        )(foolbox.PyTorchModel(model, bounds=(0, 1)), images, labels, epsilons=None)[1]
    else:
        missing.append("foolbox")
    if module_or_none("cleverhans"):
        cleverhans = importlib.import_module("cleverhans.torch.attacks.carlini_wagner_l2")
        runs["cleverhans"] = lambda model, images, labels: cleverhans.carlini_wagner_l2(
            model,
            images,
            10,
            labels,
            lr=0.01,
            binary_search_steps=rounds,
            max_iterations=steps,
            initial_const=const,
        ).detach()
    else:
        missing.append("cleverhans")
    if task == "search":
        return runs, missing
    if module_or_none("art"):
        art = importlib.import_module("art.attacks.evasion")

        def by_art(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            attack = art.CarliniL2Method(
                art_classifier(model, images.shape[1:], 10),
                binary_search_steps=rounds,
                max_iter=steps,
                learning_rate=0.01,
                initial_const=const,
                batch_size=len(images),
                verbose=False,
            )
            return torch.from_numpy(attack.generate(images.numpy(), labels.numpy()))

        runs["ART"] = by_art
    else:
        missing.append("adversarial-robustness-toolbox")
    return runs, missing


def ours(task: str, model: nn.Module) -> dict[str, Run]:
    """Ours, on the network itself, and on stand-ins with every success confirmed on the network."""
    attack = CW(**SETTINGS[task])

    def on(stand_in: Any, attack: CW = attack) -> Run:
        def run(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            return attack.run(model, images, labels, stand_in=stand_in, rounding=False).images

        return run

    fast = accelerate(model)
    runs = {
        "ours, plain": on(None),
        "ours, fold + channels_last": on(fast),
        "ours, fold + channels_last + bf16": on(accelerate(model, dtype=torch.bfloat16)),
    }
    if task == "one constant":
        short = attack.replace(steps=20)
        assert isinstance(short, CW)
        runs["ours, 20 steps, fold + channels_last"] = on(fast, short)
    return runs


def lost_in_bf16(task: str, model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the successes on a bfloat16 stand-in that are none on the network."""
    stand_in = accelerate(model, dtype=torch.bfloat16)
    result = CW(**SETTINGS[task]).run(stand_in, images, labels, rounding=False)
    with torch.no_grad():
        held = model(result.images).argmax(1) != labels
    return float((result.success & ~held).sum() / result.success.sum().clamp_min(1))


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of images a second, × the reference (torchattacks; foolbox in a search), success and mean L2."""
    torch.set_num_threads(args.threads)
    model, images, labels, network = published_network(args)
    count = min(IMAGES, getattr(args, "batch", IMAGES))
    with torch.no_grad():
        right = model(images).argmax(1) == labels
    images, labels = images[right][:count], labels[right][:count]
    rows: list[dict[str, Any]] = []
    for task in SETTINGS:
        runs, missing = peers(task)
        for name in missing if not rows else ():
            console.print(f"{name} is not installed: left out")
        own = ours(task, model)
        reference = next(iter(runs or own))
        runs |= own
        if getattr(args, "only", None):
            runs = {name: run for name, run in runs.items() if name in (*args.only, reference)}
        found: dict[str, Tensor] = {}

        def timed(name: str, run: Run, found: dict[str, Tensor] = found) -> Callable[[], None]:
            def call() -> None:
                model.eval()  # a peer may have left it otherwise
                found[name] = run(model, images, labels)

            return call

        title = f"CW in L2, {task}, {network}"
        seconds = interleaved({name: timed(name, run) for name, run in runs.items()}, args.rounds, title)
        table = []
        model.eval()
        lost = lost_in_bf16(task, model, images, labels)
        for name, figures in speed(seconds, reference, len(images)).items():
            with torch.no_grad():
                success = model(found[name]).argmax(1) != labels
            size = (found[name] - images).flatten(1).norm(dim=1)
            table.append(
                {
                    "contender": name,
                    "settings": task,
                    "reference": reference,
                    **figures,
                    "success": float(success.double().mean()),
                    "mean_norm": float(size[success].double().mean()),
                    "success_unconfirmed_lost": lost if "bf16" in name else 0.0,
                }
            )
        shown = [{key: value for key, value in row.items() if key not in ("settings", "reference")} for row in table]
        print_table(f"{title}, × {reference}, {len(images)} images ({machine()})", shown)
        rows += table
    return rows

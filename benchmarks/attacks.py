"""PGD-10 on the CIFAR ResNet-18: ours, with each acceleration alone and with all, against the peers.

    python benchmarks/attacks.py --data cifar10_train.npz --test-data cifar10_test.npz --output attacks.json

Two tasks, since they allow different things:

* evaluation: clean and robust accuracy of a batch. Everyone classifies the clean images; peers then make adversarial
  images and classify them; ours, where it searched on a faster stand-in, confirms every success on the network itself.
  Fooled images may leave. All images are ones that the network gets right, so that nothing is won by images that need
  no attack.
* training: adversarial images for the inner loop of adversarial training, from a network in train mode whose weights
  change at each batch. Nothing may leave; a stand-in takes the new weights over each time, which is counted.

Both run in rounds, all contenders one after the other in each, in one process. Peak memory is taken in a process of its
own for each contender. Peers that are not installed are named and left out.

``--task cw``, ``deepfool``, ``jsma``, ``autoattack`` and ``one_pixel`` measure the other attacks in the same way (in
``suite_<name>.py``), ``--task suite`` all five in one run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import (
    Run,
    common_arguments,
    console,
    interleaved,
    load_images,
    machine,
    natural_resnet18,
    number,
    peers_pgd,
    print_table,
    speed,
    write_rows,
)
from torch import Tensor, nn

from lightning_robust.attacks import PGD
from lightning_robust.attacks.acceleration import Accelerated

BF16 = torch.bfloat16
REFERENCE = "torchattacks"

# name: (options of the stand-in or None, whether fooled images leave)
OURS: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "ours, plain": (None, False),
    "ours, fold": ({"fold": True, "channels_last": False}, False),
    "ours, channels_last": ({"fold": False, "channels_last": True}, False),
    "ours, fold + channels_last": ({"fold": True, "channels_last": True}, False),
    "ours, bf16": ({"fold": False, "channels_last": False, "dtype": BF16}, False),
    "ours, fold + channels_last + bf16": ({"fold": True, "channels_last": True, "dtype": BF16}, False),
    "ours, fooled images leave": (None, True),
    "ours, fold + channels_last, leave": ({"fold": True, "channels_last": True}, True),
    "ours, everything": ({"fold": True, "channels_last": True, "dtype": BF16}, True),
}

SUITE = ("cw", "deepfool", "jsma", "autoattack", "one_pixel")

Fooled = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, images, labels) to which of them were fooled."""


def fooled_by(run: Run) -> Fooled:
    """Clean and robust accuracy with a peer."""

    def fooled(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            right = model(images).argmax(1) == labels
        adversarial = run(model, images, labels)
        with torch.no_grad():
            return ~right | (model(adversarial).argmax(1) != labels)

    return fooled


def fooled_by_ours(attack: PGD, stand_in: nn.Module | None) -> Fooled:
    """Clean and robust accuracy with ours: the clean logits are handed on."""

    def fooled(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            logits = model(images)
        return attack.run(model, images, labels, stand_in=stand_in, clean_logits=logits, rounding=False).success

    return fooled


def evaluation_contenders(args: argparse.Namespace, model: nn.Module) -> tuple[dict[str, Fooled], list[str]]:
    peers, missing = peers_pgd(args.eps, args.step_size, args.steps)
    contenders: dict[str, Fooled] = {name: fooled_by(run) for name, run in peers.items()}
    for name, (options, leave) in OURS.items():
        if args.memory_of not in (None, name):
            continue  # its stand-in would count as memory
        attack = PGD(eps=args.eps, step_size=args.step_size, steps=args.steps, stop_at_success=leave)
        # an evaluation goes over many batches with one stand-in: making it is not counted
        stand_in = None if options is None else Accelerated(model, **options)
        contenders[name] = fooled_by_ours(attack, stand_in)
    return contenders, missing


def training_contenders(args: argparse.Namespace, model: nn.Module) -> tuple[dict[str, Run], list[str]]:
    contenders, missing = peers_pgd(args.eps, args.step_size, args.steps)
    attack = PGD(eps=args.eps, step_size=args.step_size, steps=args.steps, stop_at_success=False)
    for name, (options, leave) in OURS.items():
        if leave or args.memory_of not in (None, name):
            continue
        stand_in = None if options is None else Accelerated(model, **options)

        def run(model: nn.Module, images: Tensor, labels: Tensor, stand_in: Accelerated | None = stand_in) -> Tensor:
            if stand_in is None:
                return attack(model, images, labels)
            stand_in.refresh()
            return attack(stand_in, images, labels)

        contenders[name] = run
    return contenders, missing


def fooled_share(model: nn.Module, adversarial: Tensor, labels: Tensor) -> float:
    was = model.training
    with torch.no_grad():
        share = float((model.eval()(adversarial).argmax(1) != labels).double().mean())
    model.train(was)
    return share


def measure_memory(args: argparse.Namespace, task: str, names: list[str]) -> dict[str, float]:
    """MiB by which the peak of a fresh process rises above what network and images take, for each contender (Linux)."""
    peaks = {}
    for name in names:
        command = [sys.executable, __file__, *args.given, "--memory-of", name, "--task", task]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[name] = json.loads(done.stdout.strip().splitlines()[-1])["mib"]
    return peaks


def report_memory(args: argparse.Namespace, task: str, model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """In the fresh process: make the contender and call it once, and print how far the peak of memory rose."""
    peers_pgd(args.eps, args.step_size, args.steps)  # what importing a peer takes is not its attack's
    before = memory_kib("VmRSS")
    contenders, _ = make_contenders(args, task, model)
    contenders[args.memory_of](model, images, labels)
    print(json.dumps({"mib": round((memory_kib("VmHWM") - before) / 1024)}))


def memory_kib(field: str) -> int:
    """Resident memory now, or at its peak (getrusage would count the peak of the process that started this one)."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(field))


def make_contenders(args: argparse.Namespace, task: str, model: nn.Module) -> tuple[dict[str, Any], list[str]]:
    model.train(task == "training")
    return (evaluation_contenders if task == "evaluation" else training_contenders)(args, model)


def main() -> None:
    parser = common_arguments(__doc__.splitlines()[0])
    parser.add_argument(
        "--task", choices=["evaluation", "training", "both", *SUITE, "suite"], default="both", help="what to measure"
    )
    parser.add_argument("--root", type=Path, help="folder of real data and weights, for tasks that can use them")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, of which the median is taken; 0: only memory")
    parser.add_argument("--batch", type=int, default=64, help="images in the batch")
    parser.add_argument("--steps", type=int, default=10, help="steps of PGD")
    parser.add_argument("--eps", type=number, default=8 / 255, help="budget in L∞")
    parser.add_argument("--step-size", type=number, default=2 / 255, help="length of a step")
    parser.add_argument("--data", type=Path, help=".npz with images (N, H, W, 3) and labels to train on; else made up")
    parser.add_argument("--test-data", type=Path, help=".npz with the images to attack; else made up or from --data")
    parser.add_argument("--train-steps", type=int, default=60, help="steps of natural training (64 images each)")
    parser.add_argument("--weights", type=Path, help="keep the trained network here, and take it from here")
    parser.add_argument("--only", nargs="+", help="measure these contenders (and the reference) alone")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.given = [arg for arg in sys.argv[1:] if arg not in ("--memory", "--no-memory")]
    torch.set_num_threads(args.threads)
    if args.task in (*SUITE, "suite"):
        names = SUITE if args.task == "suite" else (args.task,)
        suite = [
            {"task": name, **row} for name in names for row in importlib.import_module(f"suite_{name}").measure(args)
        ]
        if args.output:
            write_rows(args.output, suite, {"machine": machine(), **vars(args)})
        return
    if args.memory_of and not (args.weights and args.weights.exists()):
        args.train_steps = 0  # training would set the peak
    model = natural_resnet18(args.data, args.train_steps, args.weights)
    model.eval()
    images, labels = load_images(args.test_data or args.data, 4 * args.batch, seed=2)
    with torch.no_grad():
        right = model(images).argmax(1) == labels
    clean_accuracy = float(right.double().mean())
    if not args.memory_of:  # there the network may be an untrained one
        images, labels = images[right], labels[right]
    images, labels = images[: args.batch], labels[: args.batch]

    rows: list[dict[str, Any]] = []
    for task in ("evaluation", "training") if args.task == "both" else (args.task,):
        if args.memory_of:
            report_memory(args, task, model, images, labels)
            return
        contenders, missing = make_contenders(args, task, model)
        if args.only:
            contenders = {name: run for name, run in contenders.items() if name in (*args.only, REFERENCE)}
        for name in missing:
            console.print(f"{name} is not installed: left out")
        found: dict[str, Tensor] = {}

        def timed(name: str, run: Callable[..., Tensor], found: dict[str, Tensor] = found) -> Callable[[], None]:
            def call() -> None:
                found[name] = run(model, images, labels)

            return call

        memory = measure_memory(args, task, list(contenders)) if args.memory else {}
        if args.rounds == 0:
            table = [{"contender": name, "peak_MiB": mib} for name, mib in memory.items()]
            print_table(f"{task}: peak memory above network and images ({machine()})", table)
            rows += [{"task": task, **row} for row in table]
            continue
        seconds = interleaved({name: timed(name, run) for name, run in contenders.items()}, args.rounds, task)
        reference = REFERENCE if REFERENCE in contenders else next(iter(contenders))
        table = []
        for name, figures in speed(seconds, reference, len(images)).items():
            result = found[name]
            share = float(result.double().mean()) if task == "evaluation" else fooled_share(model, result, labels)
            row: dict[str, Any] = {"contender": name, **figures, "fooled": share}
            if task == "evaluation":
                row["fooled_otherwise_than_plain"] = int((result != found.get("ours, plain", result)).sum())
            if memory:
                row["peak_MiB"] = memory[name]
            table.append(row)
        title = f"{task}: PGD-{args.steps}, {len(images)} images, clean accuracy {clean_accuracy:.2f} ({machine()})"
        print_table(title, table)
        rows += [{"task": task, **row} for row in table]
    if args.output:
        about = {"machine": machine(), "clean_accuracy": clean_accuracy, "reference": REFERENCE, **vars(args)}
        write_rows(args.output, rows, about)


if __name__ == "__main__":
    main()

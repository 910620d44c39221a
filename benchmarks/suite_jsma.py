"""JSMA: ours against torchattacks and ART at the same step and budget, and peak memory on images of 224 × 224.

    python benchmarks/attacks.py --task jsma --root DATA --threads 1

All aim at (label + 1) mod K, which is what torchattacks' untargeted attack does with ten classes, change features by
1, and stop at success. ART's attack is another algorithm: it leaves the other classes' gradients out. The budget of
MNIST-sized images is the paper's, 112 features; of CIFAR-10 images 60, since torchattacks looks at all pairs (9.4
million). Images are ones that the network gets right. Changed features are averaged over the images that were fooled.

Without ``--root`` the images are embedded handwritten digits, enlarged to 28 × 28, and CIFAR-10 is left out.

Peak memory is that of a process of its own (Linux), above what the network and the images take.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from _common import art_classifier, console, interleaved, machine, module_or_none, print_table, speed
from torch import Tensor, nn

from lightning_robust.attacks import accelerate
from lightning_robust.attacks.context import attacking
from lightning_robust.attacks.jsma import JSMA
from lightning_robust.models import create_network

REFERENCE = "torchattacks"
MEMORY_STEPS = 5


class Case(NamedTuple):
    """A network, images that it gets right, and how many features may change."""

    name: str
    model: nn.Module
    images: Tensor
    labels: Tensor
    features: int

    @property
    def targets(self) -> Tensor:
        """What torchattacks goes for when it is not told."""
        return (self.labels + 1) % 10


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Speed, success and changed features, then peak memory."""
    rows: list[dict[str, Any]] = []
    for case in cases(args.root):
        contenders, missing = make_contenders(case)
        for name in missing:
            console.print(f"{name} is not installed: left out")
        found: dict[str, Tensor] = {}

        def timed(name: str, run: Callable[[], Tensor], found: dict[str, Tensor] = found) -> Callable[[], None]:
            def call() -> None:
                found[name] = run()

            return call

        title = f"JSMA, {case.name}, {len(case.images)} images"
        seconds = interleaved({name: timed(name, run) for name, run in contenders.items()}, args.rounds, title)
        reference = REFERENCE if REFERENCE in contenders else next(iter(contenders))
        table = [
            {"contender": name, **figures, **quality(case, found[name])}
            for name, figures in speed(seconds, reference, len(case.images)).items()
        ]
        print_table(f"{title}, at most {case.features} features, × {reference} ({machine()})", table)
        rows += [{"case": case.name, "reference": reference, **row} for row in table]
    memory = [peak_memory(count, args.threads) for count in (1, 8)]
    print_table(
        f"JSMA, torchvision's ResNet-18 with random weights, {MEMORY_STEPS} steps, F = 150,528 ({machine()})", memory
    )
    return rows + memory


def quality(case: Case, adversarial: Tensor) -> dict[str, float]:
    """Share of images at their target, and changed features of these."""
    with torch.no_grad():
        hit = case.model(adversarial).argmax(1) == case.targets
    changed = (adversarial != case.images).flatten(1).sum(1)
    mean = float(changed[hit].double().mean()) if hit.any() else float("nan")
    return {"success": float(hit.double().mean()), "changed_features": mean, "most": int(changed.max())}


def make_contenders(case: Case) -> tuple[dict[str, Callable[[], Tensor]], list[str]]:
    """Everyone's attack on one case, and who is missing."""
    model, images, labels, targets = case.model, case.images, case.labels, case.targets
    share = case.features / images[0].numel()
    contenders: dict[str, Callable[[], Tensor]] = {}
    missing = []
    if torchattacks := module_or_none("torchattacks"):
        contenders[REFERENCE] = lambda: torchattacks.JSMA(model, theta=1.0, gamma=share - 1e-9)(images, labels)
    else:
        missing.append("torchattacks")
    if module_or_none("art"):
        art = importlib.import_module("art.attacks.evasion")
        wanted = F.one_hot(targets, 10).numpy()

        def by_art() -> Tensor:
            # it stops when more than the share has changed
            attack = art.SaliencyMapMethod(
                art_classifier(model, images.shape[1:], 10),
                theta=1.0,
                gamma=share - 1.5 / images[0].numel(),
                batch_size=len(images),
                verbose=False,
            )
            return torch.from_numpy(attack.generate(images.numpy(), wanted))

        contenders["ART"] = by_art
    else:
        missing.append("adversarial-robustness-toolbox")
    attack = JSMA(max_features=case.features)
    stand_in = accelerate(model)
    contenders["ours"] = lambda: attack(model, images, labels, targets=targets)
    # an evaluation: every success is confirmed on the network itself
    contenders["ours, fold + channels_last"] = lambda: (
        attack.run(model, images, labels, targets=targets, stand_in=stand_in, rounding=False).images
    )
    contenders["ours, softmax"] = lambda: attack.replace(output="softmax")(model, images, labels, targets=targets)
    return contenders, missing


def cases(root: Path | None, count: int = 16) -> list[Case]:
    """Sixteen MNIST-sized images and, from real data, four of CIFAR-10."""
    images, labels, test_images, test_labels = mnist(root)
    model = natural(images, labels)
    found = [right_only("MNIST" if root else "enlarged digits", model, test_images, test_labels, count, 112)]
    if root is not None:
        from PIL import Image

        strip = np.asarray(Image.open(root / "cifar10/test_images.png")).reshape(-1, 32, 32, 3)[:32]
        labels = torch.from_numpy(np.load(root / "cifar10/test_labels.npz")["labels"][:32]).long()
        weights = root / "weights/pytorch_resnet_cifar10/resnet20-12fca82f.th"
        model = create_network("resnet20", 10, (3, 32, 32), weights=weights, mean="imagenet")
        images = torch.from_numpy(strip.copy()).permute(0, 3, 1, 2).float() / 255
        found.append(right_only("CIFAR-10, ResNet-20", model.eval(), images, labels, 4, 60))
    return found


def right_only(name: str, model: nn.Module, images: Tensor, labels: Tensor, count: int, features: int) -> Case:
    """A case of the first images that the network gets right."""
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).nonzero()[:count, 0]
    return Case(name, model, images[right].contiguous(), labels[right], features)


def mnist(root: Path | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images (N, 1, 28, 28) in [0, 1] and labels."""
    if root is not None:
        from torchvision.datasets import MNIST

        train, test = (MNIST(str(root), train=train) for train in (True, False))
        return (
            train.data[:6400, None].float() / 255,
            train.targets[:6400],
            test.data[:200, None].float() / 255,
            test.targets[:200],
        )
    from sklearn.datasets import load_digits

    data = load_digits()
    small = torch.from_numpy(data.images / 16).float()[:, None]
    images = F.interpolate(small, size=28, mode="bilinear").clamp(0, 1)
    labels = torch.from_numpy(data.target).long()
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


def natural(images: Tensor, labels: Tensor, steps: int = 150) -> nn.Module:
    """A small convolutional network, trained for some seconds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_network("small_cnn", 10, (1, 28, 28))
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
        for _ in range(steps):
            rows = torch.randint(0, len(images), (64,))
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    return model.eval()


# -- memory ------------------------------------------------------------------------------------------------------------


def peak_memory(count: int, threads: int) -> dict[str, Any]:
    """In a fresh process: MiB that one forward and two backward passes take, and that the attack takes."""
    row: dict[str, Any] = {"contender": f"ours, {count} of 3 × 224 × 224"}
    for what in ("passes", "attack"):
        command = [sys.executable, __file__, what, str(count), str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row |= json.loads(done.stdout.strip().splitlines()[-1])
    row["pair_matrix_MiB"] = 4 * count * 150_528**2 // 2**20
    return row


def memory_kib(field: str) -> int:
    """Resident memory now, or at its peak."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(field))


def in_fresh_process(what: str, count: int) -> dict[str, Any]:
    """One line of :func:`peak_memory`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torchvision.models.resnet18(num_classes=10).eval()
        images = torch.rand(count, 3, 224, 224)
    with torch.no_grad():
        labels = model(images).argmax(1)
    attack = JSMA(max_features=2 * MEMORY_STEPS)
    before, start = memory_kib("VmRSS"), time.perf_counter()
    if what == "attack":
        targets = (labels + 5) % 10
        steps = int(attack.run(model, images, labels, targets=targets, rounding=False).iterations.max())
        taken = time.perf_counter() - start
        return {"attack_MiB": (memory_kib("VmHWM") - before) // 1024, "ms_a_step": 1000 * taken / max(steps, 1)}
    with attacking(model):
        points = images.clone().requires_grad_()
        logits = model(points)
        for place in (0, 1):
            torch.autograd.grad(logits[:, place].sum(), points, retain_graph=place == 0)
    taken = time.perf_counter() - start
    return {"passes_MiB": (memory_kib("VmHWM") - before) // 1024, "ms_for_passes": 1000 * taken}


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(in_fresh_process(sys.argv[1], int(sys.argv[2]))))

"""What each check of an audit costs, and the audit as a whole.

    python benchmarks/audit.py --root /path/to/data --images 500 --threads 2 --output audit.json

The ResNet-20 of akamaster/pytorch_resnet_cifar10 and CIFAR-10 where ``--root`` has them, else the benchmarks'
ResNet-18. A natural network's images fall early. ``--robust`` lets none of them fall (each image's own class is put far
above the others), so that every attack meets every image: about the upper bound that ``audit`` tells beforehand.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import common_arguments, console, load_images, machine, print_table, published_network, write_rows
from PIL import Image
from torch import Tensor, nn

from lightning_robust.audit import BUDGETS, Estimate, audit, spoken


class Unmoved(nn.Module):
    """A network that costs what it costs, and whose verdict about the images it was made with never changes.

    Args:
        network: what is asked.
        images: that it was made with; others get the answer of the nearest.
        labels: their classes.
    """

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("images", images.flatten(1))
        self.register_buffer("labels", labels)

    def forward(self, images: Tensor) -> Tensor:
        """``(N, C, H, W)`` to logits ``(N, K)``: those of the network, and far above them the image's own class."""
        logits = self.network(images)
        nearest = torch.cdist(images.flatten(1), self.images).argmin(1)
        return logits + 1e3 * nn.functional.one_hot(self.labels[nearest], logits.shape[1])


def main() -> None:
    parser = common_arguments(__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="folder of real data: weights/pytorch_resnet_cifar10, cifar10")
    parser.add_argument("--images", type=int, default=500, help="images to audit")
    parser.add_argument("--budget", choices=list(BUDGETS), default="quick")
    parser.add_argument("--eps", default="8/255", help="L∞ budget")
    parser.add_argument("--robust", action="store_true", help="let no image fall: the upper bound")
    parser.add_argument("--data", type=Path, help=".npz with images (N, H, W, 3) and labels, to train ResNet-18 on")
    parser.add_argument("--test-data", type=Path, help="likewise, to audit on")
    parser.add_argument("--weights", type=Path, help="where the trained ResNet-18 is kept")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, images, labels, name = published_network(args)
    if args.images > len(images):
        images, labels = more_images(args)
    images, labels = images[: args.images], labels[: args.images]
    if args.robust:
        model, name = Unmoved(model, images, labels).eval(), f"{name}, unmoved"
    rows = measured(model, images, labels, args)
    print_table(f"audit of {name}: {args.budget}, {len(images)} images ({machine()})", rows)
    if args.output:
        write_rows(args.output, rows, {"machine": machine(), "network": name, **vars(args)})


def more_images(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """More images than the other benchmarks take."""
    pixels = args.root and args.root / "cifar10/test_images.png"
    if not (pixels and pixels.exists()):
        return load_images(args.test_data or args.data, args.images, seed=2)
    images = np.asarray(Image.open(pixels)).reshape(-1, 32, 32, 3)[: args.images]
    labels = np.load(args.root / "cifar10/test_labels.npz")["labels"][: args.images]
    return torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(labels).long()


def measured(model: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of each check, and the upper bound that was told before."""
    told: list[Estimate] = []
    rows: list[dict[str, Any]] = []
    begun = time.perf_counter()

    def note(what: str, outcome: str) -> None:
        seconds = time.perf_counter() - begun - sum(row["seconds"] for row in rows)
        rows.append({"check": what, "outcome": outcome, "seconds": seconds})
        console.print(f"{what}: {spoken(seconds)}")

    def begin(expected: Estimate) -> None:
        told.append(expected)
        note("Clean images, and how long it will take", "")

    result = audit(
        model,
        images,
        labels,
        eps=args.eps,
        budget=args.budget,
        on_estimate=begin,
        on_check=lambda check: note(check.title, check.outcome),
    )
    # they run between the last two checks, and nothing tells beforehand which
    adaptive = sum(attack.seconds for attack in result.attacks if attack.adaptive)
    rows[-1]["seconds"] -= adaptive
    rows.insert(-1, {"check": "Adaptive attacks on what was flagged", "outcome": "", "seconds": adaptive})
    bounds = dict(told[0].rows)
    for row in rows:
        row["told_before"] = bounds.get(row["check"], 0.0)
    total = {"check": "all", "outcome": "", "seconds": sum(row["seconds"] for row in rows)}
    return [*rows, {**total, "told_before": told[0].total}]


if __name__ == "__main__":
    main()

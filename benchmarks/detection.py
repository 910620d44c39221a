"""Images that mutation testing decides in a second: batched, against one image and one mutant at a time.

    python benchmarks/detection.py --root DATA --threads 1 --output detection.json

The straightforward loop is that of the papers' code, with the exact test: for each image, ask one mutant after the
other until the test has decided or the cap is reached. Mutated networks are ready in its memory (making them is not
counted for anyone), so what it pays for is passes of one image. Ours decides all images of a batch at once: those that
are decided leave, and mutants of a network share what comes before the first layer that they change.

LeNet-5 on MNIST (``--root``, a folder that holds MNIST/raw), else on scikit-learn's digits enlarged to 28 × 28, trained
for ``--train-steps`` steps or taken from ``--weights``. Half of the images are natural test images, half what DeepFool
makes of others. All contenders run in each round; decisions are compared one by one.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import common_arguments, console, interleaved, machine, print_table, progress_bar, speed, write_rows
from torch import Tensor, nn

from lightning_robust.attacks import DeepFool
from lightning_robust.datamodules import MNIST, Digits
from lightning_robust.datamodules.base import Split
from lightning_robust.detectors import ImageMutation, ModelMutation, MutationTestingDetector
from lightning_robust.models import create_network

REFERENCE = "one image, one mutant at a time"
OURS = "ours, batched"

MUTATIONS = {
    "nai": ModelMutation(operator="nai", rate=0.05),
    "gf": ModelMutation(operator="gf", rate=0.05),
    "ws": ModelMutation(operator="ws", rate=0.05),
    "ns": ModelMutation(operator="ns", rate=0.05),
    "image": ImageMutation(operator="mixed", strength=10),
    "noise": ImageMutation(operator="noise", strength=0.2),
    "shift": ImageMutation(operator="shift", strength=2),
}


def load(root: Path | None, split: Split, count: int) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) and labels."""
    data = Digits(val_size=0.2) if root is None else MNIST(str(root), val_size=5000)
    dataset = data.dataset(split)
    rows = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().long().unique().tolist()
    batch = dataset.__getitems__(rows)
    images = batch.images if batch.images.shape[-1] == 28 else F.interpolate(batch.images, 28, mode="bilinear")
    return images.clamp(0, 1), batch.labels


def lenet5(root: Path | None, steps: int, weights: Path | None) -> nn.Module:
    torch.manual_seed(0)
    model = create_network("lenet5", 10, (1, 28, 28), mean="mnist", weights=weights)
    if weights is None:
        images, labels = load(root, "train", 64 * steps)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        with progress_bar() as bar:
            for number in bar.track(range(steps), description="training LeNet-5"):
                batch = torch.arange(64 * number, 64 * number + 64) % len(images)
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
    return model.eval().requires_grad_(False)


def one_by_one(model: nn.Module, detector: MutationTestingDetector) -> Callable[[Tensor], list[tuple[bool, int]]]:
    """The straightforward loop: whether each image is adversarial, and the mutants that took."""
    mutation, found, test = detector.mutation, detector.calibrated, detector.test
    chosen = found.chosen[: detector.cap]
    networks = []
    if isinstance(mutation, ModelMutation):
        for number in chosen:
            network = copy.deepcopy(model)
            for name, change in mutation.draw(model, number).items():
                network.get_parameter(name).copy_(change.applied(model.get_parameter(name)))
            networks.append(network)
    low, high = test.threshold - test.half_width, test.threshold + test.half_width
    changed, unchanged = math.log(high / low), math.log((1 - high) / (1 - low))
    normal, adversarial = math.log(test.beta / (1 - test.alpha)), math.log((1 - test.beta) / test.alpha)

    @torch.no_grad()
    def decide(images: Tensor) -> list[tuple[bool, int]]:
        verdicts = []
        for image in images:
            image = image[None]
            label, changes, asked = int(model(image).argmax()), 0, 0
            verdict = False
            for place in range(detector.cap):
                if isinstance(mutation, ImageMutation):
                    logits = model(mutation.mutants(image, [chosen[place]])[0])
                else:
                    logits = networks[place](image)
                changes, asked = changes + (int(logits.argmax()) != label), asked + 1
                ratio = changes * changed + (asked - changes) * unchanged
                if ratio >= adversarial or ratio <= normal:
                    verdict = ratio >= adversarial
                    break
            verdicts.append((verdict, asked))
        return verdicts

    return decide


def main() -> None:
    parser = common_arguments(__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="folder that holds MNIST/raw")
    parser.add_argument("--weights", type=Path, help="of LeNet-5, in place of training")
    parser.add_argument("--train-steps", type=int, default=400, help="steps of training (64 images each)")
    parser.add_argument("--images", type=int, default=256, help="images to decide")
    parser.add_argument("--calibration", type=int, default=500, help="validation images")
    parser.add_argument("--cap", type=int, default=500, help="mutants at most")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which the median is taken")
    parser.add_argument("--mutations", nargs="+", choices=list(MUTATIONS), default=list(MUTATIONS), help="which")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [row for name in args.mutations for row in measure(args, name)]
    print_table(f"images decided a second, {args.images} images, LeNet-5 ({machine()})", rows)
    if args.output:
        write_rows(args.output, rows, {"machine": machine(), "reference": REFERENCE, **vars(args)})


def measure(args: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    model = lenet5(args.root, args.train_steps, args.weights)
    detector = MutationTestingDetector(MUTATIONS[name], cap=args.cap)
    detector.calibrate(model, *load(args.root, "val", args.calibration))
    images, labels = load(args.root, "test", args.images)
    attacked = DeepFool()(model, images[1::2], labels[1::2])
    images = torch.cat([images[::2], attacked])
    decide = one_by_one(model, detector)
    found: dict[str, list[tuple[bool, int]]] = {}

    def batched() -> None:
        decision = detector.decide(model, images)
        found[OURS] = list(zip(decision.adversarial.tolist(), decision.mutants.tolist(), strict=True))

    def loop() -> None:
        found[REFERENCE] = decide(images)

    seconds = interleaved({REFERENCE: loop, OURS: batched}, args.rounds, name)
    differ = sum(one != other for one, other in zip(found[REFERENCE], found[OURS], strict=True))
    console.print(f"{name}: {differ} of {len(images)} decisions differ (logits that tie but for rounding)")
    mutants = sum(asked for _, asked in found[OURS]) / len(images)
    return [
        {"contender": f"{name}, {contender}", **figures, "mutants": mutants, "differ": differ}
        for contender, figures in speed(seconds, REFERENCE, len(images)).items()
    ]


if __name__ == "__main__":
    main()

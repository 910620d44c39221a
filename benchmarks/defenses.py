"""Defenses: batched against image by image, and what they cost beside the classifier's own passes.

    python benchmarks/defenses.py --task deflection --size 224 --images 16 --output defenses.json

* region: the vote of 1000 points on ResNet-20, in batches of ``--max-batch`` points; against the loop over images with
  torch's own random numbers (as DEEPSEC's), and against the floor, the classifier's passes over as many points alone.
* deflection: 200 deflections and the wavelet step, without a map; against the same in NumPy and scikit-image, image by
  image. Both must change images alike: mean absolute change and PSNR are printed, of the deflection alone, too.
* randomization and shift: the change of the image; against the loop over images with torch's resizing and padding,
  and beside a pass of ResNet-20 over the same images. Both loops draw from a generator, and so does ours; that its
  draws can be keyed to the image instead costs a hash of the pixels.

All contenders run one after the other in each round, in one process, on the same images.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _common import common_arguments, console, interleaved, load_images, machine, print_table, speed, write_rows
from torch import Tensor, nn

from lightning_robust.defenses import PixelDeflection, PixelShift, Randomization, RegionBased
from lightning_robust.defenses.pixel_shift import KING
from lightning_robust.models import create_network

TASKS = ("region", "deflection", "randomization", "shift")


def images_of(args: argparse.Namespace) -> Tensor:
    """Images of the size asked for, enlarged from 32 × 32 where need be, with the noise of a photograph."""
    images, _ = load_images(args.data, args.images, seed=2)
    if args.size != 32:
        images = F.interpolate(images, size=args.size, mode="bicubic")
        images = images + 0.02 * torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    return images.clamp(0, 1)


def change(images: Tensor, changed: Tensor) -> dict[str, float]:
    """Mean absolute change in 8-bit steps, and PSNR in dB."""
    delta = (changed - images).double()
    return {"mean_change": 255 * float(delta.abs().mean()), "psnr": -10 * float(delta.square().mean().log10())}


# -- image by image ----------------------------------------------------------------------------------------------------


def deflect_by_loop(image: np.ndarray, deflections: int, window: int, generator: np.random.Generator) -> np.ndarray:
    """The paper's algorithm for one image ``(H, W, 3)``."""
    height, width, _ = image.shape
    moved = image.copy()
    for _ in range(deflections):
        row, column = generator.integers(height), generator.integers(width)
        while True:
            down, right = generator.integers(-window, window + 1, 2)
            if 0 <= row + down < height and 0 <= column + right < width:
                break
        moved[row, column] = image[row + down, column + right]
    return moved


def deflection_by_loop(images: Tensor, defense: PixelDeflection, denoised: bool = True) -> Tensor:
    from skimage.restoration import denoise_wavelet

    generator, results = np.random.default_rng(0), []
    for image in images.permute(0, 2, 3, 1).numpy():
        moved = deflect_by_loop(image, defense.deflections, defense.window, generator)
        if denoised:
            moved = denoise_wavelet(
                moved, sigma=defense.sigma, mode="soft", method="BayesShrink", convert2ycbcr=True, channel_axis=-1
            )
        results.append(np.clip(moved, 0, 1))
    return torch.from_numpy(np.stack(results)).permute(0, 3, 1, 2).to(images.dtype)


@torch.no_grad()
def region_by_loop(model: nn.Module, images: Tensor, radius: float, votes: int) -> Tensor:
    labels = []
    for image in images:
        points = (image + torch.empty(votes, *image.shape).uniform_(-radius, radius)).clamp(0, 1)
        labels.append(model(points).argmax(1).bincount(minlength=10).argmax())
    return torch.stack(labels)


@torch.no_grad()
def passes_alone(model: nn.Module, points: Tensor, count: int) -> None:
    for start in range(0, count, len(points)):
        model(points[: count - start])


def randomization_by_loop(images: Tensor, defense: Randomization) -> Tensor:
    results = []
    for image in images:
        size = int(torch.randint(defense.low, defense.high, ()))
        room = defense.pad_to - size
        top, left = (int(torch.randint(0, room + 1, ())) for _ in range(2))
        results.append(F.pad(F.interpolate(image[None], size=size), (left, room - left, top, room - top)))
    return torch.cat(results)


def shift_by_loop(images: Tensor) -> Tensor:
    height, width = images.shape[2:]
    results = []
    for image in F.pad(images, (1, 1, 1, 1)):
        down, right = KING[int(torch.randint(0, 8, ()))]
        results.append(image[:, 1 - down : 1 - down + height, 1 - right : 1 - right + width])
    return torch.stack(results)


def resnet20(args: argparse.Namespace) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create_network("resnet20", 10, (3, args.size, args.size)).eval().requires_grad_(False)


# -- tasks -------------------------------------------------------------------------------------------------------------


def measure_region(args: argparse.Namespace, images: Tensor) -> dict[str, Callable[[], Any]]:
    model = resnet20(args)
    defense = RegionBased(model, votes=args.votes, max_batch=args.max_batch)
    points = torch.rand(args.max_batch, *images.shape[1:])
    return {
        "loop over images": lambda: region_by_loop(model, images, defense.radius, args.votes),
        "ours": lambda: defense(images).argmax(1),
        "floor: passes alone": lambda: passes_alone(model, points, args.votes * len(images)),
    }


def measure_deflection(args: argparse.Namespace, images: Tensor) -> dict[str, Callable[[], Any]]:
    defense = PixelDeflection(cam=None, seed=None)  # as the loop draws: anew at each call
    keyed = PixelDeflection(cam=None)
    rows = []
    for denoised in (False, True):
        ours = PixelDeflection(cam=None, sigma=defense.sigma if denoised else 0).transform(images)
        what = "deflected and denoised" if denoised else "deflected"
        rows.append({"result": f"{what}, NumPy and scikit-image"})
        rows[-1] |= change(images, deflection_by_loop(images, defense, denoised))  # type: ignore[arg-type]
        rows.append({"result": f"{what}, ours"})
        rows[-1] |= change(images, ours)  # type: ignore[arg-type]
    print_table("pixel deflection: what is done to the images", rows)
    return {
        "NumPy and scikit-image": lambda: deflection_by_loop(images, defense),
        "ours": lambda: defense.transform(images),
        "ours, draws keyed to the image": lambda: keyed.transform(images),
    }


def measure_randomization(args: argparse.Namespace, images: Tensor) -> dict[str, Callable[[], Any]]:
    side = images.shape[-1]
    largest = side + max(side // 9, 3)  # 35 for 32, 331 for 299
    defense = Randomization(sizes=(side, largest), pad_to=largest, seed=None)
    model = resnet20(args)
    return {
        "loop over images": lambda: randomization_by_loop(images, defense),
        "ours": lambda: defense.transform(images),
        "ours, draws keyed to the image": lambda: defense.with_seed(0).transform(images),
        "a pass of ResNet-20": lambda: model(images),
    }


def measure_shift(args: argparse.Namespace, images: Tensor) -> dict[str, Callable[[], Any]]:
    defense, model = PixelShift(seed=None), resnet20(args)
    return {
        "loop over images": lambda: shift_by_loop(images),
        "ours": lambda: defense.transform(images),
        "ours, draws keyed to the image": lambda: defense.with_seed(0).transform(images),
        "a pass of ResNet-20": lambda: model(images),
    }


def main() -> None:
    parser = common_arguments(__doc__.splitlines()[0])
    parser.add_argument("--task", choices=[*TASKS, "all"], default="all", help="what to measure")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, of which the median is taken")
    parser.add_argument("--images", type=int, default=64, help="images in the batch")
    parser.add_argument("--size", type=int, default=32, help="side of the images")
    parser.add_argument("--votes", type=int, default=1000, help="points of the region vote")
    parser.add_argument("--max-batch", type=int, default=512, help="points that go through the classifier at a time")
    parser.add_argument("--data", type=Path, help=".npz with images (N, H, W, 3) and labels; else made up")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    images = images_of(args)
    measures = {
        "region": measure_region,
        "deflection": measure_deflection,
        "randomization": measure_randomization,
        "shift": measure_shift,
    }
    rows: list[dict[str, Any]] = []
    for task in TASKS if args.task == "all" else (args.task,):
        contenders = measures[task](args, images)
        seconds = interleaved(contenders, args.rounds, task)
        reference = next(iter(contenders))
        table = [{"contender": name, **figures} for name, figures in speed(seconds, reference, len(images)).items()]
        print_table(f"{task}: {len(images)} images of {args.size}×{args.size} ({machine()})", table)
        rows += [{"task": task, **row} for row in table]
    if args.output:
        write_rows(args.output, rows, {"machine": machine(), **vars(args)})
    console.print("times_by_wall and times_by_cpu: how many times the speed of each table's first row")


if __name__ == "__main__":
    main()

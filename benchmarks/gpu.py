"""Images per second and share of peak of PGD-10 training of the CIFAR ResNet-18 on a CUDA device.

    python benchmarks/gpu.py

Rows: fp32 (TF32 off), fp32 with TF32, bf16 autocast; each plain, with the attack on the accelerated stand-in (BatchNorm
folded, channels last), and compiled. A training step is ten attack passes (forward and backward to the image) and one
forward and backward to the weights. The share of peak is those passes' floating-point operations, counted by torch on
the unfolded network, over a large matrix product in the same precision, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lightning_robust.attacks import PGD
from lightning_robust.attacks.acceleration import Accelerated
from lightning_robust.models import create_network


@dataclass
class Row:
    """One way to train."""

    precision: str
    attack_on: str
    images_per_second: float = 0.0
    share_of_peak: float = 0.0
    peak_memory_gib: float = 0.0


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Median of ``repeats`` runs by CUDA events, after three to warm up."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def ceiling(dtype: torch.dtype, size: int = 8192) -> float:
    """FLOP/s of a large matrix product."""
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, 10)


def operations(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Floating-point operations of one training step with PGD-10."""

    def count(function: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    points = images.clone().requires_grad_()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    attack = count(lambda: torch.autograd.grad(F.cross_entropy(network(points), labels), points))
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    training = count(lambda: F.cross_entropy(network(images), labels).backward())
    return 10.0 * attack + training


def train_step(row: Row, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """A step of PGD-10 training as the row says."""
    torch.manual_seed(0)
    network = create_network("resnet18", 10, (3, 32, 32), mean="cifar10").cuda()
    if row.attack_on != "network":
        network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    attack = PGD(eps="8/255", step_size="2/255", steps=10, stop_at_success=False)
    stand_in: nn.Module = network
    if row.attack_on == "stand-in":
        stand_in = Accelerated(network, dtype=torch.bfloat16 if row.precision == "bf16" else None)
    if row.attack_on == "compiled":
        network.compile()
    autocast = torch.autocast("cuda", dtype=torch.bfloat16, enabled=row.precision == "bf16")

    def step() -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = row.precision != "fp32"
        if isinstance(stand_in, Accelerated):
            stand_in.refresh()
        network.train()
        with autocast:
            adversarial = attack(stand_in, images, labels)
            loss = F.cross_entropy(network(adversarial), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def main() -> None:
    """Measure every row and print the table; elsewhere than on CUDA, say so."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=512, help="images of a step")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps of a row")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled rows out")
    parser.add_argument("--output", type=Path, help="also write the numbers to this .json file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py: skipped, there is no CUDA device on this machine.")
        return
    images = torch.rand(options.batch, 3, 32, 32, device="cuda")
    labels = torch.randint(0, 10, (options.batch,), device="cuda")
    work = operations(create_network("resnet18", 10, (3, 32, 32)).cuda(), images[:8], labels[:8]) / 8 * options.batch
    peaks = {}
    for precision, dtype in (("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)):
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        peaks[precision] = ceiling(dtype)
    ways = ["network", "stand-in"] + ([] if options.no_compile else ["compiled"])
    rows = [Row(precision, way) for precision in peaks for way in ways]
    for row in track(rows, description="PGD-10 training"):
        torch.cuda.reset_peak_memory_stats()
        duration = seconds(train_step(row, images, labels), options.repeats)
        row.images_per_second = options.batch / duration
        row.share_of_peak = work / duration / peaks[row.precision]
        row.peak_memory_gib = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.empty_cache()
    table = Table(title=f"PGD-10 training, CIFAR ResNet-18, batch {options.batch}, {torch.cuda.get_device_name()}")
    for column in ("precision", "attack on", "images/s", "share of peak", "peak memory"):
        table.add_column(column, justify="right")
    for row in rows:
        memory = f"{row.peak_memory_gib:.1f} GiB"
        table.add_row(
            row.precision, row.attack_on, f"{row.images_per_second:.0f}", f"{100 * row.share_of_peak:.0f} %", memory
        )
    Console().print(table)
    print("measured ceilings: " + ", ".join(f"{name} {value / 1e12:.0f} TFLOP/s" for name, value in peaks.items()))
    if options.output:
        options.output.write_text(json.dumps([asdict(row) for row in rows], indent=2))


if __name__ == "__main__":
    main()

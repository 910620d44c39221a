"""What ``audit`` can be told: its options, which of them go together, and the data that a checkpoint's run had."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pytorch_lightning.cli import LightningArgumentParser

from lightning_robust.attacks import parse_number
from lightning_robust.audit import EXIT_STATUS, budget_of
from lightning_robust.cli.parser import RobustParser
from lightning_robust.cli.sources import sources
from lightning_robust.datamodules import ImageDataModule
from lightning_robust.defenses import Defense
from lightning_robust.errors import UserError

_STATUS = ", ".join(f"{status} {verdict.replace('_', ' ')}" for verdict, status in EXIT_STATUS.items())


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the user says of model, images and budget; see the command's help."""

    ckpt: str | None
    network: str | None
    program: str | None
    module: str | None
    weights: str | None
    pretrained: bool
    network_args: dict[str, Any]
    normalization: str | None
    eps: float | str
    norm: str
    budget: str
    images: int | None
    split: str
    surrogate: str | None
    seed: int
    batch_size: int
    device: str
    name: str | None
    output: str | None


class AuditParser(RobustParser):
    """The parser of this command alone."""

    def _roots(self, command: str) -> dict[str, Any]:
        roots: dict[str, Any] = {name.partition(".")[0]: Any for name in self._options(command)}
        return roots | {"data": ImageDataModule, "defense": Defense}


def audit_parser() -> LightningArgumentParser:
    """The parser of the command."""
    parser = AuditParser(
        prog="lightning-robust audit",
        description="Finds out whether a model's robust accuracy can be trusted: named checks, adaptive attacks on "
        f"what they find, a verdict. Ends with status {_STATUS} (2: a mistake in the input).",
        default_env=False,
        allow_abbrev=False,
    )
    model = parser.add_argument_group("the model: one of these")
    model.add_argument("--ckpt", help="a checkpoint of a run of this program; its run's config names the data")
    model.add_argument("--network", help="a network by name: an own one, timm/NAME or torchvision/NAME")
    model.add_argument("--program", help="an exported program (torch.export.save), a .pt2 file")
    model.add_argument("--module", help="an nn.Module, or what makes one: package.module:name or file.py:name")
    more = parser.add_argument_group("of the model")
    more.add_argument("--weights", help="with --network: a state dict, also one in RobustBench's style")
    more.add_argument("--pretrained", type=bool, default=False, help="with --network: its published weights")
    more.add_argument("--network_args", type=dict[str, Any], default={}, help="with --network: its options")
    more.add_argument(
        "--normalization",
        help="what the model expects and does not do itself: imagenet, cifar10, cifar100, mnist, none",
    )
    parser.add_subclass_arguments(
        ImageDataModule,
        "data",
        required=False,
        help="the data module, as in the other commands; by default that of the checkpoint's run",
    )
    parser.add_subclass_arguments(
        Defense, "defense", required=False, skip={"model"}, help="a defense to put around the model"
    )
    what = parser.add_argument_group("what is asked")
    what.add_argument("--eps", type=float | str, default="8/255", help="budget in pixel units of [0, 1]")
    what.add_argument("--norm", default="linf", help="linf, l2 or l1")
    what.add_argument("--budget", default="quick", help="quick, standard or full (with AutoAttack)")
    what.add_argument("--images", type=int | None, help="how many; by default 500 (quick) or 1000, drawn by the seed")
    what.add_argument("--split", default="test", help="train, val or test")
    what.add_argument("--surrogate", help="a checkpoint of another model of the data, to make images on")
    what.add_argument("--seed", type=int, default=0, help="of all random numbers")
    what.add_argument("--batch_size", type=int, default=128, help="images that are attacked at a time")
    what.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    what.add_argument("--name", help="name of the model in the results")
    what.add_argument("--output", help="folder of audit.json; by default the checkpoint's run, else a new one in runs/")
    return parser


def with_data(words: list[str]) -> list[str]:
    """Put the data of the checkpoint's run before what the user says of it."""
    said = [(source.path, source.node) for source in sources(words)]
    named = {path[0] for path, _ in said if path}
    if ("data",) in [path for path, _ in said] or "ckpt" not in named:
        return words
    checkpoint = next(str(node.value) for path, node in said if path == ("ckpt",))
    known = run_config(checkpoint)
    if not known or "data" not in known:
        raise UserError(
            f"--ckpt {checkpoint}: no config.yaml of its run lies beside it, so its data is not known: give --data "
            "NAME (--data.root DIR, …)"
        )
    return [words[0], f"--data={json.dumps(known['data'])}", *words[1:]]


def checked(given: Any) -> Given:
    """What can be said before anything is loaded."""
    named = [name for name in ("ckpt", "network", "program", "module") if getattr(given, name) is not None]
    if len(named) != 1:
        told = " and ".join(f"--{name}" for name in named) or "none"
        raise UserError(f"which model? give one of --ckpt, --network, --program and --module ({told} was given)")
    if given.data is None:
        raise UserError("which data? give --data NAME, for example --data CIFAR10 --data.root DIR")
    for name in ("weights", "pretrained"):
        if getattr(given, name) and given.network is None:
            raise UserError(f"--{name} belongs to --network: a --{named[0]} brings its own")
    if given.network is not None and not (given.weights or given.pretrained):
        raise UserError(
            f"--network {given.network} alone has random weights: give --weights FILE, or --pretrained true"
        )
    if given.split not in ("train", "val", "test"):
        raise UserError(f"--split {given.split}: choose train, val or test")
    if given.images is not None and given.images < 1:
        raise UserError(f"--images {given.images}: at least one, and 73 or more for a check to pass")
    if given.batch_size < 1:
        raise UserError(f"--batch_size {given.batch_size}: at least one image")
    if given.norm not in ("linf", "l2", "l1"):
        raise UserError(f"--norm {given.norm}: choose linf, l2 or l1")
    parse_number(given.eps)
    budget_of(given.budget)
    return Given(**{name: getattr(given, name) for name in Given.__dataclass_fields__})


def run_config(checkpoint: str) -> dict[str, Any] | None:
    """The config of the run that a checkpoint lies in, if it does."""
    file = Path(checkpoint).resolve().parent.parent / "config.yaml"
    if not file.is_file():
        return None
    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is no valid YAML: {str(error).splitlines()[0]}") from None
    return loaded if isinstance(loaded, dict) else None

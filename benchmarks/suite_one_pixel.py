"""The one-pixel attack: ours against torchattacks and ART, same population and generations, all as soon as fooled.

Seconds of a whole attack depend on how many candidates it evaluates, and how soon it finds one that fools; the columns
``candidates`` (model evaluations an image) and ``times_per_candidate`` take the two apart. Everybody evolves 400
candidates; torchattacks and ART stop when their best one fools, ours (``stop="label"``) when any does.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any

import torch
from _common import (
    art_classifier,
    console,
    interleaved,
    machine,
    module_or_none,
    print_table,
    published_network,
    speed,
)
from torch import Tensor

from lightning_robust.attacks import accelerate
from lightning_robust.attacks.one_pixel import OnePixel

POPULATION = 400
REFERENCE = "torchattacks"


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows for one pixel and, among ours, for what makes it fast.

    Args:
        args: ``threads``, ``rounds``, ``weights``, ``data``, ``test_data``, ``root``; and, where they are given,
            ``one_pixel_images`` (16) and ``one_pixel_generations`` (15).
    """
    count, generations = getattr(args, "one_pixel_images", 16), getattr(args, "one_pixel_generations", 15)
    model, images, labels, what = published_network(args)
    model.requires_grad_(False)
    with torch.no_grad():
        right = torch.cat([model(part) for part in images.split(64)]).argmax(1) == labels
    images, labels = images[right][:count], labels[right][:count]

    asked: dict[str, int] = {}
    found: dict[str, Tensor] = {}
    contenders: dict[str, Callable[[], None]] = {}
    seen = [0]
    model.register_forward_pre_hook(lambda _, inputs: seen.__setitem__(0, seen[0] + len(inputs[0])))

    def theirs(name: str, attack: Callable[[], Tensor]) -> None:
        def call() -> None:
            seen[0] = 0
            found[name] = attack()
            asked[name] = seen[0]

        contenders[name] = call

    def ours(name: str, stand_in: Any, **settings: Any) -> None:
        def call() -> None:
            attack = OnePixel(population=POPULATION, generations=generations, **{"stop": "label", **settings})
            result = attack.run(model, images, labels, stand_in=stand_in, rounding=False)
            found[name], asked[name] = result.images, int(result.queries.sum())

        contenders[name] = call

    if torchattacks := module_or_none("torchattacks"):
        attack = torchattacks.OnePixel(model, pixels=1, steps=generations, popsize=POPULATION)
        theirs(REFERENCE, lambda: attack(images, labels))
    else:
        console.print("torchattacks is not installed: left out")
    if module_or_none("art"):
        evasion = importlib.import_module("art.attacks.evasion")
        classifier = art_classifier(model, images.shape[1:], 10)
        by_art = evasion.PixelAttack(classifier, th=1, es=1, max_iter=generations)
        theirs("ART", lambda: torch.from_numpy(by_art.generate(images.numpy(), labels.numpy())).float())
    else:
        console.print("adversarial-robustness-toolbox is not installed: left out")
    fast = accelerate(model, dtype=torch.bfloat16)
    ours("ours, plain", None)
    ours("ours, fold + channels_last", accelerate(model))
    ours("ours, fold + channels_last + bf16", fast)
    ours("ours, everything, the paper's stop", fast, stop="confidence")

    seconds = interleaved(contenders, args.rounds, "one pixel")
    reference = REFERENCE if REFERENCE in contenders else next(iter(contenders))
    rows: list[dict[str, Any]] = []
    figures = speed(seconds, reference, len(images))
    for name, figure in figures.items():
        with torch.no_grad():
            fooled = model(found[name]).argmax(1) != labels
        changed = (found[name] - images).abs().amax(1).flatten(1).gt(1e-4).sum(1)
        times = figure["times_by_cpu"]
        rows.append(
            {
                "contender": name,
                **figure,
                "candidates": round(asked[name] / len(images)),
                "times_per_candidate": times * asked[name] / asked[reference],
                "fooled": float(fooled.double().mean()),
                "mean_l0": float(changed[fooled].double().mean()) if fooled.any() else 0.0,
            }
        )
    title = f"one pixel, population {POPULATION}, {generations} generations: {what}, {len(images)} images ({machine()})"
    print_table(title, rows)
    return rows

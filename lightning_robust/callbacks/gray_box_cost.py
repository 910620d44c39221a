"""What a gray-box table will take: its attacks, each with the time that a pass of its model takes here."""

from __future__ import annotations

from collections.abc import Mapping

import pytorch_lightning as pl
import torch
from torch import nn

from lightning_robust.attacks import OptMargin
from lightning_robust.callbacks.attack_cost import Passes, Speed, Task, measured_speed, most_passes
from lightning_robust.callbacks.gray_box_report import ADAPTIVE, READINGS, WHITE, Plan
from lightning_robust.callbacks.gray_box_settings import adapted
from lightning_robust.callbacks.measurement import image_size, num_classes
from lightning_robust.defenses import Defense


def tasks(
    plan: Plan,
    sources: Mapping[str, nn.Module],
    protected: Mapping[str, Defense],
    inside: Mapping[str, nn.Module],
    eot_samples: int,
    module: pl.LightningModule,
) -> list[Task]:
    """Everything that will run, with its upper bound for one image.

    Args:
        plan: which cells there are.
        sources: the networks without a defense, by name.
        protected: the defenses, by name.
        inside: the network in each of them.
        eot_samples: draws at most.
        module: says how large images are, and how many classes there are.
    """
    height, width = image_size(module)
    channels, classes = int(module.image_shape[0]), num_classes(module)  # type: ignore[index]
    features = channels * height * width
    # a generator of its own: the user's random numbers go on as they would
    noise = torch.rand((16, channels, height, width), generator=torch.Generator().manual_seed(0))
    noise = noise.to(module.device).to(module.dtype)
    with torch.autocast(module.device.type, enabled=False):
        plain = {name: measured_speed(network, network, noise) for name, network in sources.items()}
        found = [
            Task(what=f"{name} on {source}", attack=attack, passes=most_passes(attack, features, classes), speed=speed)
            for source, speed in plain.items()
            for name, attack in plan.attacks.items()
        ]
        for label, defense in protected.items():
            speed = measured_speed(defense, inside[label], noise)
            found += _of_defense(plan, label, defense, speed, eot_samples, noise, inside[label], features, classes)
    return found


def _of_defense(
    plan: Plan,
    label: str,
    defense: Defense,
    speed: Speed,
    eot_samples: int,
    noise: torch.Tensor,
    inside: nn.Module,
    features: int,
    classes: int,
) -> list[Task]:
    """The attacks on one defense, and its verdicts."""
    white = plan.ran(WHITE, label)
    found = [
        Task(
            what=f"{name} on {label}",
            attack=attack,
            passes=most_passes(attack, features, classes),
            speed=speed,
            defense=label,
        )
        for name, attack in white.items()
    ]
    draws = defense.draws(eot_samples) if defense.random else [defense]
    one = measured_speed(draws[0], inside, noise) if defense.random else speed
    further = plan.further.get(label, {})
    for name, attack in plan.ran(ADAPTIVE, label).items():
        if name in further:
            alone = isinstance(attack, OptMargin)
            found.append(
                Task(
                    what=f"{name} on {label}",
                    attack=attack,
                    passes=most_passes(attack, features, classes),
                    speed=measured_speed(inside, inside, noise) if alone else speed,
                    defense="" if alone else label,
                )
            )
        elif defense.random or name not in white:
            passes = most_passes(attack, features, classes)
            found.append(
                Task(
                    what=f"adaptive {name} on {label}",
                    attack=adapted(attack, defense, eot_samples),
                    passes=None if passes is None else passes * len(draws),
                    speed=one,
                )
            )
    verdicts = 1 + sum(len(plan.ran(reading, label)) for reading in READINGS)
    found.append(Task(what=f"verdicts of {label}", attack=None, passes=Passes(verdicts), speed=speed, defense=label))
    return found

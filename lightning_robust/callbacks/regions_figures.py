"""The figures of RegionMaps and NeutralizerStudy, from what they counted to what the logger gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytorch_lightning as pl
from torch import Tensor

from lightning_robust.attacks import Attack
from lightning_robust.callbacks.measurement import budget, publish_figure
from lightning_robust.callbacks.regions_directions import Direction
from lightning_robust.callbacks.regions_report import Example, Measured
from lightning_robust.callbacks.regions_tuning import Tuned
from lightning_robust.regions import neutralize
from lightning_robust.report.regions import blob_figure, region_examples, region_representatives


def draw_regions(
    trainer: pl.Trainer,
    stage: str,
    name: str,
    attack: Attack,
    directions: Sequence[Direction],
    examples: Mapping[int, Sequence[Example]],
    measured: Measured,
    representatives: Tensor,
    kind: str,
) -> None:
    """Single images, and the representatives of the directions that have images.

    Args:
        trainer: whose loggers get them.
        stage: of the evaluation.
        name: of callback and attack, starts the files' names.
        attack: for the titles.
        directions: G directions.
        examples: direction to images.
        measured: mean maps.
        representatives: ``(G, H, W)`` regions.
        kind: of representatives, in words.
    """
    when = f"{stage}, epoch {trainer.current_epoch}" if trainer.state.fn == "fit" else stage
    what = f"{type(attack).__name__}, {budget(attack.threat_model)} ({when})"
    shown = [(directions[group].label, example) for group, kept in sorted(examples.items()) for example in kept]
    if shown:
        figure = region_examples(
            [example.image for _, example in shown],
            [example.importance for _, example in shown],
            [example.change for _, example in shown],
            [example.regions for _, example in shown],
            [label for label, _ in shown],
            title=f"Regions of importance and of attack: {what}",
        )
        publish_figure(trainer, f"{name}_examples", stage, figure)
    known = [group for group in range(len(directions)) if int(measured.images[group]) > 0]
    if known:
        figure = region_representatives(
            measured.importance[known],
            measured.change[known],
            representatives[known],
            [f"{directions[g].label}\n({int(measured.images[g])} images)" for g in known],
            title=f"Class representatives ({kind}): {what}",
        )
        publish_figure(trainer, f"{name}_representatives", stage, figure)


def draw_blobs(
    trainer: pl.Trainer,
    stage: str,
    name: str,
    attacks: Mapping[str, Attack],
    directions: Sequence[Direction],
    tuned: Mapping[str, Sequence[Tuned]],
    examples: Mapping[int, Tensor],
) -> None:
    """The blobs of each attack, over an image of each direction that has one.

    Args:
        trainer: whose loggers get them.
        stage: of the evaluation.
        name: of the callback, starts the files' names.
        attacks: name to attack.
        directions: G directions.
        tuned: of each attack the choice of each direction.
        examples: direction to an image ``(C, H, W)``.
    """
    shown = sorted(examples)
    if not shown:
        return
    images = [examples[number] for number in shown]
    for label, attack in attacks.items():
        chosen = [tuned[label][number].candidate for number in shown]
        figure = blob_figure(
            [tuned[label][number].frequency for number in shown],
            [candidate.mask for candidate in chosen],
            images,
            [neutralize(image[None], own.mask.cpu(), own.fill)[0] for own, image in zip(chosen, images, strict=True)],
            [f"{directions[number].label}\nθ = {tuned[label][number].candidate.theta:g}" for number in shown],
            title=f"Attacked and unimportant: {type(attack).__name__}, {budget(attack.threat_model)} ({stage})",
        )
        publish_figure(trainer, f"{name}_{label}_blobs", stage, figure)

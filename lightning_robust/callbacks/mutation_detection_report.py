"""What a detection study writes and prints: the rows of its table, and the areas that were published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from lightning_robust.attacks import CW, FGSM, JSMA, Attack, DeepFool, Transfer
from lightning_robust.callbacks.measurement import num_classes, publish_figure, run_folder
from lightning_robust.detectors import ModelMutation, MutationTestingDetector
from lightning_robust.metrics.detection import NORMAL, WRONG, KindScores, SystemScores, roc
from lightning_robust.report import print_table, roc_curves, sensitivity_histograms

# AUROC of the label change rate in the README of the authors' code for arXiv 1812.05793 (LeNet-5, and GoogLeNet for
# CIFAR-10): data, operator, attack
_PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "MNIST": {
        "fgsm": {"nai": 0.9647, "gf": 0.9639, "ns": 0.9354, "ws": 0.9515},
        "jsma": {"nai": 0.9941, "gf": 0.9957, "ns": 0.9960, "ws": 0.9955},
        "cw": {"nai": 0.9576, "gf": 0.9501, "ns": 0.9089, "ws": 0.9225},
        "black-box": {"nai": 0.9690, "gf": 0.9674, "ns": 0.9439, "ws": 0.9590},
        "deepfool": {"nai": 0.9862, "gf": 0.9837, "ns": 0.9812, "ws": 0.9836},
    },
    "CIFAR-10": {
        "fgsm": {"nai": 0.9000, "gf": 0.8814, "ns": 0.7687, "ws": 0.8476},
        "jsma": {"nai": 0.9737, "gf": 0.9757, "ns": 0.9534, "ws": 0.9737},
        "cw": {"nai": 0.9264, "gf": 0.9230, "ns": 0.8499, "ws": 0.8964},
        "black-box": {"nai": 0.8707, "gf": 0.8370, "ns": 0.7050, "ws": 0.8076},
        "deepfool": {"nai": 0.9686, "gf": 0.9769, "ns": 0.9502, "ws": 0.9731},
    },
}
_ATTACKS: tuple[tuple[type[Attack], str], ...] = (
    (FGSM, "fgsm"),
    (JSMA, "jsma"),
    (CW, "cw"),
    (DeepFool, "deepfool"),
    (Transfer, "black-box"),
)


def published(module: pl.LightningModule, detector: MutationTestingDetector, attack: Attack | None) -> float | None:
    """The area that the README reports for the data, operator and attack, where images and classes are like its own."""
    data = {(1, 28, 28): "MNIST", (3, 32, 32): "CIFAR-10"}.get(tuple(getattr(module, "image_shape", ())))
    if data is None or num_classes(module) != 10 or not isinstance(detector.mutation, ModelMutation):
        return None
    name = next((name for kind, name in _ATTACKS if type(attack) is kind), None)
    return None if name is None else _PUBLISHED[data][name][detector.mutation.operator]


def rates(kind: str, scores: KindScores, system: SystemScores | None) -> dict[str, float]:
    """The numbers of one kind of images to log; without what no image gives."""
    flagged = "false_alarm_rate" if kind in (NORMAL, WRONG) else "detection_rate"
    values = {
        "kappa": scores.kappa,
        "kappa_interval": scores.kappa_interval,
        flagged: scores.flagged,
        "undecided": scores.undecided,
        "mutants": scores.mutants,
    }
    if kind != NORMAL:
        values["auroc"] = scores.auroc
    if system is not None:
        # an attack's image that is refused is no success, a clean one that is refused is not classified
        values["system_acc"] = system.right if kind == NORMAL else 1 - system.fooled
    return {name: float(value) for name, value in values.items() if bool(value.isfinite())}


def row(
    detector: str, title: str, kind: str, scores: KindScores, values: Mapping[str, float], theirs: float | None
) -> dict[str, Any]:
    """A row of the table."""
    return {
        "detector": detector,
        "mutation": title,
        "kind": kind,
        "images": int(scores.images),
        **{
            name: values.get(name)
            for name in ("kappa", "kappa_interval", "detection_rate", "false_alarm_rate", "undecided", "mutants")
        },
        "auroc": values.get("auroc"),
        "auroc_icse19_readme": theirs,
        "system_acc": values.get("system_acc"),
    }


def draw(
    trainer: pl.Trainer,
    name: str,
    stage: str,
    detector: MutationTestingDetector,
    title: str,
    counts: Mapping[str, Tensor],
    areas: Mapping[str, float],
) -> None:
    """Write a detector's ROC curves and histograms of κ, on rank zero, where there are normal images.

    Args:
        trainer: knows the run's folder.
        name: starts the names of the figures.
        stage: "test".
        detector: whose threshold is drawn.
        title: of both figures.
        counts: kind to images ``(M + 1,)`` by how many mutants changed the label.
        areas: kind to the area under its curve.
    """
    if run_folder(trainer) is None or not int(counts[NORMAL].sum()):
        return
    curves = {
        kind: (*roc(counts[NORMAL], values), areas[kind])
        for kind, values in counts.items()
        if kind != NORMAL and int(values.sum())
    }
    title = f"{title} ({stage})"
    if curves:
        publish_figure(trainer, f"{name}_roc", stage, roc_curves(curves, title=title))
    figure = sensitivity_histograms(counts, threshold=detector.test.threshold, natural=(NORMAL, WRONG), title=title)
    publish_figure(trainer, f"{name}_kappa", stage, figure)


def print_study(stage: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of each detector."""

    def percent(value: float | None) -> str | None:
        return None if value is None else f"{100 * value:.2f} %"

    for detector in dict.fromkeys(each["detector"] for each in rows):
        mine = [each for each in rows if each["detector"] == detector]
        quoted = any(each["auroc_icse19_readme"] is not None for each in mine)
        shown = [
            {
                "images of": each["kind"],
                "images": each["images"],
                "mean κ": each["kappa"],
                "±": each["kappa_interval"],
                "detected": percent(each["detection_rate"]),
                "false alarms": percent(each["false_alarm_rate"]),
                "mutants": each["mutants"],
                "undecided": percent(each["undecided"]),
                "AUROC": each["auroc"],
                **({"AUROC, ICSE'19 README": each["auroc_icse19_readme"]} if quoted else {}),
                "accuracy with rejection": percent(each["system_acc"]),
            }
            for each in mine
        ]
        title = (
            f"{detector}: {mine[0]['mutation']}, κ_nor {mine[0]['kappa_nor']:.5f}, threshold {mine[0]['threshold']:.5f}"
        )
        print_table(f"Mutation-testing detection ({stage}), {title}", shown)

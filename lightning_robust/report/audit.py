"""An audit for people: its tables in a terminal, and its figures. All from what ``audit.json`` holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from rich.console import Console

from lightning_robust.report.curves import curve
from lightning_robust.report.figures import DPI, LABEL, SMALL, TITLE, wrap
from lightning_robust.report.tables import print_table

Audit = Mapping[str, Any]
"""The content of ``audit.json``."""

VERDICTS = {
    "trusted": "TRUSTED",
    "masked": "MASKED GRADIENTS",
    "not_enough_evidence": "NOT ENOUGH EVIDENCE",
}
_OUTCOMES = {"pass": "pass", "flag": "FLAG", "unsure": "unsure", "skipped": "skipped"}
_PLAIN, _ADAPTIVE = "#0072b2", "#d55e00"  # Okabe & Ito


def print_audit(audit: Audit) -> None:
    """Print the checks, what is wrong and what mends it, the attacks, and the verdict."""
    print_table(
        f"Audit of {audit['model']}: {audit['images']} images of {audit['data']}, {stated(audit)}, {audit['budget']}",
        [
            {"check": check["title"], "outcome": _OUTCOMES[check["outcome"]], "seen": check["text"]}
            for check in audit["checks"]
        ],
    )
    print_table("Robust accuracy", attack_rows(audit))
    console = Console(highlight=False, markup=False, emoji=False)
    for check in audit["checks"]:
        if check["outcome"] in ("flag", "unsure") and check["mend"]:
            console.print(f"{check['title']}: {_OUTCOMES[check['outcome']]}: {check['mend']}.", soft_wrap=True)
    console.print(f"{VERDICTS[audit['verdict']]}: {audit['sentence']}", soft_wrap=True)


def attack_rows(audit: Audit) -> list[dict[str, Any]]:
    """The attacks as rows of a table."""
    return [
        {
            "attack": attack["name"],
            "robust accuracy": f"{100 * attack['robust_accuracy']:.1f} %",
            "images": attack["images"],
            "": " ".join(
                word
                for word, holds in (("adaptive", attack["adaptive"]), ("on what was left", attack["left_over"]))
                if holds
            ),
            "seconds": f"{attack['seconds']:.1f}",
        }
        for attack in audit["attacks"]
    ]


def check_rows(audit: Audit) -> list[dict[str, Any]]:
    """The checks as rows of a table file."""
    columns = ("name", "outcome", "figure", "text", "rule", "source", "mend", "seconds")
    return [{column: check[column] for column in columns} for check in audit["checks"]]


def stated(audit: Audit) -> str:
    """Norm and ε in words; of the largest change in 255ths, where it is a whole number of them."""
    norm, eps = audit["threat_model"]["norm"], audit["threat_model"]["eps"]
    steps = round(255 * eps)
    whole = norm == "linf" and abs(255 * eps - steps) < 1e-6
    return f"{norm} ε = " + (f"{steps}/255" if whole else f"{eps:.4g}")


def audit_figures(audit: Audit) -> dict[str, Figure]:
    """The audit's figures by name: attacks, accuracy over ε, and slices of the loss."""
    figures = {"audit_attacks": attack_bars(audit)}
    if audit.get("curve"):
        figures["audit_eps"] = eps_curve(audit)
    if audit.get("landscape", {}).get("slices"):
        figures["audit_landscape"] = loss_slices(audit)
    return figures


def attack_bars(audit: Audit) -> Figure:
    """A bar for each attack, in the order in which they ran, clean accuracy first and what withstood all last."""
    rows = [
        ("clean", audit["clean_accuracy"], False),
        *(
            (_label(attack, audit["images"]), attack["robust_accuracy"], attack["adaptive"])
            for attack in audit["attacks"]
        ),
        ("everything together", audit["robust_accuracy"], False),
    ]
    height = 1.9 + 0.3 * len(rows)
    figure = _figure(8, height)
    axes = figure.add_subplot()
    places = np.arange(len(rows))[::-1]
    low, high = audit["confidence_interval"]
    for place, (_, value, adaptive) in zip(places, rows, strict=True):
        colour = _ADAPTIVE if adaptive else _PLAIN
        axes.barh(place, value, color=colour, hatch="//" if adaptive else None, edgecolor="white", height=0.8)
        end = value if place else max(value, high)
        axes.text(end + 0.01, place, f"{100 * value:.1f} %", va="center", fontsize=SMALL)
    axes.plot([low, high], [0, 0], color="black", linewidth=2, marker="|", markersize=8)
    axes.set_yticks(places, [wrap(name, 330, SMALL) for name, _, _ in rows], fontsize=SMALL)
    axes.set_xlim(0, 1.15)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.set_xlabel("share of the images that are classified rightly and withstood", fontsize=LABEL)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        wrap(f"Audit of {audit['model']}: {stated(audit)}, {audit['images']} images", 700, TITLE),
        fontsize=TITLE,
        pad=12,
        parse_math=False,
    )
    handles = [
        Patch(facecolor=_PLAIN, label="as usual"),
        Patch(facecolor=_ADAPTIVE, hatch="//", edgecolor="white", label="adaptive"),
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=LABEL,
        title="+: on what the attacks before it had left",
        title_fontsize=SMALL,
    )
    return figure


def _label(attack: Mapping[str, Any], images: int) -> str:
    name = f"+ {attack['name']}" if attack["left_over"] else str(attack["name"])
    return name if attack["images"] == images else f"{name} ({attack['images']} images)"


def eps_curve(audit: Audit) -> Figure:
    """Accuracy under PGD as ε grows."""
    known = audit["curve"]
    return curve(
        known["eps"],
        {"PGD on rescaled logits": known["accuracy"]},
        f"ε ({audit['threat_model']['norm']}, pixel units of [0, 1])",
        "robust accuracy",
        f"Accuracy as ε grows: {audit['model']}, {known['images']} images",
    )


def loss_slices(audit: Audit) -> Figure:
    """The cross-entropy around some images: along the gradient's direction, and along a random one."""
    landscape = audit["landscape"]
    steps, slices = landscape["step"], landscape["slices"]
    columns = min(len(slices), 4)
    figure = _figure(3.1 * columns + 1.2, 4.0)
    grids = [np.asarray(entry["loss"], dtype=float) for entry in slices[:columns]]
    for number, (entry, grid) in enumerate(zip(slices, grids, strict=False)):
        axes = figure.add_subplot(1, columns, number + 1)
        shown = axes.imshow(
            grid, origin="lower", cmap="viridis", extent=(steps[0], steps[-1], steps[0], steps[-1]), aspect="equal"
        )
        axes.plot(0, 0, marker="+", color="white", markersize=10)
        axes.set_title(f"image {entry['image']}", fontsize=LABEL)
        axes.set_xlabel("random direction (ε)", fontsize=SMALL)
        if number == 0:
            axes.set_ylabel("gradient's direction (ε)", fontsize=SMALL)
        axes.tick_params(labelsize=SMALL)
        bar = figure.colorbar(shown, ax=axes, shrink=0.7, format="%.2g")
        bar.ax.tick_params(labelsize=SMALL)
        if number == columns - 1:
            bar.set_label("cross-entropy", fontsize=SMALL)
    title = wrap(f"Cross-entropy around the image (+): {audit['model']}", 300 * columns, TITLE)
    figure.suptitle(title, fontsize=TITLE, parse_math=False)
    return figure


def _figure(width: float, height: float) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)  # inches
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure

"""What NeutralizerStudy counted, as rows of its tables, and words: Tables II and III of arXiv 2011.10794."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_robust.attacks import Attack
from lightning_robust.callbacks.measurement import budget
from lightning_robust.callbacks.regions_directions import Direction
from lightning_robust.callbacks.regions_published import Problem, published
from lightning_robust.callbacks.regions_tuning import Tuned
from lightning_robust.defenses.neutralizer import Reading
from lightning_robust.metrics import falls, wilson_interval
from lightning_robust.report import print_table

CASES = ("known", "predicted", "pair")
"""Whose blob is blanked."""
READINGS: tuple[Reading, ...] = ("write", "held", "adaptive")
"""What the attacker may do and know."""
SCORES = ("clean", "adv", "mod", *READINGS)

Counts = Mapping[str, tuple[int, int]]


def rows(
    attacks: Mapping[str, Attack],
    directions: Sequence[Direction],
    tuned: Mapping[str, Sequence[Tuned]],
    counts: Counts,
    problem: Problem | None,
) -> list[dict[str, Any]]:
    """A row for each attack, direction and blob: six scores, each with its interval; the paper's beside FGSM."""
    table: list[dict[str, Any]] = []
    for attack, given in attacks.items():
        for number, direction in enumerate(directions):
            best = tuned[attack][number]
            for case in CASES:
                start = f"{attack}/{direction.key}"
                cells = {"clean": f"clean/{direction.key}", "adv": f"{start}/adv", "mod": f"{start}/{case}/mod"}
                cells |= {reading: f"{start}/{case}/{reading}" for reading in READINGS}
                row: dict[str, Any] = {
                    "attack": attack,
                    "budget": budget(given.threat_model),
                    "direction": direction.label,
                    "blob_of": case,
                    "images": counts[cells["clean"]][1],
                }
                for name, cell in cells.items():
                    right, images = counts[cell]
                    low, high = wilson_interval(right, images)
                    row |= {name: right / images if images else None, f"{name}_low": low, f"{name}_high": high}
                right, images = counts[f"{start}/leak"] if case == "known" else (0, 0)
                row["leak"] = right / images if images else None
                known = row["held"] is not None and row["adaptive"] is not None
                row["falls"] = falls(row["held"], row["adaptive"]) if known else None
                row |= {
                    "roi_threshold": str(best.candidate.roi),
                    "roa_threshold": str(best.candidate.roa),
                    "theta": best.candidate.theta,
                    "fill": best.candidate.fill,
                    "blob_share": float(best.candidate.mask.double().mean()),
                }
                if problem is not None:
                    paper = published(problem, direction.source, direction.target, given)
                    for name in ("clean", "mod", "adv", "mod_adv"):
                        row[f"paper_{name}"] = None if paper is None else getattr(paper, name) / 100
                table.append(row)
    return table


def tuned_rows(directions: Sequence[Direction], tuned: Mapping[str, Sequence[Tuned]]) -> list[dict[str, Any]]:
    """What was chosen, with its scores on validation images."""
    return [
        {"attack": attack, **next(row for row in each.rows if row["chosen"])}
        for attack, found in tuned.items()
        for each in found
    ]


def print_rows(table: list[dict[str, Any]], chosen: list[dict[str, Any]], reading: str) -> None:
    """Print the tuned values, Table II and Table III."""
    print_table(
        f"Tuned on validation images: clean score kept, score under attack ({reading}) raised",
        [
            {
                "attack": row["attack"],
                "direction": row["direction"],
                "δ₁": row["roi_threshold"],
                "δ₂": row["roa_threshold"],
                "θ": f"{row['theta']:g}",
                "fill": row["fill"],
                "blob": f"{row['blob_share']:.1%}",
                "images": row["images"],
                "clean": f"{row['clean']:.1%}",
                "mod": f"{row['mod']:.1%}",
                "mod-adv": f"{row['mod_adv']:.1%}",
                "": "" if row["keeps_clean"] else "costs more than the tolerance",
            }
            for row in chosen
        ],
    )
    paper = any("paper_clean" in row for row in table)
    known = [row for row in table if row["blob_of"] == "known"]
    first = known[0]["attack"] if known else ""
    print_table(
        "Table II: clean and neutralised, %, with 95 % intervals; leak: other classes' images that the blob turns",
        [
            {
                "attack": row["attack"],
                "direction": row["direction"],
                "blob of": row["blob_of"],
                "images": row["images"],
                "clean": _cell(row, "clean") if row["attack"] == first and row["blob_of"] == "known" else "",
                "mod": _cell(row, "mod"),
                "leak": "" if row["leak"] is None else f"{100 * row['leak']:.1f}",
                **({"paper: clean, mod": _paper(row, "clean", "mod")} if paper and row["blob_of"] == "known" else {}),
            }
            for row in table
        ],
    )
    print_table(
        "Table III: under attack, %, with 95 % intervals",
        [
            {
                "attack": f"{row['attack']} ({row['budget']})",
                "direction": row["direction"],
                "blob of": row["blob_of"],
                "adv": _cell(row, "adv") if row["blob_of"] == "known" else "",
                "mod-adv, writes": _cell(row, "write"),
                "held": _cell(row, "held"),
                "adaptive": _cell(row, "adaptive"),
                "": "FALLS" if row["falls"] else "",
                **(
                    {"paper: adv, mod-adv": _paper(row, "adv", "mod_adv")}
                    if paper and row["blob_of"] == "known"
                    else {}
                ),
            }
            for row in table
        ],
    )


def _cell(row: Mapping[str, Any], name: str) -> str | None:
    if row[name] is None:
        return None
    return f"{100 * row[name]:.1f} [{100 * row[f'{name}_low']:.1f}, {100 * row[f'{name}_high']:.1f}]"


def _paper(row: Mapping[str, Any], *names: str) -> str | None:
    values = [row[f"paper_{name}"] for name in names]
    return None if None in values else ", ".join(f"{100 * value:.2f}" for value in values)

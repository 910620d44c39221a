"""What RegionMaps counted, as representatives, rows of its table, and words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_robust.attacks import Attack
from lightning_robust.callbacks.measurement import budget
from lightning_robust.callbacks.regions_directions import Direction
from lightning_robust.callbacks.regions_published import Problem, published
from lightning_robust.metrics.regions import RegionFrequencies
from lightning_robust.metrics.regions_similarity import GroupMeanScores, map_similarity
from lightning_robust.regions import (
    ActivationMap,
    Region,
    Threshold,
    components,
    isolate,
    morans_i_test,
    region_shares,
    unit_scale,
)
from lightning_robust.report import print_table

SHARES = ("share_uv", "share_u_only", "share_v_only", "share_neither")
LOGGED = ("images", "ssim", "ssim_representatives", *SHARES, "overlap")
"""Columns that are logged; the table has more."""


@dataclass(frozen=True)
class Example:
    """One image's maps.

    Attributes:
        image: ``(C, H, W)``.
        importance: ``(H, W)`` in [0, 1].
        change: ``(H, W)``, pixel units.
        regions: ``(H, W)`` numbers of :class:`~lightning_robust.regions.Region`.
    """

    image: Tensor
    importance: Tensor
    change: Tensor
    regions: Tensor


@dataclass(frozen=True)
class Measured:
    """What was counted of one attack, over G directions.

    Attributes:
        importance: ``(G, H, W)`` mean maps; NaN of a direction without images.
        images: ``(G,)`` how many.
        change: ``(G, H, W)`` mean maps.
        frequencies: of the four regions.
        similarity: SSIM of each image's two maps.
        statistics: name to means over images.
    """

    importance: Tensor
    images: Tensor
    change: Tensor
    frequencies: RegionFrequencies
    similarity: GroupMeanScores
    statistics: Mapping[str, GroupMeanScores]


def representatives(measured: Measured, threshold: Threshold, union: bool) -> Tensor:
    """``(G, H, W)`` the four regions of each direction's mean maps, or of the unions; -1 of one without images."""
    if union:
        regions = measured.frequencies.union.cpu()
    else:
        roi = threshold.region(measured.importance.nan_to_num(0))
        regions = isolate(roi, threshold.region(measured.change.nan_to_num(0)))
    return torch.where((measured.images > 0)[:, None, None], regions, -1)


def rows(
    name: str,
    attack: Attack,
    directions: Sequence[Direction],
    measured: Measured,
    regions: Tensor,
    *,
    permutations: int,
    problem: Problem | None = None,
) -> list[dict[str, Any]]:
    """One row a direction; NaN for one without images. The paper's numbers stand beside FGSM alone, its attack."""
    table = []
    for number, direction in enumerate(directions):
        row: dict[str, Any] = {
            "attack": name,
            "budget": budget(attack.threat_model),
            "direction": direction.label,
            "images": int(measured.images[number]),
        }
        table.append(row | _numbers(number, measured, regions[number], permutations))
        paper = published(problem, direction.source, direction.target, attack)
        if problem is not None:
            row_paper = (None, None) if paper is None else (paper.ssim, paper.ssim_representatives)
            table[-1] |= dict(zip(("paper_ssim", "paper_ssim_representatives"), row_paper, strict=True))
    return table


def _numbers(number: int, measured: Measured, regions: Tensor, permutations: int) -> dict[str, Any]:
    """Everything of one direction."""
    low, high = measured.similarity.interval(number)
    nothing = float("nan")
    found: dict[str, Any] = {"ssim": float(measured.similarity.mean[number]), "ssim_low": low, "ssim_high": high}
    shares = measured.frequencies.shares[number].tolist()
    statistics = {f"mean_{name}": float(scores.mean[number]) for name, scores in measured.statistics.items()}
    if int(measured.images[number]) == 0:
        found |= {"ssim_representatives": nothing, **dict.fromkeys(SHARES, nothing), **statistics}
        return found | {"overlap": nothing}
    looked, change = measured.importance[number], measured.change[number]
    found["ssim_representatives"] = float(map_similarity(unit_scale(looked)[None], unit_scale(change)[None]))
    found |= dict(zip(SHARES, shares, strict=True)) | statistics
    whole = region_shares(regions)
    found |= {f"representative_{name}": float(share) for name, share in zip(SHARES, whole, strict=True)}
    u, v = float(whole[Region.UV] + whole[Region.U_ONLY]), float(whole[Region.UV] + whole[Region.V_ONLY])
    found["overlap"] = float(whole[Region.UV]) / (u * v) if u * v > 0 else nothing
    for name, first, second in (
        ("importance", looked, None),
        ("change", change, None),
        ("cross", looked, change),
    ):
        test = morans_i_test(first, second, permutations=permutations)
        found |= {f"moran_{name}": test.i, f"moran_{name}_p": test.p_value}
    roi = (regions == Region.UV) | (regions == Region.U_ONLY)
    roa = (regions == Region.UV) | (regions == Region.V_ONLY)
    parts = components(torch.stack([roi, roa]))
    for place, name in enumerate(("importance", "change")):
        found |= {
            f"components_{name}": int(parts.count[place]),
            f"largest_component_{name}": float(parts.largest[place]),
        }
    return found


_FLAT = 0.2  # share of flat maps from which on it is told


def warnings(table: Sequence[Mapping[str, Any]], activation: ActivationMap | None = None) -> list[str]:
    """What thresholds left empty or full, and maps that say nothing, in words."""
    told = []
    for row in table:
        if "representative_share_uv" not in row:
            continue
        flat = row["mean_flat_importance"]
        if flat > _FLAT:
            how = "" if activation is None else f" ({activation.method} at {activation.layer})"
            told.append(
                f"{row['direction']}: the activation map of {flat:.0%} of the images is flat{how}: by it nothing "
                "speaks for their class; take the method hires_cam, or another layer"
            )
        inside = {
            "importance": row["representative_share_uv"] + row["representative_share_u_only"],
            "attack": row["representative_share_uv"] + row["representative_share_v_only"],
        }
        for what, share in inside.items():
            if share == 0 or share >= 1:
                state, mend = ("empty", "lower") if share == 0 else ("the whole image", "raise")
                told.append(
                    f"{row['attack']}, {row['direction']}: the representative region of {what} is {state}: {mend} "
                    "representative_threshold"
                )
        each = {"importance": row["share_uv"] + row["share_u_only"], "attack": row["share_uv"] + row["share_v_only"]}
        for what, share in each.items():
            if share == 0 or share >= 1:
                state, mend = ("empty", "lower") if share == 0 else ("the whole image", "raise")
                setting = "roi_threshold" if what == "importance" else "roa_threshold"
                told.append(
                    f"{row['attack']}, {row['direction']}: every image's region of {what} is {state}: {mend} {setting}"
                )
    return told


def print_rows(stage: str, table: list[dict[str, Any]]) -> None:
    """Print Table I, the shares, and whether pixels lie together."""
    shown = []
    for row in table:
        line = {
            "attack": f"{row['attack']} ({row['budget']})",
            "direction": row["direction"],
            "images": row["images"],
            "SSIM, mean of samples": _with_interval(row["ssim"], row["ssim_low"], row["ssim_high"]),
            "of representatives": _shown(row["ssim_representatives"]),
        }
        if "paper_ssim" in row:
            line |= {
                "paper: samples": _shown(row["paper_ssim"]),
                "paper: representatives": _shown(row["paper_ssim_representatives"]),
            }
        shown.append(line)
    print_table(f"SSIM of region of importance and region of attack ({stage})", shown)
    shown = [
        {
            "attack": row["attack"],
            "direction": row["direction"],
            **{title: _percent(row[share]) for title, share in zip(("UV", "UV̄", "ŪV", "ŪV̄"), SHARES, strict=True)},
            "overlap (1: chance)": _shown(row["overlap"], 2),
            "Moran's I, importance": _moran(row, "importance"),
            "change": _moran(row, "change"),
            "between": _moran(row, "cross"),
            "parts": f"{row.get('components_importance', '–')}, {row.get('components_change', '–')}",
        }
        for row in table
    ]
    print_table(
        f"The four regions, mean over images, and whether pixels of the representatives lie together ({stage})", shown
    )


def _moran(row: Mapping[str, Any], name: str) -> str | None:
    value = row.get(f"moran_{name}")
    if value is None or not math.isfinite(value):
        return None
    return f"{value:.2f} (p {row[f'moran_{name}_p']:.3f})"


def _shown(value: float | None, digits: int = 4) -> str | None:
    return None if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _percent(value: float) -> str | None:
    return f"{100 * value:.1f} %" if math.isfinite(value) else None


def _with_interval(value: float, low: float, high: float) -> str | None:
    if not math.isfinite(value):
        return None
    return f"{value:.4f}" if not math.isfinite(low) else f"{value:.4f} [{low:.4f}, {high:.4f}]"

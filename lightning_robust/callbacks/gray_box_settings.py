"""Which names and settings make a gray-box table, and what becomes of an attack by one who knows the defense."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_robust.attacks import EOT, Attack, External, OnePixel, RandomNoise, Square, Transfer
from lightning_robust.callbacks.gray_box_report import NONE, PRM, WORST
from lightning_robust.defenses import Defense
from lightning_robust.errors import UserError

if TYPE_CHECKING:
    from lightning_robust.callbacks.gray_box_table import GrayBoxTable

QUERY = (OnePixel, Square, RandomNoise, External, Transfer)
"""Attacks that do not go by the gradients of what they attack."""

FOREIGN = (External, Transfer)
"""Attacks that ask another model, or by another library's code: no average over a defense's draws gets into them."""


def adapted(attack: Attack, defense: Defense, samples: int) -> Attack:
    """What an attack becomes in the hands of one who knows the defense.

    Against a defense that draws: by EOT, the queries of a gradient-free attack as the gradients of another. The
    one-pixel attack then goes on until it is confident: one that stops as soon as the mean of the draws flips fools
    only half of them. Against a defense that draws nothing there is nothing to average over: the attack as it is.

    Args:
        attack: as it was given.
        defense: which is attacked.
        samples: draws at most.
    """
    if not defense.random:
        return attack
    if isinstance(attack, OnePixel):
        attack = attack.replace(stop="confidence")
    return EOT(attack=attack, samples=samples)


def check(table: GrayBoxTable) -> None:
    """Refuse names and settings that make no table.

    Raises:
        UserError: naming the setting and the mend.
    """
    both = {**table.defenses, **table.prm_defenses}
    if not table.attacks or not both:
        raise UserError("GrayBoxTable: name at least one attack and one defense")
    if len(both) < len(table.defenses) + len(table.prm_defenses):
        twice = next(label for label in table.defenses if label in table.prm_defenses)
        raise UserError(f"GrayBoxTable: two defenses are called {twice!r}: rename one")
    for label in (*table.attacks, *both):
        if not label or "/" in label or label in (NONE, PRM, WORST, "clean"):
            raise UserError(f"GrayBoxTable: {label!r} cannot be a name: it becomes part of logged names, or is taken")
    for setting in ("white_box", "adaptive"):
        unknown = [label for label in getattr(table, setting) if label not in table.attacks]
        if unknown:
            raise UserError(
                f"GrayBoxTable: {setting} names {unknown[0]!r}, which is not among {', '.join(table.attacks)}"
            )
    foreign = [label for label in table.adaptive if isinstance(table.attacks[label], FOREIGN)]
    if foreign:
        raise UserError(
            f"GrayBoxTable: adaptive names {foreign[0]!r}, which cannot average over what a defense draws (it asks "
            "another model, or by another library): leave it out there, or name it in white_box"
        )
    lost = [label for label in table.further_adaptive if label not in both]
    if lost:
        raise UserError(f"GrayBoxTable: further_adaptive names {lost[0]!r}, which is not among {', '.join(both)}")
    clash = [label for label in map(row_name, table.further_adaptive.values()) if label in table.attacks]
    if clash:
        raise UserError(
            f"GrayBoxTable: the row of a further_adaptive attack would be called {clash[0]!r}, as one of the "
            "attacks is: rename that one"
        )
    if table.eot_samples < 1:
        raise UserError(f"GrayBoxTable: eot_samples={table.eot_samples}: at least one draw is needed")
    if table.acceleration not in ("exact", "bf16", "none"):
        raise UserError(f"GrayBoxTable: acceleration={table.acceleration!r}: choose exact, bf16 or none")
    for label, defense in both.items():
        if defense.random and defense.seed is None:
            raise UserError(
                f"GrayBoxTable: {label} draws without a seed, so that no number could be repeated: give it a seed"
            )


def row_name(attack: Attack) -> str:
    """What the row of a further adaptive attack is called."""
    return type(attack).__name__.lower()

"""What a defense is worth, from accuracies."""

from __future__ import annotations

import math


def defense_rate(clean: float, attacked: float, defended: float) -> float:
    """The share of what an attack took that a defense gives back: 1 - (clean - defended) / (clean - attacked).

    That is how the code of Hwang et al. (niffler92/where-adversarial-added, ``defender.py``) defines it. 1: as if there
    had been no attack; 0: as if there were no defense; below 0: worse than no defense; above 1: better than clean. It
    measures one attack that does not know of the defense and says nothing of one that does.

    Args:
        clean: accuracy of the undefended model on clean images.
        attacked: accuracy of the undefended model under the attack.
        defended: accuracy of the defended model on the same adversarial images.

    Returns:
        The rate; NaN where the attack took nothing (``clean == attacked``), so that there is nothing to give back.
        (That code says 1 there, as if the defense had earned it.)

    Example:
        >>> round(defense_rate(clean=0.9, attacked=0.1, defended=0.7), 4)
        0.75
        >>> defense_rate(clean=0.9, attacked=0.9, defended=0.9)
        nan
    """
    if clean == attacked:
        return math.nan
    return 1 - (clean - defended) / (clean - attacked)


def falls(gray_box: float, adaptive: float) -> bool:
    """Whether an adaptive attack leaves less than half of the accuracy that the gray-box attack left.

    Half is far more than chance explains where a table has at least some fifty images, and far less than the loss that
    every model has under a stronger attack. Where the gray-box attack left nothing, there was nothing to fall.

    Args:
        gray_box: accuracy of the defended model under an attack that does not know of the defense.
        adaptive: its accuracy under the same attack, adapted to it.

    Example:
        >>> falls(gray_box=0.8, adaptive=0.1), falls(gray_box=0.5, adaptive=0.4), falls(gray_box=0.0, adaptive=0.0)
        (True, False, False)
    """
    return adaptive < 0.5 * gray_box

"""Images before and after an attack, side by side with what changed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from lightning_robust.errors import UserError
from lightning_robust.report.figures import LABEL, SMALL, TITLE, PixelFigure, as_array, text_height, wrap

_SIDE = 168  # screen pixels of an image's longer side, about
_MOST_EXAMPLES = 8
_ONE_BLOCK = 3  # up to so many examples stand in one block of rows, more in two
_RIGHT, _WRONG = "#1b7837", "#b2182b"  # green and red that differ in brightness too
_NORMS = {"linf": "L∞", "l2": "L2", "l1": "L1", "l0": "L0"}


def adversarial_examples(
    clean: Tensor | np.ndarray,
    adversarial: Tensor | np.ndarray,
    labels: Sequence[int] | Tensor,
    clean_predictions: Sequence[int] | Tensor,
    adversarial_predictions: Sequence[int] | Tensor,
    class_names: Sequence[str],
    *,
    title: str,
    eps: float | str | None = None,
    norm: str | None = None,
    clean_confidence: Sequence[float] | Tensor | None = None,
    adversarial_confidence: Sequence[float] | Tensor | None = None,
) -> Figure:
    """A row for each image: clean, adversarial, and their difference enlarged around grey.

    Above each image stands what the model takes it for: green where that is the label, red where it is not (then the
    label stands below).

    Args:
        clean: ``(N, C, H, W)`` in [0, 1] with one or three channels; the first 8 images are shown.
        adversarial: ``(N, C, H, W)`` in [0, 1].
        labels: N true classes.
        clean_predictions: N classes predicted for the clean images.
        adversarial_predictions: N classes predicted for the adversarial images.
        class_names: a name for each class.
        title: what attack on what model.
        eps: the budget in pixel units of [0, 1], for the column title.
        norm: "linf", "l2", "l1" or "l0", for the column title.
        clean_confidence: N probabilities in [0, 1] of the clean predictions.
        adversarial_confidence: N probabilities in [0, 1] of the adversarial predictions.

    Returns:
        A figure that is not tied to any window. The factor of the difference stands in its column's title: the largest
        change becomes half of the scale, so that grey is no change, white and black the largest.

    Raises:
        UserError: for tensors that do not fit each other, other numbers of channels, and classes without a name.
    """
    before, after = as_array(clean, "clean images", 4), as_array(adversarial, "adversarial images", 4)
    if before.shape != after.shape or before.shape[1] not in (1, 3):
        raise UserError(
            f"adversarial_examples: clean images of shape {before.shape} and adversarial ones of shape {after.shape}: "
            "both are (N, 1 or 3, H, W)"
        )
    count = len(before)
    truth = _classes(labels, "labels", count, len(class_names))
    predicted = [
        _classes(clean_predictions, "clean_predictions", count, len(class_names)),
        _classes(adversarial_predictions, "adversarial_predictions", count, len(class_names)),
    ]
    confidence = [
        None if values is None else as_array(np.asarray(values), name, 1)
        for name, values in (
            ("clean_confidence", clean_confidence),
            ("adversarial_confidence", adversarial_confidence),
        )
    ]
    for values in confidence:
        if values is not None and len(values) != count:
            raise UserError(f"adversarial_examples: {len(values)} confidences for {count} images")

    shown = min(count, _MOST_EXAMPLES)
    before, after = before[:shown], after[:shown]
    difference = after - before
    largest = float(np.abs(difference).max())
    factor = max(1, round(0.5 / largest)) if largest > 0 else 1
    pictures = [before, after, np.clip(0.5 + factor * difference, 0, 1)]

    scale = max(1, round(_SIDE / max(before.shape[2:])))
    panel_h, panel_w = before.shape[2] * scale, before.shape[3] * scale
    cell_w = max(panel_w, 130) + 22
    captions = [
        [
            _caption(class_names, truth[i], predicted[kind][i], confidence[kind], i, cell_w - 6) if kind < 2 else ""
            for kind in range(3)
        ]
        for i in range(shown)
    ]
    caption_h = max(text_height(text, SMALL) for row in captions for text in row) + 8
    headings = [
        wrap(text, cell_w - 8, LABEL)
        for text in ("clean", f"adversarial\n{_budget(eps, norm)}".strip(), f"difference × {factor}\n(grey: no change)")
    ]
    heading_h = max(text_height(text, LABEL) for text in headings) + 12

    blocks = 1 if shown <= _ONE_BLOCK else 2
    rows = -(-shown // blocks)
    block_w, block_gap, margin = 3 * cell_w, 36, 20
    total = max(blocks * block_w + (blocks - 1) * block_gap + 2 * margin, 420)
    title = wrap(title, total - 40, TITLE)
    top = 24 + text_height(title, TITLE)
    cell_h = caption_h + panel_h + 16
    page = PixelFigure(total, top + heading_h + rows * cell_h + 8)
    page.text(total / 2, 14, title, fontsize=TITLE)
    start = (total - blocks * block_w - (blocks - 1) * block_gap) / 2
    for block in range(blocks):
        for kind, heading in enumerate(headings):
            x = start + block * (block_w + block_gap) + (kind + 0.5) * cell_w
            page.text(x, top, heading, fontsize=LABEL, fontweight="bold")
    for i in range(shown):
        block, row = divmod(i, rows)
        y = top + heading_h + row * cell_h
        for kind, images in enumerate(pictures):
            middle = round(start + block * (block_w + block_gap) + (kind + 0.5) * cell_w)
            axes = page.axes(middle - panel_w // 2, round(y + caption_h), panel_w, panel_h)
            axes.set(xticks=[], yticks=[])
            picture = np.broadcast_to(images[i], (3, *images[i].shape[1:])).transpose(1, 2, 0)
            axes.imshow(picture, interpolation="nearest")
            if kind < 2:
                colour = _RIGHT if predicted[kind][i] == truth[i] else _WRONG
                page.text(middle, y + caption_h - 4, captions[i][kind], fontsize=SMALL, color=colour, va="bottom")
                for spine in axes.spines.values():
                    spine.set(edgecolor=colour, linewidth=2)
    return page.figure


def _caption(
    names: Sequence[str], truth: int, predicted: int, confidence: np.ndarray | None, i: int, width: float
) -> str:
    sure = "" if confidence is None else f" ({confidence[i]:.0%})"
    text = f"{names[predicted]}{sure}"
    if predicted != truth:
        text += f"\nlabel: {names[truth]}"
    return wrap(text, width, SMALL)


def _budget(eps: float | str | None, norm: str | None) -> str:
    """The budget as the field writes it: L∞, ε = 8/255."""
    parts = [] if norm is None else [_NORMS.get(norm, norm)]
    if eps is not None:
        if not isinstance(eps, str):
            levels = float(eps) * 255
            whole = norm in (None, "linf") and levels >= 0.5 and abs(levels - round(levels)) < 1e-3
            eps = f"{round(levels)}/255" if whole and levels < 64 else f"{float(eps):.4g}"
        parts.append(f"ε = {eps}")
    return ", ".join(parts)


def _classes(values: Sequence[int] | Tensor, name: str, count: int, num_classes: int) -> list[int]:
    classes = [int(value) for value in values]
    if len(classes) != count or not all(0 <= value < num_classes for value in classes):
        raise UserError(
            f"adversarial_examples: {name} are {count} classes, one an image, each with one of the {num_classes} class "
            "names"
        )
    return classes

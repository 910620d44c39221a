"""The figures of a run's folder: what each shows, in words, and how they go into a page of a few megabytes."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from lightning_robust.report.page.words import words_of

_EPOCHS_SHOWN = 4
_WIDTHS = (1400, 900, 600)  # screen pixels that a picture is shrunk to where the page would grow too large
_ALONE = 180_000  # bytes: a file up to this size stays as it is
_QUALITY = 82
_ROW = 1000  # screen pixels
_STAGE = re.compile(r"(?P<name>.+)_(?P<stage>test|val|predict)(?:_epoch(?P<epoch>\d+))?")

# beginning of a file's name, section, words, and what a reader who cannot see it is told
_KINDS: tuple[tuple[str, str, str, str], ...] = (
    ("input_gradient_iou", "heatmaps", "Mean |∇x| and the designated pixels", "Colour map with some pixels outlined"),
    (
        "input_gradient_per_class",
        "heatmaps",
        "Mean input gradient per class",
        "One colour map of mean |∇x| for each class",
    ),
    ("input_gradient", "heatmaps", "Mean input gradient |∇x|", "Colour map: a pixel's mean |∇x|, bright is large"),
    ("masked_pgd", "heatmaps", "Attacks within the pixels of most and of least mean |∇x|", "Accuracy curves"),
    ("lambda_sweep_maps", "sweeps", "Mean |∇x| for some λ", "Row of colour maps of mean |∇x|, one for each λ"),
    ("lambda_sweep", "sweeps", "Accuracy and IoU against λ", "Curves of accuracy and IoU over λ from 0 to 1"),
    (
        "adversarial_examples_",
        "examples",
        "Adversarial examples, {rest}: clean, adversarial, difference enlarged",
        "Rows of images: clean, adversarial, and their difference enlarged around grey",
    ),
    (
        "robust_accuracy_curve_",
        "curves",
        "Robust accuracy against ε, {rest}",
        "Curve of robust accuracy falling over ε",
    ),
    (
        "audit_attacks",
        "verdicts",
        "What each attack of the audit leaves",
        "Bars of robust accuracy, one for each attack, and what is left of all together",
    ),
    ("audit_eps", "verdicts", "Robust accuracy of the audit against ε", "Curve of robust accuracy falling over ε"),
    ("audit_landscape", "verdicts", "The loss around some images", "Colour maps of the loss along two directions"),
    ("gray_box", "figures", "Accuracy by defense and attack", "Coloured tables of accuracy by defense and attack"),
    ("distillation_gradients", "figures", "Sizes of the gradients", "Histograms of gradient sizes"),
    ("distillation", "figures", "Attack success on the distilled network", "Bars or curves of attack success"),
)
# the same by the end of a name whose beginning users choose
_ENDS: tuple[tuple[str, str, str, str], ...] = (
    ("_roc", "figures", "True against false alarms, {rest}", "Curves of the share of attacks found over false alarms"),
    ("_kappa", "figures", "How often mutants change the label, {rest}", "A histogram of κ for each kind of images"),
    ("_pairs", "figures", "From which class to which, {rest}", "Table of successes by true class and class reached"),
    ("_classes_reached", "figures", "To how many classes an image was driven, {rest}", "Bars of images by classes"),
    (
        "_blobs",
        "figures",
        "Blobs that are laid over images, {rest}",
        "Rows of maps, and images with a blob",
    ),
    ("_representatives", "examples", "Mean importance and change by class, {rest}", "Rows of maps, one for each class"),
    ("_examples", "examples", "Examples, {rest}", "Rows of example images"),
)
SECTIONS = ("sweeps", "heatmaps", "examples", "curves", "verdicts", "figures")


@dataclass(frozen=True)
class Picture:
    """A figure.

    Args:
        path: the file.
        section: one of ``SECTIONS``.
        key: the same for the same figure of another run.
        caption: what it shows.
        alt: what a reader is told who cannot see it.
        epoch: of a figure made while training; ``None`` at the end.
    """

    path: Path
    section: str
    key: str
    caption: str
    alt: str
    epoch: int | None = None

    @property
    def series(self) -> str:
        """The same for the same figure of another epoch."""
        return self.key.rpartition("/")[0]

    def of(self, member: str) -> Picture:
        """The same, of one of several seeds."""
        return replace(self, caption=f"{self.caption} ({member})")


@dataclass(frozen=True)
class Embedded:
    """A picture as it goes into the page."""

    picture: Picture
    uri: str
    width: int
    height: int

    @property
    def wide(self) -> bool:
        """Whether it takes a whole row: half of one would make its letters too small to read."""
        return self.width > 1.9 * self.height or self.width > _ROW


def find_pictures(folder: Path) -> list[Picture]:
    """The figures of a run, in the order in which they are shown."""
    found = [_picture(path) for path in sorted((folder / "figures").glob("*.png"))]

    def place(one: Picture) -> tuple[int, str, bool, int]:
        return SECTIONS.index(one.section), one.series, one.epoch is None, one.epoch or 0

    return sorted(found, key=place)


def _picture(path: Path) -> Picture:
    match = _STAGE.fullmatch(path.stem)
    name = match["name"] if match else path.stem
    stage = {"val": "validation", "test": "test", "predict": "prediction"}.get(match["stage"], "") if match else ""
    epoch = int(match["epoch"]) if match and match["epoch"] else None
    section, words, alt = "figures", words_of(name), "Figure"
    kinds = [(name.removeprefix(kind[0]), kind) for kind in _KINDS if name.startswith(kind[0])]
    kinds += [(name.removesuffix(kind[0]), kind) for kind in _ENDS if name.endswith(kind[0])]
    if kinds:
        rest, (_, section, caption, alt) = kinds[0]
        words = caption.format(rest=words_of(rest)).rstrip(", ")
        if "{rest}" not in caption and rest.strip("_"):
            words = f"{caption}, {words_of(rest)}"
    when = ", ".join(filter(None, (stage, "" if epoch is None else f"epoch {epoch}")))
    caption = f"{words} ({when})" if when else words
    return Picture(path, section, f"{name}/{stage}/{epoch}", caption, f"{alt}: {caption}", epoch)


def choose(pictures: Sequence[Picture]) -> tuple[list[Picture], list[Picture]]:
    """Of a figure made every few epochs some are shown, the first and the last among them.

    Returns:
        The pictures to show, and the others.
    """
    shown: list[Picture] = []
    others: list[Picture] = []
    series: dict[str, list[Picture]] = {}
    for picture in pictures:
        series.setdefault(picture.key.rpartition("/")[0] if picture.epoch is not None else picture.key, []).append(
            picture
        )
    for group in series.values():
        last = len(group) - 1
        kept = {round(place * last / (_EPOCHS_SHOWN - 1)) for place in range(_EPOCHS_SHOWN)}
        for place, picture in enumerate(group):
            (shown if place in kept or last < _EPOCHS_SHOWN else others).append(picture)
    return shown, others


def embed(pictures: Sequence[Picture], budget: int) -> tuple[list[Embedded], list[Picture], dict[Picture, str]]:
    """Put pictures into text, as large as the budget lets them be.

    Args:
        pictures: in the order of their importance.
        budget: characters that all of them may take together.

    Returns:
        What goes into the page, in the same order; what does not fit; and what cannot be read, with the reason.
    """
    broken: dict[Picture, str] = {}
    for width in _WIDTHS:
        done: dict[Picture, Embedded] = {}
        for picture in pictures:
            if picture in broken:
                continue
            try:
                done[picture] = _embed(picture, width)
            except UnidentifiedImageError:
                broken[picture] = "it is no picture"
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                broken[picture] = str(getattr(error, "strerror", None) or error)
        if sum(len(one.uri) for one in done.values()) <= budget:
            break
    shown, left, spent = [], [], 0
    for picture, one in done.items():
        if spent + len(one.uri) > budget:
            left.append(picture)
        else:
            shown.append(one)
            spent += len(one.uri)
    return shown, left, broken


def _embed(picture: Picture, width: int) -> Embedded:
    data = picture.path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        if image.width <= width and len(data) <= _ALONE and image.format == "PNG":
            return _uri(picture, data, "png", *image.size)
        drawn = image.convert("RGB")
        if drawn.width > width:
            drawn = drawn.resize((width, max(1, round(drawn.height * width / drawn.width))), Image.Resampling.LANCZOS)
        smaller = io.BytesIO()
        drawn.save(smaller, "WEBP", quality=_QUALITY, method=4)
        if smaller.tell() >= len(data) and image.width <= width and image.format == "PNG":
            return _uri(picture, data, "png", *image.size)
        return _uri(picture, smaller.getvalue(), "webp", *drawn.size)


def _uri(picture: Picture, data: bytes, kind: str, width: int, height: int) -> Embedded:
    return Embedded(picture, f"data:image/{kind};base64,{base64.b64encode(data).decode()}", width, height)

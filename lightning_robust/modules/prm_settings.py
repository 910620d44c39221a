"""What a Pixel Robustness Manipulator is made of, as plain settings, and how a file brings them along."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from lightning_robust.errors import UserError
from lightning_robust.models import PixelRobustnessManipulator, SparsePattern, read_state_dict, require_fit
from lightning_robust.models.prm import PUBLISHED_DEPTH

TRAINED = ("prm", "classifier", "both", "in_turn")

_PRM, _CLASSIFIER = "network.prm.", "network.classifier."


@dataclass(frozen=True, kw_only=True)
class PRMSettings:
    """The autoencoder of a :class:`~lightning_robust.models.PixelRobustnessManipulator`.

    Args:
        pattern: which pixels its entry reads.
        body: "unet" and "segnet" are the published ones; "ace" is the light form of the forerunner.
        width: channels of its first stage; 64 is the published size, 16 trains in minutes on a CPU.
        depth: how often it pools; by default the published 4 (unet) or 5 (segnet).
        refine: a nonlinear exit with another convolution at full size.
        skip: add an interpolation of the connected pixels to its output (not in the paper; small bodies learn faster).
    """

    pattern: SparsePattern = SparsePattern()  # noqa: RUF009 - frozen
    body: Literal["unet", "segnet", "ace"] = "unet"
    width: int = 64
    depth: int | None = None
    refine: bool = False
    skip: bool = False

    def build(self, image_shape: tuple[int, int, int], lam: float) -> PixelRobustnessManipulator:
        """The manipulator, with random weights.

        Args:
            image_shape: ``(C, H, W)`` of the images.
            lam: its λ.

        Raises:
            UserError: for settings that do not fit each other or the images.
        """
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return PixelRobustnessManipulator(image_shape[0], **options, lam=lam, image_size=image_shape[1:])

    def to_plain(self, image_shape: tuple[int, int, int]) -> dict[str, Any]:
        """Numbers, strings and lists alone, as a checkpoint holds them; no file is needed to read them back."""
        pattern = self.pattern.written_out(*image_shape[1:])
        plain = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(pattern).items()
        }
        depth = PUBLISHED_DEPTH.get(self.body) if self.depth is None else self.depth
        return {**dataclasses.asdict(self), "pattern": plain, "depth": depth}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        """The inverse of :meth:`to_plain`."""
        pattern = plain.get("pattern", {})
        return cls(**{**plain, "pattern": SparsePattern(**pattern) if isinstance(pattern, dict) else pattern})


def settings_of(path: str) -> PRMSettings | None:
    """The settings in a checkpoint of PRMClassifier; ``None`` for any other file of weights."""
    file = Path(path).expanduser()
    if not file.is_file() or file.suffix == ".safetensors":
        return None  # what a missing file is told by, is its reader's
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # damaged bytes raise nearly anything; the reader of the weights says what is wrong
        return None
    plain = loaded.get("hyper_parameters", {}).get("prm") if isinstance(loaded, dict) else None
    return None if plain is None else PRMSettings.from_plain(plain)


def agreed(given: PRMSettings | None, path: str | None, image_shape: tuple[int, int, int]) -> PRMSettings:
    """The settings that are given, or else those of the file of weights.

    Raises:
        UserError: where the two differ.
    """
    kept = None if path is None else settings_of(path)
    if given is None or kept is None:
        return given or kept or PRMSettings()
    asked, made = given.to_plain(image_shape), kept.to_plain(image_shape)
    for name, value in made.items():
        if asked[name] != value:
            raise UserError(
                f"prm_weights={path!r} were made with prm.{name}={_shown(value)}, not {_shown(asked[name])}: give the "
                "same, or leave prm out, which then comes from that file"
            )
    return given


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else f"{text[:80]}…"


def part(path: str, name: Literal["prm", "classifier"]) -> dict[str, Tensor] | None:
    """The manipulator's or the classifier's entries of a checkpoint of PRMClassifier; ``None`` for any other file.

    Raises:
        UserError: for a file that cannot be read.
    """
    prefix = _PRM if name == "prm" else _CLASSIFIER
    entries = {key.replace("._orig_mod.", "."): value for key, value in read_state_dict(path).items()}
    if not any(key.startswith(_PRM) for key in entries):
        return None
    return {key.removeprefix(prefix): value for key, value in entries.items() if key.startswith(prefix)}


def load(module: nn.Module, entries: dict[str, Tensor], what: str) -> None:
    """Load all entries or none.

    Raises:
        UserError: counting and naming what does not fit; ``what`` begins the message.
    """
    require_fit(entries, {name: value.shape for name, value in module.state_dict().items()}, what)
    module.load_state_dict(entries, strict=False)  # num_batches_tracked alone may be missing


def load_prm(prm: PixelRobustnessManipulator, path: str) -> None:
    """Load a manipulator's weights from a checkpoint of PRMClassifier, or from a state dict of its own.

    Raises:
        UserError: for a file that cannot be read or does not fit.
    """
    entries = part(path, "prm")
    if entries is None:
        entries = {name.removeprefix("prm."): value for name, value in read_state_dict(path).items()}
    load(prm, entries, f"prm_weights {path!r} do not fit the manipulator")


def check_training(
    trains: str,
    turn_epochs: int,
    reconstruction_weight: float,
    classification_weight: float,
    prm: PRMSettings | None,
) -> None:
    """Refuse settings of :class:`~lightning_robust.modules.PRMClassifier`, where each is explained, that train nothing.

    Raises:
        UserError: naming the setting and the mend.
    """
    if trains not in TRAINED:
        raise UserError(f"trains={trains!r}: choose one of {', '.join(TRAINED)}")
    if turn_epochs < 1:
        raise UserError(f"turn_epochs={turn_epochs}: a turn is at least one epoch")
    for name, value in (
        ("reconstruction_weight", reconstruction_weight),
        ("classification_weight", classification_weight),
    ):
        if not 0 <= value < float("inf"):
            raise UserError(f"{name}={value} weighs a term of the loss: give 0 or more")
    if trains != "prm" and classification_weight == 0:
        raise UserError(f"trains={trains!r} with classification_weight=0: the classifier would learn nothing")
    if trains == "prm" and classification_weight == 0:
        if reconstruction_weight == 0:
            raise UserError("reconstruction_weight=0 and classification_weight=0: nothing is left to train for")
        if prm is not None and prm.body == "ace":
            raise UserError(
                "the ace form adds to the image: alone, its reconstruction is best where it adds nothing; give a "
                "classification_weight"
            )

"""Claims and verdicts of our own zoo: every family of modules × training × defense, each audited; no data set needed.

    python benchmarks/audit_zoo.py --folder zoo --images 150 --threads 1 --output zoo/zoo.json

Trains each family on scikit-learn's digits by its own module and a Trainer, naturally and against PGD-7 at ε, as the
configs ``quickstart`` and ``prm_digits`` do, then audits it alone and behind each defense as ``lightning-robust audit``
would. Checkpoints and every ``audit.json`` lie in ``--folder``: a run that was stopped goes on where it was, and one
that is through only prints its tables again. (After a change of the program remove what it concerns.)

* image: :class:`ImageClassifier`. prm: :class:`PRMClassifier`, trained end to end, at λ = 0.9.
* distilled: :class:`DistilledClassifier` at T = 100, half of the epochs the teacher's. Adversarially: a teacher trained
  against PGD at T, and a student by RSLAD, whose attack looks at the soft labels at T. (ARD's attack, and that of any
  objective on labels, sees the student at T = 1, where its softmax saturates: it would find nothing to train against.)
* foreground: :class:`ForegroundClassifier` with given masks, the pixels of ink (above 0.25). Attackers may change every
  pixel of what is shown. segmented: the same with masks predicted by a U-Net of its own.

The defenses are set for images of 8 × 8 pixels: a shift is one pixel; randomization enlarges to 8 or 9, pads to 10 and
brings back to 8; 6 pixels, a tenth, are deflected by at most 2 and denoised by wavelets, without R-CAM (the last
feature map has 2 × 2 pixels); 10 points of ±0.1 vote; the threshold lies at 0.5; the neutralizer blanks, of the class
that is predicted, what is attacked and unimportant in 9 of 10 training images. Deflection and neutralizer need the
extra ``defenses``.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from _common import common_arguments, console, machine, print_table, write_rows
from torch import Tensor, nn

from lightning_robust.attacks import FGSM, PGD
from lightning_robust.audit import BUDGETS, audit
from lightning_robust.batch import Batch, as_batch
from lightning_robust.cli.audit_models import checkpoint_model, shown
from lightning_robust.datamodules import Digits
from lightning_robust.datamodules.base import Split
from lightning_robust.datamodules.dataset import TensorSource, collate
from lightning_robust.datamodules.masks import MaskedTensorSource, threshold_masks
from lightning_robust.defenses import (
    Binarization,
    Defense,
    Neutralizer,
    PixelDeflection,
    PixelShift,
    Randomization,
    RegionBased,
)
from lightning_robust.modules import (
    DistilledClassifier,
    ForegroundClassifier,
    ImageClassifier,
    OptimizerSettings,
    PRMClassifier,
    PRMSettings,
    ScheduleSettings,
    SegmenterSettings,
)
from lightning_robust.objectives import RSLAD, Distillation, Natural, Objective, PGDAdversarial
from lightning_robust.regions import ActivationMap, Blobs, Region, Threshold, blob, importance, isolate, pixel_change

EPOCHS = 30
EPS, STEPS, STEP_SIZE = 0.2, 7, 0.07
INK = 0.25
TRAININGS = ("natural", "PGD")


class InkedDigits(Digits):
    """Digits with masks: the pixels of ink."""

    def read(self, split: Split) -> TensorSource | None:
        """Read the training or test images."""
        source = super().read(split)
        return source and MaskedTensorSource(source.images, source.labels, threshold_masks(source.images, INK))


# -- the zoo -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """Modules of one class.

    Attributes:
        make: the module, untrained, by what training it gets.
        data: its data module.
        phases: how many times the epochs of training it takes.
    """

    make: Callable[[str], ImageClassifier]
    data: type[Digits] = Digits
    phases: int = 1


def _common() -> dict[str, Any]:
    return {
        "network": "digits_cnn",
        "num_classes": 10,
        "image_shape": (1, 8, 8),
        "optimizer": OptimizerSettings(name="adamw", lr=0.003, weight_decay=0.01),
        "schedule": ScheduleSettings(name="cosine"),
    }


def _objective(training: str) -> Objective:
    return Natural() if training == "natural" else PGDAdversarial(attack=PGD(eps=EPS, steps=STEPS))


def _image(training: str) -> ImageClassifier:
    return ImageClassifier(objective=_objective(training), **_common())


def _prm(training: str) -> ImageClassifier:
    return PRMClassifier(
        objective=_objective(training),
        prm=PRMSettings(width=8, depth=2, skip=True),
        lam=0.9,
        train_lam=[0, 0.5, 0.9, 1],
        trains="both",
        **_common(),
    )


def _distilled(training: str) -> ImageClassifier:
    student = Distillation() if training == "natural" else RSLAD(eps=EPS, steps=STEPS, step_size=STEP_SIZE)
    return DistilledClassifier(
        objective=student, temperature=100, teacher_epochs=EPOCHS, teacher_objective=_objective(training), **_common()
    )


def _foreground(training: str) -> ImageClassifier:
    # the attacker of the audit changes any pixel of what is shown
    return ForegroundClassifier(objective=_objective(training), attack_pixels="image", **_common())


def _segmented(training: str) -> ImageClassifier:
    return ForegroundClassifier(
        objective=_objective(training), masks="predicted", segmenter=SegmenterSettings(width=8, depth=2), **_common()
    )


FAMILIES = {
    "image": Family(_image),
    "prm": Family(_prm),
    "distilled": Family(_distilled, phases=2),
    "foreground": Family(_foreground, InkedDigits),
    "segmented": Family(_segmented, InkedDigits),
}


def trained(name: str, training: str, folder: Path) -> nn.Module:
    """The model that attacks see, from its checkpoint, which is made first where there is none."""
    family = FAMILIES[name]
    file = folder / "models" / f"{name}-{training}" / "checkpoints" / "last.ckpt"
    if not file.is_file():
        began = time.perf_counter()
        pl.seed_everything(0, verbose=False)
        trainer = pl.Trainer(
            max_epochs=family.phases * EPOCHS,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            default_root_dir=file.parent.parent,
        )
        trainer.fit(family.make(training), datamodule=family.data(batch_size=64))
        part = file.with_suffix(".part")
        trainer.save_checkpoint(part)
        part.rename(file)  # whole or not at all
        console.print(f"trained: {name}, {training} ({time.perf_counter() - began:.0f} s)")
    return checkpoint_model(str(file), family.data())[0]


# -- defenses ----------------------------------------------------------------------------------------------------------


def _blobs(model: nn.Module, images: Tensor, labels: Tensor) -> Blobs:
    """Of each class the pixels that are attacked and unimportant in 9 of 10 images; black, as a digit's ground is."""
    attack = FGSM(eps=EPS, loss="ce_scaled")  # at the scale of a distilled student's logits there is no gradient
    attacked = Threshold("relative", 0.5).region(pixel_change(images, attack(model, images, labels)))
    activation = ActivationMap().resolved(model, images)
    important = Threshold("otsu").region(importance(model, images, labels, activation))
    wanted = isolate(important, attacked) == Region.V_ONLY
    frequency = torch.stack([wanted[labels == number].double().mean(0) for number in range(10)])
    return Blobs(blob(frequency, 0.9), torch.zeros(10))


Made = Callable[[nn.Module, Batch], nn.Module]
"""From a model and its training images to what is audited."""


def _around(defense: Defense) -> Made:
    return lambda model, train: defense.around(model)


DEFENSES: dict[str, Made] = {
    "none": lambda model, train: model,
    "PixelShift": _around(PixelShift()),
    "Randomization": _around(Randomization(sizes=(8, 10), pad_to=10, resize_back=True)),
    # made when it is needed: it asks for the extra
    "PixelDeflection": lambda model, train: PixelDeflection(model, deflections=6, window=2, cam="none"),
    "RegionBased": _around(RegionBased(radius=0.1, votes=10)),
    "Binarization": _around(Binarization()),
    "Neutralizer": lambda model, train: Neutralizer(model, blobs=_blobs(model, train.images, train.labels)),
}


# -- audits ------------------------------------------------------------------------------------------------------------


def drawn(data: Digits, model: nn.Module, split: Split, count: int | None, seed: int) -> Batch:
    """So many images of a split, drawn as the command draws them, as the model is shown them."""
    dataset = data.dataset(split)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return shown(model, as_batch(collate(dataset.__getitems__(order[:count].sort().values.tolist()))))


def audited(name: str, training: str, defense: str, args: argparse.Namespace) -> dict[str, Any]:
    """What ``audit.json`` of a cell says; read where it is there already."""
    title = f"{name}-{training}-{defense}"
    file = args.folder / "audits" / f"{args.images}-{args.budget}-{args.seed}" / f"{title}.json"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        model = trained(name, training, args.folder).eval()
        data = FAMILIES[name].data()
        images, labels, _ = drawn(data, model, "test", args.images, args.seed)
        subject = DEFENSES[defense](model, drawn(data, model, "train", None, args.seed)).eval()
        audit(
            subject,
            images,
            labels,
            eps=EPS,
            budget=args.budget,
            seed=args.seed,
            model_name=title,
            data_name=type(data).__name__,
        ).write(file.parent, file.name)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def row_of(name: str, training: str, defense: str, found: dict[str, Any]) -> dict[str, Any]:
    """The figures of a cell; shares of the images in percent."""
    left = {attack["name"]: _percent(attack["robust_accuracy"]) for attack in found["attacks"]}
    iterated = next(value for attack, value in left.items() if attack.startswith("PGD-"))
    return {
        "family": name,
        "training": training,
        "defense": defense,
        "clean": _percent(found["clean_accuracy"]),
        "fgsm": left["FGSM"],
        "pgd": iterated,
        "verdict": found["verdict"],
        "robust": _percent(found["robust_accuracy"]),
        "interval": [_percent(bound) for bound in found["confidence_interval"]],
        "flagged": [check["name"] for check in found["checks"] if check["outcome"] == "flag"],
        "unsure": [check["name"] for check in found["checks"] if check["outcome"] == "unsure"],
        "seconds": found["seconds"],
    }


def _percent(share: float) -> float:
    return round(100 * share, 2)


def matrix(rows: Sequence[dict[str, Any]], cell: Callable[[dict[str, Any]], str]) -> str:
    """Markdown: a row for each family and training, a column for each defense; an empty cell where there is no row."""
    models = list(dict.fromkeys((row["family"], row["training"]) for row in rows))
    defenses = list(dict.fromkeys(row["defense"] for row in rows))
    known = {(row["family"], row["training"], row["defense"]): cell(row) for row in rows}
    lines = [["model", *(f"`{name}`" if name != "none" else "no defense" for name in defenses)]]
    lines += [["---"] * len(lines[0])]
    for name, training in models:
        lines.append([f"{name}, {training}", *(known.get((name, training, defense), "") for defense in defenses)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdict_cell(row: dict[str, Any]) -> str:
    """The verdict, what PGD left, and what everything left."""
    return f"{row['verdict'].replace('_', ' ')} · {row['pgd']:.0f} → {row['robust']:.0f} %"


def flagged_cell(row: dict[str, Any]) -> str:
    """Which checks are flagged, or unsure."""
    return ", ".join([f"`{name}`" for name in row["flagged"]] + [f"`{name}`?" for name in row["unsure"]]) or "–"


def _chosen(names: str, known: Sequence[str]) -> list[str]:
    chosen = names.split(",")
    if unknown := [name for name in chosen if name not in known]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(known)}")
    return chosen


@contextmanager
def _without_lightnings_words() -> Iterator[None]:
    """Eight trainings would say the same things eight times."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="pytorch_lightning")
            yield
    finally:
        logger.setLevel(level)


def main() -> None:
    parser = common_arguments(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    families, defenses = ",".join(FAMILIES), ",".join(DEFENSES)
    parser.add_argument("--folder", type=Path, default=Path("zoo"), help="of checkpoints and audits (zoo)")
    parser.add_argument("--images", type=int, default=150, help="test images of each audit, of 359 (150)")
    parser.add_argument("--budget", choices=list(BUDGETS), default="quick", help="of each audit (quick)")
    parser.add_argument("--seed", type=int, default=0, help="of the images and the audits (0)")
    for option, known, names in (("families", FAMILIES, families), ("defenses", DEFENSES, defenses)):
        parser.add_argument(
            f"--{option}",
            type=partial(_chosen, known=tuple(known)),
            default=list(known),
            metavar="A,B",
            help=f"some of {names}",
        )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cells = [(f, t, d) for f in args.families for t in TRAININGS for d in args.defenses]
    rows = []
    for number, cell in enumerate(cells, 1):
        with _without_lightnings_words():
            rows.append(row_of(*cell, audited(*cell, args)))
        took = f"{rows[-1]['seconds']:.0f} s; {', '.join(rows[-1]['flagged']) or 'no flag'}"
        console.print(f"{number}/{len(cells)} {', '.join(cell)}: {verdict_cell(rows[-1])} ({took})", highlight=False)
    columns = ("family", "training", "defense", "clean", "fgsm", "pgd", "robust", "verdict")
    title = f"{args.images} images, L∞ {EPS}, {args.budget}: what is left, in percent ({machine()})"
    print_table(title, [{column: row[column] for column in columns} for row in rows])
    print(matrix(rows, verdict_cell), matrix(rows, flagged_cell), sep="\n\n")
    if args.output:
        write_rows(args.output, rows, {"machine": machine(), **vars(args)})


if __name__ == "__main__":
    main()

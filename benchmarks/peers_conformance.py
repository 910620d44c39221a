"""The promises that our attacks keep, put to the attacks of other libraries: who keeps which.

    python benchmarks/peers_conformance.py --output peers.csv

The checks are those of tests/attacks/conformance.py, to which our own attacks are held in the tests. A library is asked
for what a user would ask it for: its attack with a budget in [0, 1] on a classifier that takes images in [0, 1]. What a
library does not claim to do may be broken here without being a fault; the table is about what a user has to know.

`kept`, `broken` (the check found something), `error` (the library raised). "misclassified images unchanged" is asked
only of attacks that stop at success or look for a minimal perturbation. Libraries that are not installed are named and
left out.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _common import art_classifier, common_arguments, console, module_or_none, peers_pgd, progress_bar, write_rows
from rich.table import Table
from torch import Tensor, nn

from lightning_robust.attacks import APGD, CW, FAB, JSMA, PGD, DeepFool, OnePixel, Square

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "attacks"))
from conformance import CHECKS, CLASSES, SHAPE, Run, Setting

EPS = 0.1
FIXED = Setting("linf", EPS, stop_at_success=False, strict=False)
MINIMAL = Setting("l2", float("inf"), stop_at_success=True, strict=False)
STOPPING = Setting("linf", EPS, stop_at_success=True, strict=False)
FEATURES = Setting("l0", 19, stop_at_success=True, strict=False)  # γ = 0.1 of 192 features
PIXEL = Setting("l0", 1, stop_at_success=True, strict=False)
Candidates = dict[str, tuple[Run, Setting]]


def ours() -> Candidates:
    def bound(attack: Any) -> Run:
        return lambda model, images, labels: attack(model, images, labels)

    return {
        "ours PGD": (bound(PGD(eps=EPS, steps=5)), STOPPING),
        "ours APGD": (bound(APGD(eps=EPS, steps=5)), STOPPING),
        "ours CW": (bound(CW(steps=100, binary_search_steps=3)), MINIMAL),
        "ours DeepFool": (bound(DeepFool(steps=20)), MINIMAL),
        "ours FAB": (bound(FAB(norm="linf", eps=EPS, steps=10)), STOPPING),
        "ours Square": (bound(Square(norm="linf", eps=EPS, queries=100)), STOPPING),
        "ours JSMA": (bound(JSMA(gamma=0.1)), FEATURES),
        "ours OnePixel": (bound(OnePixel(population=10, generations=5)), PIXEL),
    }


def pgd() -> tuple[Candidates, list[str]]:
    """PGD of all peers, APGD of pyautoattack."""
    runs, missing = peers_pgd(EPS, EPS / 4, 5)
    candidates: Candidates = {f"{name} PGD": (run, FIXED) for name, run in runs.items()}
    if module_or_none("captum"):
        robust = importlib.import_module("captum.robust")

        def by_captum(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            attack = robust.PGD(model, nn.CrossEntropyLoss(reduction="none"), lower_bound=0, upper_bound=1)
            return attack.perturb(images, EPS, EPS / 4, 5, labels, random_start=True).detach()

        candidates["captum PGD"] = (by_captum, FIXED)
    else:
        missing.append("captum")
    if autopgd := module_or_none("pyautoattack.autopgd_base"):
        candidates["autoattack APGD"] = (
            lambda model, images, labels: autopgd.APGDAttack(model, n_iter=5, eps=EPS).perturb(images, labels).detach(),
            STOPPING,
        )
    else:
        missing.append("pyautoattack")
    return candidates, missing


def minimal() -> Candidates:
    """CW and DeepFool, which look for the smallest perturbation in L2."""
    candidates: Candidates = {}
    if torchattacks := module_or_none("torchattacks"):
        candidates["torchattacks CW"] = (
            lambda model, images, labels: torchattacks.CW(model, c=10, steps=100, lr=0.02)(images, labels),
            MINIMAL,
        )
        candidates["torchattacks DeepFool"] = (
            lambda model, images, labels: torchattacks.DeepFool(model, steps=20)(images, labels),
            MINIMAL,
        )
    if foolbox := module_or_none("foolbox"):

        def by_foolbox(attack: Any) -> Run:
            return lambda model, images, labels: attack(
                foolbox.PyTorchModel(model, bounds=(0, 1)), images, labels, epsilons=None
            )[1]

        candidates["foolbox CW"] = (by_foolbox(foolbox.attacks.L2CarliniWagnerAttack(3, 100)), MINIMAL)
        candidates["foolbox DeepFool"] = (by_foolbox(foolbox.attacks.L2DeepFoolAttack(steps=20)), MINIMAL)
    if module_or_none("art"):
        art = importlib.import_module("art.attacks.evasion")

        def by_art(make: Callable[..., Any], **settings: Any) -> Run:
            def run(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
                attack = make(art_classifier(model, SHAPE, CLASSES), verbose=False, **settings)
                return torch.from_numpy(attack.generate(images.numpy(), labels.numpy()))

            return run

        candidates["ART CW"] = (by_art(art.CarliniL2Method, binary_search_steps=3, max_iter=30), MINIMAL)
        candidates["ART DeepFool"] = (by_art(art.DeepFool, max_iter=20), MINIMAL)
    if module_or_none("cleverhans"):
        attack = importlib.import_module("cleverhans.torch.attacks.carlini_wagner_l2")
        candidates["cleverhans CW"] = (
            lambda model, images, labels: attack.carlini_wagner_l2(
                model, images, CLASSES, y=labels, lr=0.02, binary_search_steps=3, max_iterations=100
            ).detach(),
            MINIMAL,
        )
    return candidates


def few_queries_or_features() -> Candidates:
    """FAB, Square, JSMA and one-pixel, of torchattacks and of AutoAttack's official code."""
    candidates: Candidates = {}
    if torchattacks := module_or_none("torchattacks"):

        def by_torchattacks(make: Callable[..., Any], **settings: Any) -> Run:
            return lambda model, images, labels: make(model, **settings)(images, labels)

        candidates |= {
            "torchattacks FAB": (
                by_torchattacks(torchattacks.FAB, norm="Linf", eps=EPS, steps=10, n_classes=CLASSES),
                STOPPING,
            ),
            "torchattacks Square": (by_torchattacks(torchattacks.Square, eps=EPS, n_queries=100), STOPPING),
            "torchattacks JSMA": (by_torchattacks(torchattacks.JSMA, theta=1.0, gamma=0.1), FEATURES),
            "torchattacks OnePixel": (by_torchattacks(torchattacks.OnePixel, pixels=1, steps=5, popsize=10), PIXEL),
        }
    if module_or_none("pyautoattack"):
        fab = importlib.import_module("pyautoattack.fab_pt").FABAttack_PT
        square = importlib.import_module("pyautoattack.square").SquareAttack
        candidates |= {
            "autoattack FAB": (
                lambda model, images, labels: fab(model, n_iter=10, eps=EPS, device="cpu").perturb(images, labels),
                STOPPING,
            ),
            "autoattack Square": (
                lambda model, images, labels: square(model, eps=EPS, n_queries=100, device="cpu").perturb(
                    images, labels
                ),
                STOPPING,
            ),
        }
    return candidates


def verdict(check: Callable[[Run, Setting], None], run: Run, setting: Setting) -> tuple[str, str]:
    """kept, broken or error, and the sentence that goes with it."""
    torch.manual_seed(0)
    quiet = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            warnings.simplefilter("ignore")
            check(run, setting)
    except AssertionError as error:
        return "broken", str(error)
    except Exception as error:  # whatever another library raises is its answer
        return "error", f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        torch.set_grad_enabled(True)  # a library may have left it off
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return "kept", ""


def main() -> None:
    parser = common_arguments(__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="only attacks whose name holds one of these words")
    parser.add_argument("--why", action="store_true", help="print the sentence of each broken promise")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)
    fixed, missing = pgd()
    for name in missing:
        console.print(f"{name} is not installed: left out")
    candidates = {
        name: candidate
        for name, candidate in {**ours(), **fixed, **minimal(), **few_queries_or_features()}.items()
        if not args.only or any(word.lower() in name.lower() for word in args.only)
    }
    rows: list[dict[str, Any]] = []
    with progress_bar() as bar:
        for name, (run, setting) in bar.track(candidates.items(), description="attacks"):
            for promise, check in CHECKS.items():
                word, why = verdict(check, run, replace(setting))
                rows.append({"attack": name, "promise": promise, "verdict": word, "why": why})

    names = list(candidates)
    colours = {"kept": "[green]kept[/]", "broken": "[red]broken[/]", "error": "[yellow]error[/]"}
    found = {(row["attack"], row["promise"]): row["verdict"] for row in rows}
    for start in range(0, len(names), 8):
        table = Table("promise", *names[start : start + 8], title="promise × attack", title_justify="left")
        for promise in CHECKS:
            table.add_row(promise, *(colours[found[name, promise]] for name in names[start : start + 8]))
        kept = [sum(found[name, promise] == "kept" for promise in CHECKS) for name in names[start : start + 8]]
        table.add_section()
        table.add_row(f"kept of {len(CHECKS)}", *(str(count) for count in kept))
        console.print(table)
    if args.why:
        for row in rows:
            if row["why"]:
                console.print(f"{row['attack']} · {row['promise']} · {row['verdict']}: {row['why']}", markup=False)
    if args.output:
        write_rows(args.output, rows, {"eps": EPS})


if __name__ == "__main__":
    main()

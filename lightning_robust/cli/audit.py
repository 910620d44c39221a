"""The command ``audit``: any model, any data module, any defense; tables, a file, and a status for CI."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from lightning_robust.audit import EXIT_STATUS, AuditResult, CheckResult, Estimate, audit, budget_of, spoken
from lightning_robust.audit.subject import Progress as Told
from lightning_robust.batch import as_batch
from lightning_robust.callbacks.run_page import make_page
from lightning_robust.cli.audit_models import checkpoint_model, evaluating, load_model, shown
from lightning_robust.cli.audit_options import Given, audit_parser, checked, with_data
from lightning_robust.cli.messages import located, users_mistake
from lightning_robust.cli.noise import quiet
from lightning_robust.cli.sources import sources
from lightning_robust.datamodules import ImageDataModule
from lightning_robust.datamodules.dataset import collate
from lightning_robust.defenses import Defense
from lightning_robust.errors import UserError
from lightning_robust.loggers import RunLogger
from lightning_robust.report import save_figure, write_csv
from lightning_robust.report.audit import audit_figures, check_rows, print_audit


def run_audit(words: list[str]) -> int:
    """Audit a model.

    Args:
        words: the command and its options.

    Returns:
        the status to end with: 0 trusted, 3 masked, 4 not enough evidence.

    Raises:
        UserError: for every mistake of the user.
    """
    with quiet(), _as_arguments(words):
        parser = audit_parser()
        given = parser.parse_args(with_data(words)[1:])
        settings = checked(given)
        try:
            made = parser.instantiate_classes(given)
        except Exception as error:
            mistake = users_mistake(error)
            if mistake is None:
                raise
            raise UserError(located(mistake, sources(words))) from None
        result, folder = _audit(settings, made.data, made.defense)
        _keep(result, folder)
    return EXIT_STATUS[result.verdict]


def _audit(given: Given, data: ImageDataModule, defense: Defense | None) -> tuple[AuditResult, Path]:
    device = _device(given.device)
    model, name = load_model(given, data)
    if given.ckpt is not None:
        name += f", {Path(given.ckpt).name}"  # a run has several
    images, labels = _images(data, given, model)
    audited: nn.Module = model.to(device)
    if defense is not None:
        audited = evaluating(defense.around(audited))
        name = f"{name} + {type(defense).__name__}"
    surrogate = None
    if given.surrogate is not None:
        try:
            surrogate = checkpoint_model(given.surrogate, data)[0].to(device).eval()
        except UserError as error:
            raise UserError(str(error).replace("--ckpt", "--surrogate")) from None
    folder: Path | None = None

    def begin(estimate: Estimate) -> None:
        # the model takes the images: now, and not after minutes of attacks, is the time to find a disk full
        nonlocal folder
        folder = _folder(given, defense is not None)
        _tell(estimate, given.budget, len(images))

    def keep(unfinished: AuditResult) -> None:
        assert folder is not None  # it begins before anything can end it
        path = unfinished.write(folder)
        print(f"The audit ended early. {unfinished.sentence}\nWhat it had found: {path}", flush=True)

    with _progress() as (told, on_check):
        result = audit(
            audited,
            images.to(device),
            labels.to(device),
            eps=given.eps,
            norm=given.norm,
            budget=given.budget,
            surrogate=surrogate,
            seed=given.seed,
            batch_size=given.batch_size,
            # an exported graph is not to be taken apart
            fast=given.program is None,
            progress=told,
            on_estimate=begin,
            on_check=on_check,
            on_stop=keep,
            model_name=given.name or name,
            data_name=f"{type(data).__name__} ({given.split})",
        )
    assert folder is not None
    return result, folder


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here: {reason}; auto takes what there is") from None
    return device


def _images(data: ImageDataModule, given: Given, model: nn.Module) -> tuple[Tensor, Tensor]:
    """So many images, drawn by the seed: a folder's first ones may be all of one class."""
    dataset = data.dataset(given.split)  # type: ignore[arg-type]
    wanted = budget_of(given.budget).images if given.images is None else given.images
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(given.seed))
    rows = order[:wanted].sort().values.tolist()
    batch = shown(model, as_batch(collate(dataset.__getitems__(rows))))
    return batch.images, batch.labels


def _tell(estimate: Estimate, budget: str, images: int) -> None:
    print(f"audit: {budget} budget, {images} images; at most about {spoken(estimate.total)} on this machine, of which")
    for title, seconds in sorted(estimate.rows, key=lambda row: -row[1])[:5]:
        print(f"  {spoken(seconds):>8}  {title}")
    print("  (images that fall leave early; adaptive attacks on what is found come on top)", flush=True)


@contextmanager
def _progress() -> Iterator[tuple[Told, Any]]:
    """A bar in a terminal; else a line for each check."""
    if not sys.stdout.isatty():
        yield lambda name, done: None, _line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(), transient=True) as bar:
        task = bar.add_task("audit", total=1.0)
        yield (
            lambda name, done: bar.update(task, description=name or "audit", completed=done),
            lambda check: bar.console.print(_words(check), markup=False, highlight=False),
        )


def _line(check: CheckResult) -> None:
    print(_words(check), flush=True)


def _words(check: CheckResult) -> str:
    outcome = check.outcome.upper() if check.outcome == "flag" else check.outcome
    return f"{outcome:<8} {check.title}  ({check.seconds:.1f} s)"


def _folder(given: Given, defended: bool) -> Path:
    if given.output is not None:
        folder = Path(given.output)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(f"--output {folder} cannot be written: {error.strerror or error}") from None
        return folder
    if given.ckpt is not None and not defended:
        folder = Path(given.ckpt).resolve().parent.parent
        if (folder / "config.yaml").is_file():
            return folder
    # a run of its own: beside the run of its checkpoint it would pass for the undefended model's
    stem = Path(given.ckpt or given.program or "").stem or str(given.network or given.module).replace(":", ".")
    logger = RunLogger("runs", "audit_" + "".join(c if c.isalnum() or c in "._-=" else "_" for c in stem))
    logger.prepare()
    return logger.folder


def _keep(result: AuditResult, folder: Path) -> None:
    path = result.write(folder)
    plain = result.to_plain()
    write_csv(folder / "tables" / "audit.csv", check_rows(plain))
    for name, figure in audit_figures(plain).items():
        save_figure(figure, folder / "figures" / f"{name}.png")
    print_audit(plain)
    print(f"Results: {path}")
    if make_page(folder):
        print(f"Page: {folder / 'report.html'}")


@contextmanager
def _as_arguments(words: list[str]) -> Iterator[None]:
    """The parser's messages go by the process's arguments."""
    before = sys.argv
    sys.argv = [before[0], *words]
    try:
        yield
    finally:
        sys.argv = before

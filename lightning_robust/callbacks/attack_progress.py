"""Progress bars that say which attack runs and how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar


class AttackProgress(RichProgressBar):
    """Lightning's bar, with the running attack and its step in the description: ``Testing · pgd20 12/20``.

    Args:
        refresh_rate: how often a second the bar is drawn; 0 for never.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._shown = 0.0
        self._plain: dict[int, str] = {}

    @staticmethod
    def of(trainer: pl.Trainer) -> AttackProgress | None:
        """The bar of a trainer, if it is one of these."""
        bar = trainer.progress_bar_callback
        return bar if isinstance(bar, AttackProgress) else None

    def reporter(self, name: str) -> Callable[[int, int], None]:
        """What to give an attack as ``progress``."""

        def report(step: int, steps: int) -> None:
            now = time.monotonic()
            if now - self._shown > 0.1 or step == steps:  # a quick attack must not spend its time on drawing
                self._shown = now
                self._describe(f" · {name} {step}/{steps}")

        return report

    def done(self) -> None:
        """Take the attack's name off the bar."""
        self._describe("")

    def _describe(self, suffix: str) -> None:
        if self.progress is None:
            return
        for task in (self.test_progress_bar_id, self.val_progress_bar_id, self.val_sanity_progress_bar_id):
            if task is None or task not in self.progress.task_ids:
                continue
            shown = next(t for t in self.progress.tasks if t.id == task)
            if not shown.visible:
                continue
            plain = self._plain.setdefault(task, shown.description)
            self.progress.update(task, description=plain.split(" · ")[0] + suffix)
        self.refresh()


def end_bar(trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
    """Take the trainer's bar down before a table is printed: a live one would be drawn once more, below it."""
    bar = trainer.progress_bar_callback
    if bar is not None:
        bar.teardown(trainer, module, stage)

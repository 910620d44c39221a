"""Keeps a run's output to what its reader can use: what is left out here is named line by line, with the reason."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from pytorch_lightning.loggers import WandbLogger

_WARNINGS = (
    # our data modules choose the number of workers
    r".*does not have many workers which may be a bottleneck.*",
    # the folder of a resumed run
    r".*exists and is not empty.*",
    # our numbers are logged once an epoch, whatever log_every_n_steps says
    r".*is smaller than the logging interval.*",
    # our metrics have gathered every rank's counts before they are logged
    r".*It is recommended to use `self\.log\(.*sync_dist=True\)`.*",
    # ForegroundClassifier cuts batches out there, whatever the data module
    r".*You have overridden .on_after_batch_transfer. in .LightningModule.*",
    # a part that is frozen on purpose
    r"Found \d+ module\(s\) in eval mode at the start of training.*",
    # our sampler counts each image once on any number of devices
    r".*Using `DistributedSampler` with the dataloaders.*",
    # an evaluation has a folder of its own, not that of the run whose checkpoint it takes
    r".*The dirpath has changed from.*",
    # our configure_model shards nothing
    r".*WeightAveraging callback with a model that overrides the configure_model.*",
    # the table gives the size of the weights as they are kept, which is that of 32 bits
    r".*is not supported by the model summary.*",
    # Lightning's own calls, and one of ours that the oldest jsonargparse we take needs
    r"\s*``instantiate_classes`` was deprecated",
    r"\s*skip_none parameter was deprecated",
    r"\s*By default only one JsonargparseDeprecationWarning",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
)

_LINES = re.compile(
    "|".join(
        (
            "💡 Tip:",  # advertisements
            "TPU available: False",
            "Loading `train_dataloader` to estimate",  # what Lightning does for the schedule
            r"`Trainer\.fit` stopped: `max_(epochs|steps)=",  # the end that was asked for
            "Restoring states from the checkpoint path at",  # "Loaded …" or "Restored …" follows when it is done
        )
    )
)
_LOGGERS = ("pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.rank_zero")


def _wanted(record: logging.LogRecord) -> bool:
    return _LINES.match(record.getMessage()) is None


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out lines and warnings that are true of every run."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    with warnings.catch_warnings():
        for text in _WARNINGS:
            warnings.filterwarnings("ignore", message=text)
        for logger in loggers:
            logger.addFilter(_wanted)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(_wanted)


def quieten_wandb(logger: WandbLogger) -> None:
    """Keep W&B's lines to what a reader can use: where an online run is seen, its warnings and its errors."""
    # Lightning passes an argument that W&B has taken out of use, and W&B warns of it
    logger._wandb_init.pop("anonymous", None)
    if logger._offline:
        # our own line has said where the run is kept and how to upload it
        os.environ.setdefault("WANDB_SHOW_INFO", "false")

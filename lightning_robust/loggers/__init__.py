"""Where a run's numbers and figures go: always its own folder, and Weights & Biases."""

from lightning_robust.loggers.run_logger import RunLogger
from lightning_robust.loggers.weights_and_biases import wandb_logger

__all__ = ["RunLogger", "wandb_logger"]

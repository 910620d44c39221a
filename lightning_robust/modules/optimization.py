"""Optimizers and learning-rate schedules, as plain settings."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_robust.errors import UserError


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Which optimizer, and how it steps.

    Args:
        name: "sgd" (with momentum), "adamw" or "adam".
        lr: highest learning rate of the schedule.
        momentum: of SGD; the first beta of Adam is 0.9 whatever it says.
        nesterov: Nesterov momentum in SGD.
        weight_decay: 5e-4 is the choice that matters most for adversarial training (arXiv 2010.00467).
        decay_norm_and_bias: also decay biases and the scales of normalisation layers.
    """

    name: Literal["sgd", "adamw", "adam"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    decay_norm_and_bias: bool = True

    def __post_init__(self) -> None:
        _choose("optimizer", self.name, ("sgd", "adamw", "adam"))
        if self.lr <= 0:
            raise UserError(f"optimizer: lr={self.lr} never learns: give a positive learning rate, for example 0.1")
        if self.weight_decay < 0 or not 0 <= self.momentum < 1:
            raise UserError("optimizer: weight_decay is 0 or more, momentum at least 0 and under 1")
        if self.name == "sgd" and self.nesterov and self.momentum == 0:
            raise UserError("optimizer: nesterov needs a momentum over 0, for example 0.9")

    def build(self, model: nn.Module) -> Optimizer:
        """The optimizer of a model's trainable parameters.

        Raises:
            UserError: if there is nothing to train.
        """
        groups = self._groups(p for p in model.parameters() if p.requires_grad)
        if not any(group["params"] for group in groups):
            raise UserError("the model has no trainable parameters: nothing to fit")
        if self.name == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)
        return (torch.optim.AdamW if self.name == "adamw" else torch.optim.Adam)(groups, lr=self.lr)

    def _groups(self, parameters: Iterable[nn.Parameter]) -> list[dict]:
        parameters = list(parameters)
        if self.decay_norm_and_bias:
            return [{"params": parameters, "weight_decay": self.weight_decay}]
        return [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """How the learning rate goes over the training, step by step.

    Args:
        name: "constant"; "cosine" (to 0); "piecewise" (times ``factor`` at each milestone, as in Madry et al. and Rice
            et al., arXiv 2002.11569); "cyclic" (up to the highest rate at ``peak``, then down to 0, both straight: Wong
            et al., arXiv 2001.03994).
        milestones: of "piecewise", as shares of the training in (0, 1).
        factor: of "piecewise".
        peak: of "cyclic", share of the training at which the rate is highest.
        warmup: share of the training over which the rate first rises from 0, for every schedule but "cyclic".
    """

    name: Literal["constant", "cosine", "piecewise", "cyclic"] = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    factor: float = 0.1
    peak: float = 0.4
    warmup: float = 0.0

    def __post_init__(self) -> None:
        _choose("schedule", self.name, ("constant", "cosine", "piecewise", "cyclic"))
        object.__setattr__(self, "milestones", tuple(self.milestones))  # a checkpoint holds a list
        if self.name == "piecewise" and not all(0 < share < 1 for share in self.milestones):
            raise UserError(f"schedule: milestones={list(self.milestones)} are shares of the training between 0 and 1")
        if not 0 < self.peak < 1 or not 0 <= self.warmup < 1:
            raise UserError("schedule: peak is a share between 0 and 1, warmup at least 0 and under 1")

    def factor_at(self, share: float) -> float:
        """The learning rate at a share of the training in [0, 1], as a share of the highest.

        Example:
            >>> ScheduleSettings(name="piecewise").factor_at(0.6)
            0.1
        """
        if self.name == "cyclic":
            return share / self.peak if share < self.peak else max(0.0, (1 - share) / (1 - self.peak))
        if share < self.warmup:
            return share / self.warmup
        if self.name == "cosine":
            through = (share - self.warmup) / (1 - self.warmup)
            return 0.5 * (1 + math.cos(math.pi * min(through, 1.0)))
        if self.name == "piecewise":
            return self.factor ** sum(share >= milestone for milestone in self.milestones)
        return 1.0

    def build(self, optimizer: Optimizer, total_steps: int) -> LambdaLR:
        """A scheduler that is stepped once an optimizer step."""
        # The first step of a rising schedule would have rate 0; half a step in, every step counts.
        return LambdaLR(optimizer, lambda step: self.factor_at(min((step + 0.5) / total_steps, 1.0)))


def _choose(what: str, name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        raise UserError(f"{what}: name={name!r} does not exist: choose one of {', '.join(names)}")

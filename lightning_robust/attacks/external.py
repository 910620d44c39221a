"""Attacks of other libraries under our contract, callbacks and metrics."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_robust.attacks.base import Attack, Outcome
from lightning_robust.attacks.context import Model
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.projection import norms, project
from lightning_robust.attacks.threat_model import Norm, ThreatModel, check_ball_norm
from lightning_robust.errors import UserError


@contextmanager
def _global_random_state(device: torch.device) -> Iterator[None]:
    """Put the global states of Python, NumPy and torch back, which other libraries draw from."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the state that peers use
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


@dataclass(frozen=True, kw_only=True)
class External(Attack):
    """Any function that perturbs a batch, with its result held to the budget.

    Unlike our own attacks its result may depend on the batch: peers draw their random starts batch by batch. Our
    side of the promise is kept around it (modes, gradients, random state, inference mode); what leaves the ε-ball
    or the box is brought back, and pixels outside the mask are restored, so a peer's larger step is never counted.

    Args:
        function: called as ``function(model, images, labels)``, gives images of the same shape.
        eps: budget in pixel units of [0, 1].
        norm: norm of the budget.
        seed: together with the images it seeds torch's global generator for the call, which is put back afterwards.

    Example:
        With torchattacks: ``External(function=lambda model, x, y: torchattacks.PGD(model, eps=8 / 255)(x, y))``.
        With foolbox: ``External(function=lambda model, x, y: foolbox.attacks.LinfPGD()(
        foolbox.PyTorchModel(model, bounds=(0, 1)), x, y, epsilons=8 / 255)[1])``.
    """

    function: Callable[[Model, Tensor, Tensor], Tensor]
    eps: float | str = "8/255"
    norm: Norm = "linf"
    seed: int = 0

    def __post_init__(self) -> None:
        check_ball_norm(self.norm, "External")
        _ = self.threat_model  # refuses a bad ε

    @property
    def threat_model(self) -> ThreatModel:
        """Norm and budget."""
        return ThreatModel(self.norm, self.eps)

    def perturb(self, problem: Problem) -> Outcome:
        """Call the function and hold its result to the budget."""
        if problem.targets is not None:
            raise UserError("External: give the targets to the other library's attack itself")
        clean = problem.images
        with _global_random_state(clean.device):
            torch.manual_seed(int(problem.keys.sum()) % 2**63)
            moved = self.function(problem.model, clean.clone(), problem.labels.clone()).detach()
        if moved.shape != clean.shape:
            raise UserError(f"External: the function gave shape {tuple(moved.shape)} for {tuple(clean.shape)}")
        if problem.mask is not None:
            moved = torch.where(problem.mask.bool(), moved, clean)
        outside = norms(moved - clean, self.norm) > self.threat_model.radius + 1e-6
        held = project(clean, moved, self.norm, self.threat_model.radius)
        images = torch.where(outside[:, None, None, None], held, moved.clamp(0, 1)).to(clean.dtype)
        unknown = torch.zeros(len(clean), dtype=torch.int64, device=clean.device)
        return Outcome(images, iterations=unknown, queries=unknown.clone())

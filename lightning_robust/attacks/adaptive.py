"""Building blocks of adaptive attacks: what to do about defenses that are random, shatter gradients or scale logits.

A defense that only *looks* strong usually hides its gradients (Athalye et al., arXiv 1802.00420). Against randomness an
attack averages over it (:class:`EOT`); through an operation without a useful gradient it goes by a stand-in for the
backward pass (:class:`BPDA`); logits that a training at high temperature has blown up are scaled back
(:class:`Temperature`, and the losses ``dlr`` and ``ce_scaled``); and what fools another model may fool this one, too
(:class:`Transfer`).
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_robust.attacks.base import Attack, AttackResult, Outcome
from lightning_robust.attacks.context import Model, attacking
from lightning_robust.attacks.problem import Problem
from lightning_robust.attacks.randomness import mix_seed
from lightning_robust.attacks.threat_model import ThreatModel
from lightning_robust.errors import UserError

_VERDICT = 1  # tells the seed of the verdict from those of the search


@runtime_checkable
class Randomized(Protocol):
    """A model that says what its randomness is: :class:`EOT` averages over what :meth:`draws` gives."""

    def draws(self, samples: int) -> Sequence[Model]:
        """Models from images to logits, one for each of ``samples`` draws; all there are, where they are fewer."""
        ...


class _Around(Attack):
    """An attack that runs another one."""

    attack: Attack

    @property
    @abstractmethod
    def threat_model(self) -> ThreatModel:
        """That of the inner attack."""

    def to_the_end(self) -> Attack:
        """The same around an inner attack that does not stop."""
        return self.replace(attack=self.attack.to_the_end())

    def replace(self, **changes: Any) -> Attack:
        """A copy with other settings; what is no setting of this class is one of the inner attack's."""
        own = {field.name for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        inner = {name: value for name, value in changes.items() if name not in own}
        mine = {name: value for name, value in changes.items() if name in own}
        if inner:
            mine["attack"] = mine.get("attack", self.attack).replace(**inner)
        return super().replace(**mine)


@dataclass(frozen=True, kw_only=True)
class EOT(_Around):
    """Expectation over transformation (Athalye et al., arXiv 1707.07397 and 1802.00420) around any gradient attack.

    At every step loss and gradient are averaged over draws of the model's randomness. A defense that says what its
    randomness is (a method ``draws(samples)``, see :class:`Randomized`) is averaged over just that, exactly where it
    has few outcomes; any other model is called ``samples`` times. Every image is attacked to the last step, whatever
    ``stop_at_success`` says of the inner attack: one just past the boundary of the mean fools only half of the draws,
    and one that the mean gets wrong to begin with is got right by some. What was found is judged on the model as it
    is, by one call. (Attacks for the smallest perturbation end at the mean's boundary.)

    A model that draws from torch's generator does so for a batch at a time: for such a model the result depends on the
    batch, and is the same for the same batch and seed.

    Args:
        attack: what runs; an attack on gradients (PGD, APGD, CW, DeepFool, JSMA, …).
        samples: draws at each step; 30 in the published breaks (arXiv 1802.00420), 20 in AutoAttack's ``rand``.
        seed: of torch's global generator while the attack runs and is judged, which is put back afterwards.

    Example:
        >>> from lightning_robust.attacks import PGD
        >>> EOT(attack=PGD(eps="8/255", steps=40), samples=30).threat_model.norm
        'linf'
    """

    attack: Attack
    samples: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"EOT: samples={self.samples}: at least one draw is needed")

    @property
    def threat_model(self) -> ThreatModel:
        """That of the inner attack."""
        return self.attack.threat_model

    def run(self, *args: Any, stand_in: Model | None = None, **options: Any) -> AttackResult:
        """As :meth:`Attack.run`; ``stand_in`` is not used, since a copy would draw other random numbers."""
        with torch.random.fork_rng():  # for the verdict: on every device
            torch.manual_seed(mix_seed(self.seed, _VERDICT) % 2**63)
            return super().run(*args, **options)

    def perturb(self, problem: Problem) -> Outcome:
        """Run the inner attack on the average."""
        model = problem.model

        def draws() -> Sequence[Model]:
            if isinstance(model, Randomized):
                return model.draws(self.samples)
            return [model] * self.samples

        device = problem.images.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(mix_seed(self.seed, int(problem.keys.sum())) % 2**63)
            # one call's clean logits say nothing of the mean
            averaged = dataclasses.replace(problem, draws=draws, clean_logits=None)
            outcome = self.attack.to_the_end().perturb(averaged)
            outcome.queries *= len(draws())
        outcome.success = None  # for the model as it is to say
        return outcome


class BPDA(nn.Module):
    """Backward pass differentiable approximation (Athalye et al., arXiv 1802.00420) of an operation on images.

    Forward it is the operation, to the bit; backward it is the surrogate. Put it in front of a classifier in place of
    the operation: ``nn.Sequential(BPDA(jpeg), classifier)``.

    Args:
        operation: images to images, with no or a useless gradient.
        surrogate: a differentiable function near it; by default the identity, which suits operations that leave an
            image nearly as it is.

    Example:
        >>> eight_bits = BPDA(lambda images: (images * 7).round() / 7)
        >>> images = torch.tensor([[[[0.3]]]], requires_grad=True)
        >>> torch.autograd.grad(eight_bits(images).sum(), images)[0].item()
        1.0
    """

    def __init__(
        self, operation: Callable[[Tensor], Tensor], surrogate: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.operation, self.surrogate = operation, surrogate

    def forward(self, images: Tensor) -> Tensor:
        """``(N, C, H, W)`` to what the operation gives."""
        with torch.no_grad():
            out = self.operation(images.detach())
        if not (torch.is_grad_enabled() and images.requires_grad):
            return out
        near = images if self.surrogate is None else self.surrogate(images)
        if near.shape != out.shape:
            raise UserError(
                f"BPDA: the operation gives shape {tuple(out.shape)} and its surrogate {tuple(near.shape)}: they must "
                "be alike"
            )
        return out + (near - near.detach())  # adds zero, and carries the gradient


class Temperature(nn.Module):
    """A model whose logits are divided by a temperature.

    Training at temperature T (defensive distillation) blows logits up by about T, and the softmax of such logits has
    gradients that underflow. Dividing them again undoes that (arXiv 1607.04311) and changes no prediction.

    Args:
        model: images to logits.
        temperature: positive; that of the training.
    """

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        if not temperature > 0:
            raise UserError(f"temperature={temperature}: it is a positive number, for example 100")
        self.model, self.temperature = model, temperature

    def forward(self, images: Tensor) -> Tensor:
        """``(N, C, H, W)`` to logits ``(N, K)``."""
        return self.model(images) / self.temperature


@dataclass(frozen=True, kw_only=True)
class Transfer(_Around):
    """Adversarial images of a surrogate model, tried on the model under test, which is not asked during the search.

    The inner attack goes on to its last step, whatever its ``stop_at_success`` says: an image just past the boundary of
    the surrogate is unlikely to be past that of another model.

    Args:
        attack: what runs against the surrogate.
        surrogate: images in [0, 1] to logits of the same classes; its modes and gradients are left as they are.
        seed: takes no part; the inner attack has its own.
    """

    attack: Attack
    surrogate: nn.Module
    seed: int = 0

    @property
    def threat_model(self) -> ThreatModel:
        """That of the inner attack."""
        return self.attack.threat_model

    def run(self, *args: Any, stand_in: Model | None = None, **options: Any) -> AttackResult:
        """As :meth:`Attack.run`; ``stand_in`` is not used, since the search asks the surrogate alone."""
        return super().run(*args, **options)

    def perturb(self, problem: Problem) -> Outcome:
        """Attack the surrogate where the model under test is not wrong already."""
        count, device = len(problem.images), problem.images.device
        queries = torch.zeros(count, dtype=torch.int64, device=device)
        logits = problem.clean_logits
        if logits is None:
            queries += 1
            with torch.no_grad():
                logits = problem.logits(problem.images)
        images = problem.images.clone()
        iterations = torch.zeros_like(queries)
        rows = (~problem.fooled(logits)).nonzero()[:, 0]
        if len(rows):
            with attacking(self.surrogate) as lent:
                part = dataclasses.replace(problem.subset(rows), model=lent, clean_logits=None, _checked=False)
                found = self.attack.to_the_end().perturb(part)
            images[rows], iterations[rows] = found.images, found.iterations
        return Outcome(images, iterations, queries)

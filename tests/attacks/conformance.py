"""The attack promise (base.Attack) as checks of any attack, ours or a peer's.

Every check takes ``run(model, images, labels) -> adversarial images`` and a :class:`Setting`, and raises
``AssertionError`` with a sentence where a promise is broken. ``tests/attacks/test_conformance.py`` holds our attacks to
all of them, ``benchmarks/peers_conformance.py`` shows which ones other libraries keep.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Run = Callable[[nn.Module, Tensor, Tensor], Tensor]

CLASSES = 5
SHAPE = (3, 8, 8)


class Trained(NamedTuple):
    """A network in eval mode and images ``(N, 1, 8, 8)`` that it was not trained on."""

    model: nn.Module
    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Setting:
    """What the run under test was told, so that the checks know what to expect.

    Attributes:
        norm: "linf", "l2", "l1" or "l0" (pixels of which any channel changes).
        eps: the budget; infinity for attacks that minimise the norm instead.
        mask: ``(H, W)``, 1 where pixels may change; ``None``: everywhere.
        targeted: the run aims at ``(label + 1) % CLASSES``.
        stop_at_success: images on which the goal is reached to begin with are to come back unchanged.
        strict: around a compiled or distributed model, also look at what has a check of its own on a plain one.
    """

    norm: str = "linf"
    eps: float = 0.1
    mask: Tensor | None = None
    targeted: bool = False
    stop_at_success: bool = True
    strict: bool = True

    def reached(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Whether the attacker has what it wants, image by image."""
        predicted = logits.argmax(1)
        return predicted == (labels + 1) % CLASSES if self.targeted else predicted != labels


class Net(nn.Module):
    """A small classifier with everything that attacks break: BatchNorm, dropout, and a frozen child."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.frozen = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8 * 4 * 4, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.frozen(self.first(images)))


def make_model(dtype: torch.dtype = torch.float32) -> Net:
    """A :class:`Net` in train mode whose child ``frozen`` is frozen in eval mode, with ``.grad`` on its parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = Net()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.2)
                nn.init.uniform_(module.running_var, 0.3, 2)
                nn.init.uniform_(module.weight, 0.5, 2)
        model.to(dtype).train()
        model.frozen.eval()
        for parameter in model.frozen.parameters():
            parameter.requires_grad_(False)
        for parameter in model.first.parameters():
            parameter.grad = torch.randn_like(parameter)
    return model


def make_batch(model: nn.Module, count: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Images with some black and some white pixels, and the labels that the model gives them in eval mode."""
    generator = torch.Generator().manual_seed(3)
    images = (torch.rand(count, *SHAPE, generator=generator) * 1.4 - 0.2).clamp(0, 1).to(dtype)
    return images, evaluate(model, images).argmax(1)


def evaluate(model: nn.Module, images: Tensor) -> Tensor:
    """Logits in eval mode, leaving the model as it was."""
    modes = [module.training for module in model.modules()]
    model.eval()
    with torch.no_grad():
        logits = model(images)
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    return logits


@dataclass
class Snapshot:
    """Everything about a model that an attack has to leave alone."""

    modes: dict[str, bool]
    asks: dict[str, bool]
    values: dict[str, Tensor]
    grads: dict[str, Tensor | None]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        return cls(
            modes={name: module.training for name, module in model.named_modules()},
            asks={name: parameter.requires_grad for name, parameter in model.named_parameters()},
            values={name: value.detach().clone() for name, value in model.state_dict().items()},
            grads={
                name: None if parameter.grad is None else parameter.grad.clone()
                for name, parameter in model.named_parameters()
            },
        )

    def assert_modes(self, model: nn.Module) -> None:
        changed = [name for name, module in model.named_modules() if module.training != self.modes[name]]
        assert not changed, f"train or eval mode changed: {', '.join(name or 'the model' for name in changed)}"

    def assert_parameters(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == self.asks[name], f"requires_grad of {name} changed"
            before = self.grads[name]
            assert (before is None) == (parameter.grad is None), f".grad of {name} appeared or vanished"
            assert before is None or torch.equal(before, parameter.grad), f".grad of {name} changed"

    def assert_values(self, model: nn.Module) -> None:
        for name, value in model.state_dict().items():
            assert torch.equal(value, self.values[name]), f"{name} changed"

    def assert_same(self, model: nn.Module) -> None:
        self.assert_modes(model)
        self.assert_parameters(model)
        self.assert_values(model)


def assert_result(adversarial: Tensor, images: Tensor, setting: Setting) -> None:
    """Shape, type, pixel box, ε-ball and mask of a result."""
    assert adversarial.shape == images.shape, f"shape {tuple(adversarial.shape)}"
    assert adversarial.dtype == images.dtype, f"type {adversarial.dtype}"
    assert not adversarial.requires_grad, "the result carries a graph"
    assert torch.isfinite(adversarial).all(), "the result is not finite"
    assert adversarial.min() >= 0, f"pixels down to {adversarial.min():.3g}"
    assert adversarial.max() <= 1, f"pixels up to {adversarial.max():.3g}"
    delta = (adversarial.double() - images.double()).flatten(1)
    if setting.norm == "l0":
        size = float((adversarial != images).any(1).flatten(1).sum(1).max())
    else:
        order = {"linf": torch.inf, "l2": 2, "l1": 1}[setting.norm]
        size = float(delta.norm(p=order, dim=1).max())
    room = 1e-6 * max(1, setting.eps) if setting.eps < torch.inf else 0
    assert size <= setting.eps + room, f"{setting.norm} norm {size:.7g} with ε={setting.eps:.7g}"
    if setting.mask is not None:
        outside = (setting.mask == 0).expand_as(images)
        assert torch.equal(adversarial[outside], images[outside]), "pixels outside the mask changed"


def seeded(run: Run) -> Run:
    """The run from one state of the global generators, so that a check of something else is not about randomness."""

    def same_draws(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        states = random.getstate(), np.random.get_state()  # noqa: NPY002  # others draw there
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            try:
                return run(model, images, labels)
            finally:
                random.setstate(states[0])
                np.random.set_state(states[1])  # noqa: NPY002

    return same_draws


def check_result(run: Run, setting: Setting) -> None:
    """In the ε-ball and the box, outside the mask untouched, images and labels not written to; it does attack."""
    model = make_model()
    images, labels = make_batch(model)
    given, wanted = images.clone(), labels.clone()
    adversarial = run(model, images, labels)
    assert_result(adversarial, images, setting)
    assert torch.equal(images, given), "the caller's images were written to"
    assert torch.equal(labels, wanted), "the caller's labels were written to"
    assert not torch.equal(adversarial, images), "no image was changed"
    assert adversarial.data_ptr() != images.data_ptr(), "the result is the caller's own tensor"


def check_modes(run: Run, setting: Setting) -> None:
    """The mode of every submodule is as before, also that of a frozen child inside a model in train mode."""
    model = make_model()
    images, labels = make_batch(model)
    before = Snapshot.of(model)
    run(model, images, labels)
    before.assert_modes(model)


def check_statistics(run: Run, setting: Setting) -> None:
    """BatchNorm statistics and weights are as before."""
    model = make_model()
    images, labels = make_batch(model)
    before = Snapshot.of(model)
    run(model, images, labels)
    before.assert_values(model)


def check_parameters(run: Run, setting: Setting) -> None:
    """``.grad`` and ``requires_grad`` of every parameter are as before."""
    model = make_model()
    images, labels = make_batch(model)
    before = Snapshot.of(model)
    run(model, images, labels)
    before.assert_parameters(model)


def check_attacks_eval_mode(run: Run, setting: Setting) -> None:
    """The function attacked is that of eval mode: the same result whatever mode the model is handed over in."""
    run = seeded(run)
    model = make_model()
    images, labels = make_batch(model)
    in_train = run(model, images, labels)
    model.eval()
    assert torch.equal(in_train, run(model, images, labels)), "another result where the model came in train mode"


def check_random_state(run: Run, setting: Setting) -> None:
    """The global random states of torch, Python and NumPy are as before."""
    model = make_model()
    images, labels = make_batch(model)
    states = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002  # others draw there
    run(model, images, labels)
    assert torch.equal(states[0], torch.get_rng_state()), "torch's random state moved"
    assert states[1] == random.getstate(), "Python's random state moved"
    assert states[2] == repr(np.random.get_state()), "NumPy's random state moved"  # noqa: NPY002


def check_repeatable(run: Run, setting: Setting) -> None:
    """The same call gives the same result, whatever the global random state."""
    model = make_model()
    images, labels = make_batch(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        once = run(model, images, labels)
        torch.manual_seed(2)
        assert torch.equal(once, run(model, images, labels)), "a second call gave another result"


def check_batch_independence(run: Run, setting: Setting) -> None:
    """An image's result does not depend on its neighbours in the batch (float64, where sums round alike)."""
    run = seeded(run)
    model = make_model(torch.float64)
    images, labels = make_batch(model, dtype=torch.float64)
    together = run(model, images, labels)
    for row in range(len(images)):
        alone = run(model, images[row : row + 1], labels[row : row + 1])
        assert torch.allclose(alone[0], together[row], rtol=0, atol=1e-9), f"image {row} alone and in the batch differ"
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    permuted = run(model, images[order], labels[order])
    assert torch.allclose(permuted, together[order], rtol=0, atol=1e-9), "the order of the batch changes the result"


def check_batch_of_one(run: Run, setting: Setting) -> None:
    """One image is a batch."""
    model = make_model()
    images, labels = make_batch(model, 1)
    assert_result(run(model, images, labels), images, setting)


def check_misclassified(run: Run, setting: Setting) -> None:
    """Where all images are misclassified to begin with, the attack works, and one that stops returns them unchanged."""
    model = make_model()
    images, predicted = make_batch(model)
    labels = (predicted - 1) % CLASSES  # misclassified, and as the target of a targeted run
    adversarial = run(model, images, labels)
    assert_result(adversarial, images, setting)
    if setting.stop_at_success:
        assert torch.equal(adversarial, images), "images that were misclassified to begin with were changed"


def check_success_not_lost(run: Run, setting: Setting) -> None:
    """An image on which the goal was reached to begin with is never given back as a failure by attacks that stop."""
    model = make_model()
    images, labels = make_batch(model)
    labels = torch.where(torch.arange(len(labels)) % 2 == 0, (labels - 1) % CLASSES, labels)
    before = setting.reached(evaluate(model, images), labels)
    after = setting.reached(evaluate(model, run(model, images, labels)), labels)
    assert before.any()
    if setting.stop_at_success:
        assert bool((after | ~before).all()), "a misclassified image came back classified correctly"


class _Constant(nn.Module):
    """Differentiable, with a gradient of zero."""

    def forward(self, images: Tensor) -> Tensor:
        return F.pad(images.flatten(1).sum(1, keepdim=True) * 0, (0, CLASSES - 1))


def check_constant_model(run: Run, setting: Setting) -> None:
    """A gradient of zero gives neither NaN nor an error."""
    images, _ = make_batch(make_model())
    labels = torch.zeros(len(images), dtype=torch.int64)
    assert_result(run(_Constant(), images, labels), images, setting)


def check_float64(run: Run, setting: Setting) -> None:
    """float64 in, float64 out."""
    model = make_model(torch.float64)
    images, labels = make_batch(model, dtype=torch.float64)
    adversarial = run(model, images, labels)
    assert_result(adversarial, images, setting)
    assert not torch.equal(adversarial, images), "no image was changed"


def check_int32_labels(run: Run, setting: Setting) -> None:
    """Labels of any integer type do."""
    run = seeded(run)
    model = make_model()
    images, labels = make_batch(model)
    expected = run(model, images, labels)
    assert torch.equal(run(model, images, labels.int()), expected), "another result for int32 labels"


def check_no_grad(run: Run, setting: Setting) -> None:
    """Works, with the same result, where the caller has switched gradients off."""
    run = seeded(run)
    model = make_model()
    images, labels = make_batch(model)
    expected = run(model, images, labels)
    with torch.no_grad():
        adversarial = run(model, images, labels)
        assert not torch.is_grad_enabled(), "gradients were left on"
    assert torch.equal(adversarial, expected), "another result under no_grad"


def check_inference_mode(run: Run, setting: Setting) -> None:
    """Works, with the same result, in inference mode, where Lightning validates."""
    run = seeded(run)
    model = make_model()
    images, labels = make_batch(model)
    before = Snapshot.of(model)
    expected = run(model, images, labels)
    with torch.inference_mode():
        adversarial = run(model, images.clone(), labels.clone())  # clones made here are inference tensors
        assert torch.is_inference_mode_enabled(), "inference mode was left"
    assert torch.equal(adversarial, expected), "another result in inference mode"
    before.assert_same(model)


def check_autocast(run: Run, setting: Setting) -> None:
    """Works under bfloat16 autocast, and does not spoil the cache of a training step in the same region."""
    model = make_model()
    images, labels = make_batch(model)

    def step() -> list[Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            loss = F.cross_entropy(model(images), labels)
        return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))

    buffers = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16):
        expected = step()
    model.load_state_dict(buffers)
    with torch.autocast("cpu", torch.bfloat16):
        adversarial = run(model, images, labels)
        model.train().frozen.eval()  # whether modes are kept is another check
        model.load_state_dict(buffers)
        after = step()
    assert_result(adversarial, images, setting)
    assert all(torch.equal(a, b) for a, b in zip(after, expected, strict=True)), "gradients after the attack differ"


def check_training_graph(run: Run, setting: Setting) -> None:
    """A graph that the caller has pending over the same weights is not spoiled."""
    run = seeded(run)
    model = make_model()
    images, labels = make_batch(model)
    asked = [p for p in model.parameters() if p.requires_grad]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected = torch.autograd.grad(F.cross_entropy(model(images), labels), asked)
        torch.manual_seed(0)
        loss = F.cross_entropy(model(images), labels)
    run(model, images, labels)
    after = torch.autograd.grad(loss, asked)
    assert all(torch.allclose(a, b) for a, b in zip(after, expected, strict=True)), "gradients after the attack differ"


def check_compiled(run: Run, setting: Setting) -> None:
    """A compiled model, wrapped or in place, gives the same result and is left as it was."""
    run = seeded(run)
    for backend, in_place in (("eager", False), ("aot_eager", True)):
        torch._dynamo.reset()
        model = make_model()
        images, labels = make_batch(model)
        expected = run(model, images, labels)
        if in_place:
            model.compile(backend=backend)
            compiled: nn.Module = model
        else:
            compiled = torch.compile(model, backend=backend)  # type: ignore[assignment]
        before = Snapshot.of(compiled)
        assert torch.allclose(run(compiled, images, labels), expected, atol=1e-5), "another result when compiled"
        if setting.strict:
            before.assert_same(compiled)
    torch._dynamo.reset()


@contextlib.contextmanager
def single_process_group() -> Iterator[None]:
    """A gloo group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def check_distributed(run: Run, setting: Setting) -> None:
    """A DDP-wrapped model: same result, model as before, and the wrapper still trains."""
    run = seeded(run)
    with single_process_group():
        model = make_model()
        images, labels = make_batch(model)
        expected = run(model, images, labels)
        wrapped = nn.parallel.DistributedDataParallel(model)
        before = Snapshot.of(model)
        for _ in range(2):
            assert torch.equal(run(wrapped, images, labels), expected), "another result through DDP"
            if setting.strict:
                before.assert_same(model)
            F.cross_entropy(wrapped(images), labels).backward()
            assert model.head[-1].weight.grad is not None
            # training has moved these; put them back for the next round
            model.train().frozen.eval()
            model.load_state_dict(before.values)
            for name, parameter in model.named_parameters():
                old = before.grads[name]
                parameter.grad = None if old is None else old.clone()


class _Failing(nn.Module):
    """Raises in the middle of its n-th forward pass, below several levels."""

    def __init__(self, inner: nn.Module, calls: int) -> None:
        super().__init__()
        self.inner, self.left = inner, calls

    def forward(self, images: Tensor) -> Tensor:
        self.left -= 1
        logits = self.inner(images)
        if self.left <= 0:
            raise ConnectionError("in the middle of the forward pass")
        return logits


def check_exception(run: Run, setting: Setting) -> None:
    """An exception out of the model reaches the caller and leaves everything as it was."""
    for calls in (1, 2):
        inner = make_model()
        images, labels = make_batch(inner)
        model = _Failing(inner, calls)
        before = Snapshot.of(model)
        try:
            run(model, images, labels)
        except ConnectionError:
            pass
        else:
            assert calls > 1, "the exception did not reach the caller"
        assert torch.is_grad_enabled(), "gradients were left off"
        before.assert_same(model)


def check_range_refused(run: Run, setting: Setting) -> None:
    """Images outside [0, 1], as a normalising transform leaves them, are refused and not attacked with another ε."""
    model = make_model()
    images, labels = make_batch(model)
    try:
        run(model, images * 4 - 2, labels)
    except Exception:  # which one is the library's own affair
        return
    raise AssertionError("normalised images (-2 to 2) were attacked without a word")


class _LogSoftmax(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images).log_softmax(1)


def check_log_softmax(run: Run, setting: Setting) -> None:
    """Success does not depend on whether the network ends in log_softmax (all logits negative)."""
    run = seeded(run)
    model = make_model().eval()
    images, labels = make_batch(model)
    plain = setting.reached(evaluate(model, run(model, images, labels)), labels)
    normalised = setting.reached(evaluate(model, run(_LogSoftmax(model).eval(), images, labels)), labels)
    assert int((plain & ~normalised).sum()) <= len(images) // 4, (
        f"{int(plain.sum())} of {len(images)} images fooled with logits, {int(normalised.sum())} with log_softmax"
    )


def check_extreme_pixels(run: Run, setting: Setting) -> None:
    """Pixels that are exactly 0 or 1 can be moved."""
    model = make_model().eval()

    def moves(images: Tensor) -> bool:
        return not torch.equal(run(model, images, evaluate(model, images).argmax(1)), images)

    images = (make_batch(model)[0] > 0.5).float()
    # an attack that fails at nearly black and white images, too, shows nothing about exactly black and white ones
    assert moves(images) or not moves(images.clamp(0.01, 0.99)), "no pixel of black and white images was moved"


CHECKS: dict[str, Callable[[Run, Setting], None]] = {
    "result in ball, box and mask": check_result,
    "attacks the eval-mode function": check_attacks_eval_mode,
    "modes as before": check_modes,
    "BatchNorm statistics as before": check_statistics,
    ".grad and requires_grad as before": check_parameters,
    "as before after an exception": check_exception,
    "global random state as before": check_random_state,
    "repeatable": check_repeatable,
    "independent of the batch": check_batch_independence,
    "batch of one": check_batch_of_one,
    "misclassified images unchanged": check_misclassified,
    "initial success not lost": check_success_not_lost,
    "constant model": check_constant_model,
    "float64": check_float64,
    "int32 labels": check_int32_labels,
    "under no_grad": check_no_grad,
    "in inference mode": check_inference_mode,
    "under bf16 autocast": check_autocast,
    "pending graph unspoiled": check_training_graph,
    "compiled model": check_compiled,
    "DDP-wrapped model": check_distributed,
    "normalised input refused": check_range_refused,
    "net ending in log_softmax": check_log_softmax,
    "black and white pixels": check_extreme_pixels,
}

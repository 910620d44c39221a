"""Stand-ins compute what their model computes, and follow its weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance import CLASSES, Snapshot, evaluate, make_batch, make_model, single_process_group
from torch import Tensor, nn
from torchvision.models import resnet18

from lightning_robust.attacks import PGD, accelerate
from lightning_robust.attacks.acceleration import Accelerated


def randomise_statistics(model: nn.Module) -> nn.Module:
    """BatchNorms as training leaves them, not the identity."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.3, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
    return model


class PreActivation(nn.Module):
    """BatchNorm before the convolution: only the inner pair folds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm_1, self.conv_1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.norm_2, self.conv_2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        stem = self.stem(images)  # used twice: its BatchNorm must not be folded into it
        hidden = self.conv_1(self.norm_1(stem).relu())
        return self.head((stem + self.conv_2(self.norm_2(hidden).relu())).mean((2, 3)))


class Normalised(nn.Module):
    """Buffers of its own in front of a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / 0.25)


class Untraceable(nn.Module):
    """Branches on the values of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        if images.mean() > 2:
            images = images * 0
        return self.head(self.norm(self.conv(images)).relu().mean((2, 3)))


class SharedConvolution(nn.Module):
    """One convolution, two BatchNorms: no fold is right for both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head((self.one(self.conv(images)) * self.two(self.conv(images))).mean((2, 3)))


class TiedWeights(nn.Module):
    """Two layers, one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.second.weight = self.first.weight
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.second(self.first(images).relu())).mean((2, 3)))


class TwoNames(nn.Module):
    """One module under two names, called once by each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(3, CLASSES)
        self.again = self.conv

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.again(self.conv(images).relu())).mean((2, 3)))


def parametrised() -> nn.Module:
    """Spectral norm keeps the weight as a property; its convolution is no plain convolution."""
    conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 3))
    return nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, CLASSES))


def weight_normed() -> nn.Module:
    """The old weight norm rewrites the weight in a hook before each forward pass."""
    with pytest.warns(FutureWarning):
        conv = nn.utils.weight_norm(nn.Conv2d(3, 8, 3))
    return nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, CLASSES))


def plain(**norm: Any) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, **norm), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, CLASSES)
    )


MODELS = {
    "resnet18": (lambda: resnet18(num_classes=CLASSES), 20),
    "conformance net": (make_model, 2),
    "preactivation": (PreActivation, 1),
    "normalised": (lambda: Normalised(plain()), 1),
    "no affine": (lambda: plain(affine=False), 1),
    "no statistics": (lambda: plain(track_running_stats=False), 0),
    "synchronised": (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(plain()), 1),
    "untraceable": (Untraceable, 0),
    "shared convolution": (SharedConvolution, 0),
    "tied weights": (TiedWeights, 1),
    "two names": (TwoNames, 0),
    "spectral norm": (parametrised, 0),
    "weight norm": (weight_normed, 0),
    "linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)), 0),
}


def gradient_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(images), labels, reduction="sum"), images)
    return gradient


@pytest.mark.parametrize(
    "options", [{}, {"fold": False}, {"channels_last": False}], ids=["all", "no fold", "no layout"]
)
@pytest.mark.parametrize("name", MODELS)
def test_a_stand_in_computes_what_its_model_computes(name: str, options: dict[str, bool]) -> None:
    make, folds = MODELS[name]
    model = randomise_statistics(make()).train()
    images = torch.rand(3, 3, 8, 8)
    if name == "spectral norm":
        model(images)  # its power iteration has to have begun
    before = Snapshot.of(model)
    stand_in = accelerate(model, **options)
    assert isinstance(stand_in, Accelerated)
    assert stand_in.folded == (folds if options.get("fold", True) else 0)
    before.assert_same(model)
    expected = evaluate(model, images)
    torch.testing.assert_close(stand_in(images), expected, rtol=1e-4, atol=1e-5)
    labels = expected.argmax(1)
    model.eval()
    torch.testing.assert_close(
        gradient_of(stand_in, images, labels), gradient_of(model, images, labels), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_refresh_takes_over_new_weights(name: str, dtype: torch.dtype | None) -> None:
    model = randomise_statistics(MODELS[name][0]()).eval()
    images = torch.rand(3, 3, 8, 8)
    stand_in = Accelerated(model, dtype=dtype)
    old = stand_in(images)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(0.01 * torch.randn_like(parameter))
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.mul_(1.2)
    expected = evaluate(model, images)
    assert (old - expected).abs().max() > 0.1 * expected.abs().max()
    assert torch.equal(stand_in(images), old)
    stand_in.refresh()
    tolerance = (
        {"rtol": 1e-3, "atol": 1e-3} if dtype is None else {"rtol": 0.1, "atol": 0.03 * float(expected.abs().max())}
    )
    torch.testing.assert_close(stand_in(images), expected, **tolerance)


def test_refresh_follows_a_change_of_type() -> None:
    model = make_model()
    stand_in = Accelerated(model)
    model.double()
    stand_in.refresh()
    images, _ = make_batch(model, dtype=torch.float64)
    torch.testing.assert_close(stand_in(images), evaluate(model, images), rtol=1e-9, atol=1e-9)


def test_tensors_come_back_in_the_type_they_came_in_and_channels_last_is_everywhere() -> None:
    model = make_model()
    images, _ = make_batch(model)
    stand_in = Accelerated(model, dtype=torch.bfloat16)
    assert stand_in(images).dtype == torch.float32
    for tensor in (*stand_in.copy.parameters(), *stand_in.copy.buffers()):
        assert tensor.dtype in (torch.bfloat16, torch.int64)
        assert tensor.dim() != 4 or tensor.is_contiguous(memory_format=torch.channels_last)
    for tensor in Accelerated(model).copy.parameters():
        assert tensor.dim() != 4 or tensor.is_contiguous(memory_format=torch.channels_last)


def test_a_stand_in_is_in_eval_mode_without_parameters_that_ask_for_gradients() -> None:
    stand_in = Accelerated(make_model())
    assert not any(module.training for module in stand_in.modules())
    assert not any(parameter.requires_grad for parameter in stand_in.parameters())


def test_its_weights_are_not_the_model_s_and_the_model_is_no_part_of_it() -> None:
    model = make_model()
    stand_in = Accelerated(model)
    mine = {tensor.data_ptr() for tensor in (*stand_in.parameters(), *stand_in.buffers())}
    assert mine.isdisjoint(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))
    assert not any(module is model for module in stand_in.modules())


def test_a_model_with_a_pending_graph_can_be_copied() -> None:
    model = make_model()
    images, labels = make_batch(model)
    loss = F.cross_entropy(model(images), labels)
    torch.testing.assert_close(Accelerated(model)(images), evaluate(model, images), rtol=1e-4, atol=1e-5)
    loss.backward()


class RandomShift(nn.Module):
    """A randomised defense: another shift at every call."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.conv, self.norm = kind, nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        shift = int(torch.randint(0, 8, ())) if self.kind == "number" else torch.rand(3, 1, 1)
        images = images.roll(shift, 3) * torch.linspace(0, 1, 8) if self.kind == "number" else images + shift
        return self.head(self.norm(self.conv(images)).mean((2, 3)))


@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_a_randomised_model_stays_random(kind: str) -> None:
    """Tracing would write one draw into the graph; and it must not use the caller's random numbers up."""
    model = RandomShift(kind).eval()
    state = torch.get_rng_state()
    stand_in = Accelerated(model)
    assert torch.equal(state, torch.get_rng_state())
    assert stand_in.folded == 0
    images = torch.rand(2, 3, 8, 8)
    assert len({float(stand_in(images).sum()) for _ in range(20)}) > 1


def test_a_hook_on_a_layer_keeps_being_called() -> None:
    model = plain()
    seen = []
    model[1].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    stand_in = Accelerated(model)
    assert stand_in.folded == 0
    stand_in(torch.rand(1, 3, 8, 8))
    assert seen


def test_what_is_no_module_or_a_stand_in_already_is_itself() -> None:
    stand_in = accelerate(make_model())
    assert accelerate(stand_in) is stand_in
    function = torch.sum
    assert accelerate(function) is function


def test_wrappers_are_taken_off() -> None:
    model = make_model()
    images, _ = make_batch(model)
    with single_process_group():
        wrapped = nn.parallel.DistributedDataParallel(model)
        for outer in (wrapped, torch.compile(model, backend="eager"), torch.compile(wrapped, backend="eager")):
            stand_in = accelerate(outer)
            assert isinstance(stand_in, Accelerated)
            assert stand_in.folded == 2
            torch.testing.assert_close(stand_in(images), evaluate(model, images), rtol=1e-4, atol=1e-5)


def test_made_and_refreshed_in_inference_mode_it_can_still_be_attacked() -> None:
    model = make_model()
    images, labels = make_batch(model)
    with torch.inference_mode():
        stand_in = Accelerated(model, dtype=torch.bfloat16)
        stand_in.refresh()
        adversarial = PGD(eps=0.05, steps=2)(stand_in, images, labels)
    assert not torch.equal(adversarial, images)


class Disagreeing(nn.Module):
    """A stand-in that is wrong about half of the images."""

    def __init__(self, model: nn.Module, wrong: Tensor) -> None:
        super().__init__()
        self.model, self.wrong = model, wrong

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        wrong = (images.mean((1, 2, 3))[:, None] - self.wrong).abs().amin(1) < 0.02
        return torch.where(wrong[:, None], -logits, logits)


@pytest.mark.parametrize("stop", [True, False])
def test_success_on_a_stand_in_is_confirmed_on_the_model(stop: bool) -> None:
    """A stand-in that thinks some clean images fooled: they are attacked again, and what is reported is the truth."""
    model = make_model()
    images, labels = make_batch(model, 16)
    labels[::4] = (labels[::4] + 1) % CLASSES
    stand_in = Disagreeing(model, images[::2].mean((1, 2, 3)))
    attack = PGD(eps=0.05, steps=5, stop_at_success=stop)
    result = attack.run(model, images, labels, stand_in=stand_in)
    assert torch.equal(result.success, evaluate(model, result.images).argmax(1) != labels)
    if stop:
        # a success that only the stand-in saw was searched for again, exactly as without a stand-in
        assert torch.equal(result.success, attack.run(model, images, labels).success)
        assert torch.equal(result.images[::4], images[::4])


@pytest.mark.parametrize("stop", [True, False])
def test_success_in_bfloat16_is_success_in_float32(stop: bool) -> None:
    model = make_model()
    images, labels = make_batch(model, 32)
    attack = PGD(eps=0.03, steps=5, stop_at_success=stop)
    plain_result = attack.run(model, images, labels)
    result = attack.run(model, images, labels, stand_in=accelerate(model, dtype=torch.bfloat16))
    assert result.images.dtype == torch.float32
    assert (result.images - images).abs().max() <= 0.03 + 1e-6
    assert torch.equal(result.success, evaluate(model, result.images).argmax(1) != labels)
    assert 4 <= int(plain_result.success.sum()) < 32
    assert (result.success != plain_result.success).sum() <= 1
    assert result.clean_gradient is None


def test_a_misclassified_image_is_for_the_model_to_say() -> None:
    """Wrong on the model, right on the stand-in: comes back unchanged all the same."""
    model = make_model()
    images, labels = make_batch(model)
    other = make_model()
    with torch.no_grad():
        other.head[-1].bias.add_(torch.tensor([100.0, 0, 0, 0, 0]))
    labels = torch.where(labels == 0, 1, 0)  # all wrong on the model, all zeros right on the other
    for attack in (PGD(eps=0.05, steps=2), PGD(eps=0.05, steps=2, random_start=False)):
        result = attack.run(model, images, labels, stand_in=other)
        assert result.success.all()
        assert torch.equal(result.images, images)

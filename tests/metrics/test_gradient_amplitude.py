"""Amplitudes of adversarial gradients: against autograd, and where autograd would round to nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_robust.errors import UserError
from lightning_robust.metrics import GradientAmplitude, softmax_jacobian_amplitude
from lightning_robust.metrics.gradient_amplitude import RANGE_NAMES, RANGES


def network(scale: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 4)).double()
    with torch.no_grad():
        net[4].weight *= scale
        net[4].bias *= scale
    return net


def images(count: int = 5) -> Tensor:
    return torch.rand(count, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_it_is_the_mean_of_the_jacobian() -> None:
    net, batch = network(), images()
    found = softmax_jacobian_amplitude(net, batch)
    assert net.training  # lent in eval mode and given back
    net.eval()
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x).softmax(1).sum(0), batch)
    torch.testing.assert_close(found, jacobian.abs().mean((0, 2, 3, 4)))
    with torch.inference_mode():
        torch.testing.assert_close(softmax_jacobian_amplitude(net, images()), found)


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    net, batch = network(), images()
    alone = torch.cat([softmax_jacobian_amplitude(net, image[None]) for image in batch])
    torch.testing.assert_close(alone, softmax_jacobian_amplitude(net, batch), rtol=1e-12, atol=0)


def test_saturated_probabilities_lose_nothing() -> None:
    """Two classes apart by m: mean |J| = p(1 - p) · mean |∂(z_0 - z_1)|, with p(1 - p) = e^-m to the last digit."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
    image = torch.rand(1, 1, 2, 2, dtype=torch.float64)
    for margin in (10.0, 50.0, 200.0, 600.0):
        with torch.no_grad():
            net[1].bias.zero_()
            net[1].bias[0] = margin - float(net(image)[0, 0] - net(image)[0, 1])
        slope = (net[1].weight[0] - net[1].weight[1]).detach().abs().mean()
        wanted = slope / (2 + torch.exp(torch.tensor(margin).double()) + torch.exp(torch.tensor(-margin).double()))
        torch.testing.assert_close(softmax_jacobian_amplitude(net, image)[0], wanted, rtol=1e-9, atol=0)


def test_large_logits_have_small_gradients() -> None:
    sizes = [softmax_jacobian_amplitude(network(scale), images()).log10().mean() for scale in (1, 100, 1000)]
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[2] < -10


def test_ranges() -> None:
    assert len(RANGES) == len(RANGE_NAMES) == 10
    metric = GradientAmplitude()
    values = [0.0, 1e-41, 1e-40, 3e-36, 1e-30, 2e-12, 1e-10, 5e-4, 1e-3, 0.5]
    metric.update(torch.tensor(values[:4], dtype=torch.float64))
    metric.update(torch.tensor(values[4:], dtype=torch.float64))
    found = metric.compute()
    assert found.counts.tolist() == [2, 2, 0, 1, 0, 0, 1, 1, 1, 2]
    assert int(found.images) == 10
    assert float(found.mean) == pytest.approx(sum(values) / 10)
    logs = [-323.3062153431158, *(float(torch.tensor(value).double().log10()) for value in values[1:])]
    assert float(found.log10_mean) == pytest.approx(sum(logs) / 10)


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match=r"images of type torch\.float32: .* give model and images in float64"):
        softmax_jacobian_amplitude(network(), images().float())
    with pytest.raises(UserError, match="outside"):
        softmax_jacobian_amplitude(network(), images() * 3)
    broken = network()
    with torch.no_grad():
        broken[1].weight[0] = torch.inf
    with pytest.raises(UserError, match="gradient is NaN"):
        softmax_jacobian_amplitude(broken, images())
    for bad, message in (
        (torch.rand(3), "one float64 an image"),
        (torch.rand(3, 1).double(), "one float64 an image"),
        (torch.tensor([-1.0]).double(), "negative, NaN or infinite"),
        (torch.tensor([torch.nan]).double(), "negative, NaN or infinite"),
    ):
        with pytest.raises(UserError, match=message):
            GradientAmplitude().update(bad)

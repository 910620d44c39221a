from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_robust.errors import UserError
from lightning_robust.metrics import input_gradient, pixel_gradient


def model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 36, 5)
    )


def test_input_gradient_is_that_of_each_image_alone() -> None:
    net, images, labels = model().eval(), torch.rand(6, 3, 8, 8), torch.randint(5, (6,))
    gradient = input_gradient(net, images, labels)
    for i in range(6):
        alone = images[i : i + 1].clone().requires_grad_()
        nn.functional.cross_entropy(net(alone), labels[i : i + 1]).backward()
        torch.testing.assert_close(gradient[i : i + 1], alone.grad)


@pytest.mark.parametrize("mode", ["plain", "no_grad", "inference"])
def test_input_gradient_leaves_the_model_as_it_was(mode: str) -> None:
    net = model().train()
    net[1].eval()
    net[0].weight.requires_grad_(False)
    images, labels = torch.rand(4, 3, 8, 8), torch.randint(5, (4,))
    expected = input_gradient(net, images, labels)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.inference_mode(mode == "inference"), torch.set_grad_enabled(mode == "plain"):
        actual = input_gradient(net, images.clone(), labels.clone().int())
    torch.testing.assert_close(actual, expected)
    assert not actual.requires_grad
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert [layer.training for layer in net] == [True, False, True, True, True, True]
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True, True, True]
    assert all(p.grad is None for p in net.parameters())
    assert images.grad is None
    assert not images.requires_grad


def test_mask_zeroes_the_rest() -> None:
    net, images, labels = model(), torch.rand(4, 3, 8, 8), torch.randint(5, (4,))
    mask = torch.rand(8, 8) < 0.5
    full, part = input_gradient(net, images, labels), input_gradient(net, images, labels, mask=mask)
    torch.testing.assert_close(part, full * mask)
    assert part.any()


def test_input_gradient_refuses_wrong_input() -> None:
    images, labels = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    with pytest.raises(UserError, match=r"outside \[0, 1\]"):
        input_gradient(model(), images * 2 - 1, labels)
    with pytest.raises(UserError, match="one integer an image"):
        input_gradient(model(), images, labels.float())
    with pytest.raises(UserError, match="numbered from 0"):
        input_gradient(model(), images, labels - 1)
    with pytest.raises(UserError, match="labels go up to 9"):
        input_gradient(model(), images, labels * 9)
    with pytest.raises(UserError, match="mask"):
        input_gradient(model(), images, labels, mask=torch.ones(4, 4))


def test_pixel_gradient_takes_low_precision() -> None:
    gradients = torch.randn(2, 3, 4, 4).bfloat16()
    torch.testing.assert_close(pixel_gradient(gradients), gradients.double().abs().mean(1))

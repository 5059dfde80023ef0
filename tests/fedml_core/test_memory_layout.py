"""Channels-last is chosen by model and device alone, changes no value, and is taken back whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedml_core.data import Examples
from fedml_core.memory_layout import arrange, blames_layout, in_channels_last, ordered_gradients, rearranged
from fedml_core.minibatches import ordered_batches
from tests.clients.layout_cases import Recurrent, ResNet, Transformer
from tests.clients.trainer_cases import drawn

CPU, LAST = torch.device("cpu"), torch.channels_last


def ordered_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=LAST) and not tensor.is_contiguous()


@pytest.mark.parametrize(
    ("model", "device", "expected"),
    [
        (ResNet, "cpu", True),
        (ResNet, "cuda", True),
        (ResNet, "mps", False),
        (Transformer, "cpu", False),
        (Recurrent, "cpu", False),
        (lambda: nn.Conv1d(2, 2, 3), "cpu", False),
        (lambda: nn.Conv3d(2, 2, 3), "cpu", False),
    ],
)
def test_auto_is_channels_last_for_2d_convolutions(model: type[nn.Module], device: str, expected: bool) -> None:
    assert in_channels_last("auto", model(), torch.device(device)) is expected
    assert in_channels_last("channels_last", model(), torch.device(device))
    assert not in_channels_last("contiguous", model(), torch.device(device))


def test_weights_that_are_parts_of_another_tensor_stay_where_they_are() -> None:
    module, flat = nn.Conv2d(3, 4, 3), drawn(200)
    module.weight.data = flat[: module.weight.numel()].view(module.weight.shape)
    assert not in_channels_last("auto", module, CPU)


def test_arranging_keeps_values_and_identity_and_can_be_taken_back() -> None:
    module = ResNet()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    same = dict(module.named_parameters())
    for channels_last in (True, False):
        arrange(module, channels_last=channels_last)
        weights = [module.block.first.weight, next(module.stem.parameters()), module.up.weight]
        assert all(ordered_last(weight) is channels_last for weight in weights)
        for name, parameter in module.named_parameters():
            assert parameter is same[name] and torch.equal(parameter, before[name])


def test_a_weight_that_is_computed_is_left_alone() -> None:
    module = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    arrange(module, channels_last=True)
    assert module.weight.is_contiguous()


@pytest.mark.parametrize("tensor", [drawn(2, 3, 4), torch.ones(2, 3, 4, 4, dtype=torch.int64), drawn(2, 3, 2, 2, 2)])
def test_only_batches_of_images_are_rearranged(tensor: Tensor) -> None:
    assert rearranged(tensor) is tensor
    image = drawn(2, 3, 4, 5)
    assert ordered_last(rearranged(image)) and torch.equal(rearranged(image), image)


@pytest.mark.parametrize("fetched", [False, True])
def test_batches_are_in_the_layout_that_is_asked_for(fetched: bool) -> None:
    examples = Examples.of(drawn(7, 3, 4, 4), drawn(7, 2), torch.arange(7))
    source = examples.take if fetched else examples
    for last in (True, False):
        batches = list(ordered_batches(source, [torch.arange(7)], 3, CPU, channels_last=last))
        assert [ordered_last(inputs[0]) for inputs, _, _ in batches] == [last] * 3
        assert torch.equal(torch.cat([inputs[0] for inputs, _, _ in batches]), examples.inputs[0])
        assert torch.equal(torch.cat([inputs[1] for inputs, _, _ in batches]), examples.inputs[1])


def test_gradients_reach_convolutions_and_pools_in_order_and_no_hook_stays() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2))
    arrange(module, channels_last=True)
    seen: list[Tensor] = []
    inner = rearranged(drawn(2, 4, 6, 6)).requires_grad_()
    with ordered_gradients(module):
        output = module[1](inner)
        output.register_hook(seen.append)
        module[2:](output).square().sum().backward()
        assert ordered_last(seen[0])
        assert inner.grad is not None and ordered_last(inner.grad)
        with torch.no_grad():
            assert not module(drawn(2, 3, 8, 8)).requires_grad
    assert not any(part._forward_hooks for part in module.modules())


def test_the_layout_is_blamed_for_views_alone() -> None:
    with pytest.raises(RuntimeError) as caught:
        rearranged(drawn(2, 3, 4, 5)).view(2, -1)
    assert blames_layout(caught.value)
    outer = ValueError("the task's model failed")
    outer.__cause__ = caught.value
    assert blames_layout(outer)
    assert not blames_layout(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    circle = ValueError("one")
    circle.__cause__ = circle
    assert not blames_layout(circle)

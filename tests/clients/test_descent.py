"""Plain SGD takes torch's own steps to the last bit, and leaves to torch whatever it is not sure of."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clients.descent import SGD, sgd_of
from fedml_core.data import Examples
from fedml_core.errors import ConfigError
from fedml_core.training import Training
from tests.clients.trainer_cases import classification, drawn, labelled, trained, trainer_of

SHAPES = ((3, 4), (4,), (5,), (2, 3, 2, 2), ())


def parameters_of(dtype: torch.dtype) -> list[nn.Parameter]:
    return [
        nn.Parameter(drawn(math.prod(shape), seed=place).view(shape).to(dtype)) for place, shape in enumerate(SHAPES)
    ]


def gradient(place: int, step: int, like: Tensor) -> Tensor | None:
    # The second parameter is not reached at the first step, nor the third at any.
    if place == 2 or (place == 1 and step == 0):
        return None
    return drawn(like.numel(), seed=100 * step + place).view(like.shape).to(like.dtype)


def same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and torch.equal(one, other)


def plain(arguments: dict[str, Any], rate: float = 0.1) -> Training:
    return Training(optimizer="SGD", learning_rate=rate, optimizer_arguments=arguments)


@settings(max_examples=60, deadline=None)
@given(
    momentum=st.sampled_from([0, 0.0, 0.5, 0.9, 1.5]),
    dampening=st.sampled_from([0, 0.0, 0.3, -0.5]),
    weight_decay=st.sampled_from([0, 0.0, 1e-3, 2]),
    nesterov=st.booleans(),
    maximize=st.booleans(),
    rate=st.sampled_from([1e-3, 0.1, 3.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_every_step_equals_that_of_torch_bit_for_bit(
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    rate: float,
    dtype: torch.dtype,
) -> None:
    nesterov = nesterov and momentum > 0 and dampening == 0
    arguments: dict[str, Any] = {
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
        "maximize": maximize,
    }
    ours, theirs = parameters_of(dtype), parameters_of(dtype)
    mine, reference = sgd_of(plain(arguments, rate), 1, ours), torch.optim.SGD(theirs, lr=rate, **arguments)
    assert mine is not None
    for step in range(4):
        for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            one.grad, other.grad = gradient(place, step, one), gradient(place, step, other)
        mine.step()
        reference.step()
        for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert torch.equal(one, other)
            if one.grad is not None:
                assert same(one.grad, gradient(place, step, one))


def test_the_rate_decays_from_round_to_round() -> None:
    made = sgd_of(Training(learning_rate=0.5, learning_rate_decay=0.5), 3, parameters_of(torch.float32))
    assert made is not None
    assert made.param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize(
    "arguments",
    [
        {"momentum": -1},
        {"momentum": "much"},
        {"momentum": True},
        {"momentum": float("inf")},
        {"nesterov": 1},
        {"nesterov": True},
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        {"weight_decay": -0.1},
        {"foreach": True},
        {"fused": True},
        {"momentun": 0.9},
    ],
)
def test_whatever_is_not_surely_right_is_left_to_torch(arguments: dict[str, Any]) -> None:
    assert sgd_of(plain(arguments), 1, parameters_of(torch.float32)) is None


def test_another_optimizer_is_left_to_torch() -> None:
    assert sgd_of(Training(optimizer="adam"), 1, parameters_of(torch.float32)) is None


def test_a_negative_momentum_is_refused_with_its_name() -> None:
    with pytest.raises(ConfigError, match="optimizer_arguments: SGD refuses momentum"):
        trained(trainer_of(classification()), labelled(8), plain({"momentum": -1}))


def test_no_gradient_at_all_changes_nothing() -> None:
    parameters = parameters_of(torch.float32)
    SGD(parameters, 0.1, momentum=0.9).step()
    assert all(torch.equal(one, other) for one, other in zip(parameters, parameters_of(torch.float32), strict=True))


@pytest.mark.parametrize("arguments", [{}, {"momentum": 0.9}, {"maximize": True}])
def test_sparse_gradients_step_as_torch_does(arguments: dict[str, Any]) -> None:
    tokens = torch.arange(12).remainder(7)
    task = classification(lambda: nn.Embedding(7, 3, sparse=True))
    training = Training(batch_size=4, learning_rate=0.1, optimizer_arguments=arguments)
    data = Examples.of(tokens, tokens.remainder(3))
    ours = trained(trainer_of(task), data, training)
    theirs = trained(
        trainer_of(task, optimizer=lambda given: torch.optim.SGD(given, lr=0.1, **arguments)), data, training
    )
    assert torch.equal(ours.values, theirs.values)
    assert ours.values.abs().max() > 0


def test_what_an_optimizer_cannot_do_names_it() -> None:
    tokens = torch.arange(12).remainder(7)
    task = classification(lambda: nn.Embedding(7, 3, sparse=True))
    with pytest.raises(ConfigError, match="optimizer SGD failed at round 1: RuntimeError"):
        trained(trainer_of(task), Examples.of(tokens, tokens.remainder(3)), plain({"weight_decay": 0.1}))


def test_float16_scales_the_gradients_of_plain_sgd() -> None:
    training = Training(batch_size=4, precision="float16", optimizer_arguments={"momentum": 0.5})
    ours = trained(trainer_of(classification()), labelled(), training)
    task = classification()
    theirs = trained(
        trainer_of(task, optimizer=lambda given: torch.optim.SGD(given, lr=0.1, momentum=0.5)), labelled(), training
    )
    assert torch.equal(ours.values, theirs.values)
    assert ours.values.abs().max() > 0.001

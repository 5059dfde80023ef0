"""The steps of many clients at once are those of torch's own optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from simulations.engines.batch_trainer import UnsupportedError
from simulations.engines.functional_optimizers import functional

CASES: list[tuple[type[optim.Optimizer], dict[str, Any]]] = [
    (optim.SGD, {}),
    (optim.SGD, {"weight_decay": 0.1, "maximize": True}),
    (optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
    (optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (optim.Adam, {}),
    (optim.Adam, {"betas": (0.7, 0.8), "weight_decay": 0.1, "amsgrad": True}),
    (optim.Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    (optim.AdamW, {"weight_decay": 0.1, "eps": 1e-3}),
    (optim.Adamax, {"weight_decay": 0.1}),
    (optim.Adagrad, {"lr_decay": 0.2, "initial_accumulator_value": 0.3, "weight_decay": 0.1}),
    (optim.RMSprop, {"weight_decay": 0.1}),
    (optim.RMSprop, {"momentum": 0.9, "centered": True, "alpha": 0.8}),
    (optim.RMSprop, {"momentum": 0.9}),
    (optim.RMSprop, {"centered": True}),
    (optim.Adadelta, {"rho": 0.8, "weight_decay": 0.1}),
]
SHAPES = [(4, 3), (5,)]


def drawn(step: int, clients: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(clients, *shape, generator=generator) for shape in SHAPES]


@pytest.mark.parametrize(("kind", "arguments"), CASES, ids=str)
def test_ten_steps_of_many_clients_are_torchs_own(kind: type[optim.Optimizer], arguments: dict[str, Any]) -> None:
    clients, rate = 3, 1.0 if kind is optim.Adadelta else 0.05
    starts = drawn(100, clients)
    modules = [[nn.Parameter(block[k].clone()) for block in starts] for k in range(clients)]
    theirs = [kind(module, lr=rate, **arguments) for module in modules]  # type: ignore[call-arg]
    ours = functional(kind([nn.Parameter(torch.zeros(1))], lr=rate, **arguments))  # type: ignore[call-arg]
    blocks = [block.clone() for block in starts]
    slots = [[torch.full_like(block, value) for block in blocks] for value in ours.slots]
    for number in range(1, 11):
        gradients = drawn(number, clients)
        kept = [gradient.clone() for gradient in gradients]
        ours.step(blocks, gradients, slots, number)
        assert all(torch.equal(a, b) for a, b in zip(gradients, kept, strict=True))
        for k, (module, optimizer) in enumerate(zip(modules, theirs, strict=True)):
            for parameter, gradient in zip(module, gradients, strict=True):
                parameter.grad = gradient[k].clone()
            optimizer.step()
    for k, module in enumerate(modules):
        for parameter, block in zip(module, blocks, strict=True):
            assert torch.allclose(block[k], parameter, rtol=1e-6, atol=1e-6)
            assert not torch.allclose(block[k], starts[0][k] if parameter.dim() == 2 else starts[1][k], atol=1e-3)


def test_optimizers_without_a_form_are_refused_by_name() -> None:
    class Mine(optim.SGD):
        pass

    parameters = [nn.Parameter(torch.zeros(2))]
    for optimizer in (optim.LBFGS(parameters), optim.Rprop(parameters), Mine(parameters, lr=0.1)):
        with pytest.raises(UnsupportedError, match=f"optimizer {type(optimizer).__name__} cannot train clients"):
            functional(optimizer)


def test_several_parameter_groups_are_refused() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "lr": rate} for rate in (0.1, 0.2)]
    with pytest.raises(UnsupportedError, match="optimizer SGD has several parameter groups"):
        functional(optim.SGD(groups))

"""What every trainer of a torch module does around its steps: what steers them, who takes them, what is reported."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clients.descent import SGD, sgd_of
from clients.local_step import Steering
from clients.optimizers import OptimizerFactory, make_optimizer
from fedml_core.errors import StrategyError
from fedml_core.model import ModelSpec
from fedml_core.training import Training
from fedml_core.transform import Guide
from fedml_core.update import Update

__all__ = ["optimizer_of", "steering_of", "update_of"]


def steering_of(
    module: nn.Module, spec: ModelSpec, start: Tensor, guide: Guide, max_norm: float | None = None
) -> Steering:
    """Return what is done to the gradients of `module`, whose parameters began at `start` (d,), on its device.

    Raises: StrategyError: if the guide's offset is not one number a parameter.
    """
    named = dict(module.named_parameters())
    parameters = [named[tensor.name] for tensor in spec.parameters]
    offset, count = guide.offset, spec.parameter_count
    if offset is not None and offset.shape != (count,):
        raise StrategyError(f"a guide's offset must have shape ({count},), got {tuple(offset.shape)}")
    starts = _parts(spec, start, parameters) if guide.mu or offset is not None else []
    offsets = [] if offset is None else _parts(spec, offset.to(start.device), parameters)
    return Steering(parameters, guide.mu, starts, offsets, max_norm)


def optimizer_of(
    training: Training, round_number: int, parameters: list[nn.Parameter], factory: OptimizerFactory | None
) -> Optimizer | SGD:
    """Return a fresh optimizer, as `clients.optimizers.make_optimizer`; SGD by its name is ours, which loads faster.

    Raises: ConfigError or TaskError: as `make_optimizer`.
    """
    quick = None if factory else sgd_of(training, round_number, parameters)
    return quick or make_optimizer(training, round_number, parameters, factory)


def update_of(values: Tensor, sums: Mapping[str, float], facts: Mapping[str, float]) -> Update:
    """Return one client's update of weight 1, on the CPU."""
    return Update(values.cpu(), _number(1.0), _numbers(sums), _numbers(facts))


def _parts(spec: ModelSpec, vector: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    return [
        vector[tensor.offset : tensor.offset + tensor.size].view(tensor.shape).to(parameter.dtype)
        for tensor, parameter in zip(spec.parameters, parameters, strict=True)
    ]


def _numbers(values: Mapping[str, float]) -> dict[str, Tensor]:
    return {name: _number(value) for name, value in values.items()}


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)

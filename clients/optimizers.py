"""The optimizer of one round of local training: by torch's own name, or from a function that a script gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from clients.descent import SGD
from fedml_core.errors import ConfigError, TaskError
from fedml_core.named import nearest
from fedml_core.training import Training

__all__ = ["OptimizerFactory", "make_optimizer", "needs_closure"]

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
"""Makes a fresh optimizer over a model's trainable parameters, with the learning rate of the first round."""


def make_optimizer(
    training: Training, round_number: int, parameters: Iterable[nn.Parameter], factory: OptimizerFactory | None = None
) -> Optimizer:
    """Return a fresh optimizer over `parameters` for round `round_number`.

    By name (whatever its case) it gets `training.rate(round_number)` and `training.optimizer_arguments`. A `factory`
    replaces the name, the arguments and the learning rate of the first round; that rate decays as `training` says.

    Raises: ConfigError: for an unknown name or argument, or a value or model that the optimizer refuses;
        TaskError: if `factory` fails or returns something else.
    """
    given = list(parameters)
    if factory is None:
        return _by_name(training, training.rate(round_number), given)
    try:
        made = factory(given)
    except Exception as error:
        raise TaskError(f"the optimizer function failed: {type(error).__name__}: {error}") from error
    if not isinstance(made, Optimizer):
        raise TaskError(f"the optimizer function must return a torch optimizer, got {type(made).__name__}")
    for group in made.param_groups:
        if "lr" in group:
            group["lr"] = group["lr"] * (training.rate(round_number) / training.learning_rate)
    return made


def needs_closure(optimizer: Optimizer | SGD) -> bool:
    """Return whether `optimizer.step` must be given a function that evaluates the loss again, as LBFGS must."""
    return _demands(type(optimizer).step, "closure")


def _by_name(training: Training, rate: float, parameters: list[nn.Parameter]) -> Optimizer:
    kind = _class_of(training.optimizer)
    arguments = training.optimizer_arguments
    _check_names(kind, arguments)
    try:
        return kind(parameters, lr=rate, **arguments)
    except Exception as error:
        if _accepts(kind, rate, arguments):
            raise ConfigError(f"optimizer {kind.__name__} refuses this model: {error}") from error
        refused = [name for name, value in arguments.items() if not _accepts(kind, rate, {name: value})]
        names = ", ".join(refused or arguments)
        raise ConfigError(f"optimizer_arguments: {kind.__name__} refuses {names}: {error}") from error


def _class_of(name: str) -> Callable[..., Optimizer]:
    found = {kind.__name__.lower(): kind for kind in vars(torch.optim).values() if _is_optimizer(kind)}
    kind = found.get(name.lower())
    if kind is None:
        raise ConfigError(f"unknown optimizer {name!r}; {nearest(name, (k.__name__ for k in found.values()))}")
    if kind is torch.optim.SparseAdam:
        raise ConfigError("optimizer SparseAdam takes sparse gradients only, which a model vector has not; use Adam")
    made: Callable[..., Optimizer] = kind
    return made


def _is_optimizer(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer


def _check_names(kind: Callable[..., Optimizer], arguments: Mapping[str, Any]) -> None:
    own = [name for name in _arguments(kind) if name not in ("params", "lr")] if arguments else []
    for name in arguments:
        if name == "lr":
            raise ConfigError("optimizer_arguments must not set lr; set learning_rate")
        if name not in own:
            raise ConfigError(f"optimizer_arguments: {kind.__name__} has no argument {name!r}; {nearest(name, own)}")


@cache
def _arguments(call: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    # Reading a signature takes as long as a small model's step; there are as many as optimizer classes.
    return inspect.signature(call).parameters


def _demands(call: Callable[..., Any], name: str) -> bool:
    argument = _arguments(call).get(name)
    return argument is not None and argument.default is inspect.Parameter.empty


def _accepts(kind: Callable[..., Optimizer], rate: float, arguments: Mapping[str, Any]) -> bool:
    try:
        kind([nn.Parameter(torch.zeros(1, 1))], lr=rate, **arguments)
    except Exception:  # noqa: BLE001  # only asked after a failure, to name the argument that caused it
        return False
    return True

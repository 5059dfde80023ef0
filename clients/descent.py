"""Stochastic gradient descent without torch.optim, whose first optimizer imports torch's compiler for most of a second.

The arithmetic is that of `torch.optim.SGD`, operation by operation, so that the numbers are the same to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedml_core.dense import Factors
from fedml_core.training import Training

__all__ = ["SGD", "sgd_of"]

_Tensors = list[Tensor] | tuple[Tensor, ...]
_NUMBERS = {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0}
_SWITCHES = {"nesterov": False, "maximize": False}


class SGD:
    """Takes steps as `torch.optim.SGD` of the same arguments does; gradients may be sparse where it takes them."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        rate: float,
        *,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
    ) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": list(parameters), "lr": rate}]
        self._momentum, self._dampening, self._decay = momentum, dampening, weight_decay
        self._nesterov, self._maximize = nesterov, maximize
        self._velocities: dict[int, Tensor] = {}

    @property
    def plain(self) -> bool:
        """Return whether a step is to take rate x gradients off the parameters, and nothing else."""
        return not (self._momentum or self._decay or self._maximize)

    @torch.no_grad()
    def descend(self, factors: Sequence[Factors]) -> None:
        """Take the step of gradients, or parts of them, of which there are only the factors; for a plain one."""
        trained = {id(parameter) for parameter in self.param_groups[0]["params"]}
        for weight, errors, inputs in factors:
            if id(weight) in trained:
                weight.addmm_(errors.t(), inputs, alpha=-self.param_groups[0]["lr"])

    @torch.no_grad()
    def step(self) -> None:
        """Change every parameter that has a gradient; the gradients are left as they are."""
        group = self.param_groups[0]
        parameters: list[Tensor] = [parameter for parameter in group["params"] if parameter.grad is not None]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if any(gradient.is_sparse for gradient in gradients):
            # Foreach kernels take no sparse tensors.
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.add_(self._direction([parameter], [gradient])[0], alpha=-group["lr"])
        elif parameters:
            torch._foreach_add_(parameters, self._direction(parameters, gradients), alpha=-group["lr"])

    def _direction(self, parameters: _Tensors, gradients: _Tensors) -> _Tensors:
        found = gradients
        if self._maximize:
            found = torch._foreach_neg(found)
        if self._decay:
            found = torch._foreach_add(found, parameters, alpha=self._decay)
        if not self._momentum:
            return found
        velocities = [self._velocity(id(p), gradient) for p, gradient in zip(parameters, found, strict=True)]
        if self._nesterov:
            return torch._foreach_add(found, velocities, alpha=self._momentum)
        return velocities

    def _velocity(self, place: int, gradient: Tensor) -> Tensor:
        velocity = self._velocities.get(place)
        if velocity is None:
            velocity = self._velocities[place] = gradient.clone()
            return velocity
        return velocity.mul_(self._momentum).add_(gradient, alpha=1 - self._dampening)


def sgd_of(training: Training, round_number: int, parameters: Sequence[nn.Parameter]) -> SGD | None:
    """Return the optimizer of round `round_number` if it is SGD with arguments that are surely right, else None.

    None leaves it to `clients.optimizers.make_optimizer`, which also says what is wrong with the others.
    """
    arguments = training.optimizer_arguments
    if training.optimizer.lower() != "sgd" or not all(_is_right(name, value) for name, value in arguments.items()):
        return None
    if arguments.get("nesterov") and (not arguments.get("momentum") or arguments.get("dampening")):
        return None
    return SGD(parameters, training.rate(round_number), **_known(arguments))


def _is_right(name: str, value: object) -> bool:
    if name in _SWITCHES:
        return isinstance(value, bool)
    if name not in _NUMBERS or isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and (name == "dampening" or value >= 0)


def _known(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: type(default)(arguments.get(name, default)) for name, default in {**_NUMBERS, **_SWITCHES}.items()}

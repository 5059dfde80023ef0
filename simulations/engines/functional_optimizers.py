"""Torch's optimizers for many clients at once: the same arithmetic, with its memory in the caller's hands.

Parameters, gradients and each slot of memory are lists of tensors of equal shapes; everything is elementwise, so one
more leading dimension, the clients, changes nothing. Formulas are those of `torch.optim`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, Optimizer, RMSprop

from simulations.engines.batch_trainer import UnsupportedError

__all__ = ["FunctionalOptimizer", "functional"]

Tensors = tuple[Tensor, ...] | list[Tensor]


@dataclass(frozen=True, kw_only=True)
class FunctionalOptimizer(ABC):
    """One step of one optimizer. `rate`: the learning rate. `decay`: added to the gradient, times the parameters."""

    rate: float
    decay: float = 0.0
    maximize: bool = False

    @property
    @abstractmethod
    def slots(self) -> tuple[float, ...]:
        """Return the first value of each slot of memory."""

    @property
    def plain(self) -> bool:
        """Return whether a step is to take rate x gradients off the parameters, and nothing else."""
        return False

    def step(self, parameters: Tensors, gradients: Tensors, slots: Sequence[Tensors], number: int) -> None:
        """Change `parameters` and `slots` in place; `gradients` are left as they are. `number` counts from 1."""
        if self.maximize:
            gradients = torch._foreach_neg(gradients)
        if self.decay:
            gradients = torch._foreach_add(gradients, parameters, alpha=self.decay)
        self._step(parameters, gradients, slots, number)

    @abstractmethod
    def _step(self, parameters: Tensors, gradients: Tensors, slots: Sequence[Tensors], number: int) -> None:
        """Take the step with the gradient after decay."""


@dataclass(frozen=True, kw_only=True)
class _Descent(FunctionalOptimizer):
    momentum: float
    dampening: float
    nesterov: bool

    @property
    def slots(self) -> tuple[float, ...]:
        return (0.0,) if self.momentum else ()

    @property
    def plain(self) -> bool:
        return not (self.momentum or self.maximize or self.decay)

    def _step(self, parameters: Tensors, gradients: Tensors, slots: Sequence[Tensors], number: int) -> None:
        if self.momentum:
            (velocity,) = slots
            if number == 1:
                torch._foreach_copy_(velocity, gradients)
            else:
                torch._foreach_mul_(velocity, self.momentum)
                torch._foreach_add_(velocity, gradients, alpha=1 - self.dampening)
            ahead = torch._foreach_add(gradients, velocity, alpha=self.momentum) if self.nesterov else velocity
            gradients = ahead
        torch._foreach_add_(parameters, gradients, alpha=-self.rate)


@dataclass(frozen=True, kw_only=True)
class _Moments(FunctionalOptimizer):
    betas: tuple[float, float]
    eps: float
    amsgrad: bool
    decoupled: float

    @property
    def slots(self) -> tuple[float, ...]:
        return (0.0, 0.0, 0.0) if self.amsgrad else (0.0, 0.0)

    def _step(self, parameters: Tensors, gradients: Tensors, slots: Sequence[Tensors], number: int) -> None:
        first, second = self.betas
        mean, square = slots[:2]
        if self.decoupled:
            torch._foreach_mul_(parameters, 1 - self.rate * self.decoupled)
        torch._foreach_lerp_(mean, gradients, 1 - first)
        torch._foreach_mul_(square, second)
        torch._foreach_addcmul_(square, gradients, gradients, 1 - second)
        if self.amsgrad:
            torch._foreach_maximum_(slots[2], square)
            square = slots[2]
        denominator = torch._foreach_sqrt(square)
        torch._foreach_div_(denominator, (1 - second**number) ** 0.5)
        torch._foreach_add_(denominator, self.eps)
        torch._foreach_addcdiv_(parameters, mean, denominator, -self.rate / (1 - first**number))


@dataclass(frozen=True, kw_only=True)
class _Infinity(FunctionalOptimizer):
    betas: tuple[float, float]
    eps: float

    @property
    def slots(self) -> tuple[float, ...]:
        return (0.0, 0.0)

    def _step(self, parameters: Tensors, gradients: Tensors, slots: Sequence[Tensors], number: int) -> None:
        first, second = self.betas
        mean, largest = slots
        torch._foreach_lerp_(mean, gradients, 1 - first)
        torch._foreach_mul_(largest, second)
        size = torch._foreach_abs(gradients)
        torch._foreach_add_(size, self.eps)
        torch._foreach_maximum_(largest, size)
        torch._foreach_addcdiv_(parameters, mean, largest, -self.rate / (1 - first**number))


@dataclass(frozen=True, kw_only=True)
class _Sums(FunctionalOptimizer):
    rate_decay: float
    initial: float
    eps: float

    @property
    def slots(self) -> tuple[float, ...]:
        return (self.initial,)

    def _step(self, parameters: Tensors, gradients: Tensors, slots: Sequence[Tensors], number: int) -> None:
        (total,) = slots
        torch._foreach_addcmul_(total, gradients, gradients, 1.0)
        deviation = torch._foreach_sqrt(total)
        torch._foreach_add_(deviation, self.eps)
        torch._foreach_addcdiv_(parameters, gradients, deviation, -self.rate / (1 + (number - 1) * self.rate_decay))


@dataclass(frozen=True, kw_only=True)
class _Root(FunctionalOptimizer):
    alpha: float
    eps: float
    momentum: float
    centered: bool

    @property
    def slots(self) -> tuple[float, ...]:
        return (0.0,) * (1 + bool(self.momentum) + self.centered)

    def _step(self, parameters: Tensors, gradients: Tensors, slots: Sequence[Tensors], number: int) -> None:
        square = slots[0]
        torch._foreach_mul_(square, self.alpha)
        torch._foreach_addcmul_(square, gradients, gradients, 1 - self.alpha)
        spread = square
        if self.centered:
            mean = slots[-1]
            torch._foreach_lerp_(mean, gradients, 1 - self.alpha)
            spread = torch._foreach_addcmul(square, mean, mean, -1.0)
        deviation = torch._foreach_sqrt(spread)
        torch._foreach_add_(deviation, self.eps)
        if self.momentum:
            velocity = slots[1]
            torch._foreach_mul_(velocity, self.momentum)
            torch._foreach_addcdiv_(velocity, gradients, deviation, 1.0)
            torch._foreach_add_(parameters, velocity, alpha=-self.rate)
        else:
            torch._foreach_addcdiv_(parameters, gradients, deviation, -self.rate)


@dataclass(frozen=True, kw_only=True)
class _Deltas(FunctionalOptimizer):
    rho: float
    eps: float

    @property
    def slots(self) -> tuple[float, ...]:
        return (0.0, 0.0)

    def _step(self, parameters: Tensors, gradients: Tensors, slots: Sequence[Tensors], number: int) -> None:
        square, moved = slots
        torch._foreach_mul_(square, self.rho)
        torch._foreach_addcmul_(square, gradients, gradients, 1 - self.rho)
        deviation = torch._foreach_add(square, self.eps)
        torch._foreach_sqrt_(deviation)
        change = torch._foreach_add(moved, self.eps)
        torch._foreach_sqrt_(change)
        torch._foreach_div_(change, deviation)
        torch._foreach_mul_(change, gradients)
        torch._foreach_mul_(moved, self.rho)
        torch._foreach_addcmul_(moved, change, change, 1 - self.rho)
        torch._foreach_add_(parameters, change, alpha=-self.rate)


def functional(optimizer: Optimizer) -> FunctionalOptimizer:
    """Return the step that `optimizer`, which has taken none yet, would take.

    Raises: UnsupportedError: for an optimizer without a form here, a subclass, or one with several parameter groups.
    """
    make, name = _FORMS.get(type(optimizer)), type(optimizer).__name__
    if make is None:
        known = ", ".join(kind.__name__ for kind in _FORMS)
        raise UnsupportedError(f"optimizer {name} cannot train clients side by side; {known} can")
    if len(optimizer.param_groups) != 1:
        raise UnsupportedError(f"optimizer {name} has several parameter groups; clients side by side need one")
    group = optimizer.param_groups[0]
    if group.get("differentiable"):
        raise UnsupportedError(f"optimizer {name} is differentiable; leave that out")
    return make(group, {"rate": float(group["lr"]), "maximize": bool(group.get("maximize", False))})


def _descent(group: dict[str, Any], common: dict[str, Any]) -> FunctionalOptimizer:
    return _Descent(
        decay=group["weight_decay"],
        momentum=group["momentum"],
        dampening=group["dampening"],
        nesterov=group["nesterov"],
        **common,
    )


def _moments(group: dict[str, Any], common: dict[str, Any]) -> FunctionalOptimizer:
    apart = bool(group.get("decoupled_weight_decay", False))
    return _moments_of(group, common, apart)


def _moments_apart(group: dict[str, Any], common: dict[str, Any]) -> FunctionalOptimizer:
    return _moments_of(group, common, True)


def _moments_of(group: dict[str, Any], common: dict[str, Any], apart: bool) -> FunctionalOptimizer:
    decay = group["weight_decay"]
    return _Moments(
        decay=0.0 if apart else decay,
        decoupled=decay if apart else 0.0,
        betas=_numbers(group["betas"]),
        eps=group["eps"],
        amsgrad=group["amsgrad"],
        **common,
    )


def _infinity(group: dict[str, Any], common: dict[str, Any]) -> FunctionalOptimizer:
    return _Infinity(decay=group["weight_decay"], betas=_numbers(group["betas"]), eps=group["eps"], **common)


def _sums(group: dict[str, Any], common: dict[str, Any]) -> FunctionalOptimizer:
    return _Sums(
        decay=group["weight_decay"],
        rate_decay=group["lr_decay"],
        initial=group["initial_accumulator_value"],
        eps=group["eps"],
        **common,
    )


def _root(group: dict[str, Any], common: dict[str, Any]) -> FunctionalOptimizer:
    return _Root(
        decay=group["weight_decay"],
        alpha=group["alpha"],
        eps=group["eps"],
        momentum=group["momentum"],
        centered=group["centered"],
        **common,
    )


def _deltas(group: dict[str, Any], common: dict[str, Any]) -> FunctionalOptimizer:
    return _Deltas(decay=group["weight_decay"], rho=group["rho"], eps=group["eps"], **common)


def _numbers(betas: Sequence[Any]) -> tuple[float, float]:
    return float(betas[0]), float(betas[1])


_FORMS: dict[type[Optimizer], Callable[[dict[str, Any], dict[str, Any]], FunctionalOptimizer]] = {
    SGD: _descent,
    Adam: _moments,
    AdamW: _moments_apart,
    Adamax: _infinity,
    Adagrad: _sums,
    RMSprop: _root,
    Adadelta: _deltas,
}

"""Activations by hand: forward into a given tensor, backward in place, as torch's autograd computes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """One elementwise function.

    `forward(before, after)` fills `after`. `backward(gradient, before, after)` turns the loss's gradient with respect
    to `after` into that with respect to `before`, in place.
    """

    name: str
    forward: Callable[[Tensor, Tensor], object] = field(repr=False)
    backward: Callable[[Tensor, Tensor, Tensor], object] = field(repr=False)


def relu() -> Activation:
    """Return max(z, 0)."""
    return Activation(
        "ReLU",
        # Not clamp_min, which differs at NaN on some machines.
        lambda before, after: aten.relu.out(before, out=after),
        lambda gradient, _, after: aten.threshold_backward.grad_input(gradient, after, 0, grad_input=gradient),
    )


def leaky_relu(slope: float) -> Activation:
    """Return z where it is positive, else slope z."""
    return Activation(
        "LeakyReLU",
        lambda before, after: aten.leaky_relu.out(before, slope, out=after),
        lambda gradient, before, _: aten.leaky_relu_backward.grad_input(
            gradient, before, slope, False, grad_input=gradient
        ),
    )


def tanh() -> Activation:
    """Return tanh z."""
    return Activation(
        "Tanh",
        lambda before, after: torch.tanh(before, out=after),
        lambda gradient, _, after: aten.tanh_backward.grad_input(gradient, after, grad_input=gradient),
    )


def sigmoid() -> Activation:
    """Return 1 / (1 + exp(-z))."""
    return Activation(
        "Sigmoid",
        lambda before, after: torch.sigmoid(before, out=after),
        lambda gradient, _, after: aten.sigmoid_backward.grad_input(gradient, after, grad_input=gradient),
    )


def gelu(approximate: str) -> Activation:
    """Return the Gaussian error linear unit, exact ("none") or by "tanh"."""
    return Activation(
        "GELU",
        lambda before, after: aten.gelu.out(before, approximate=approximate, out=after),
        lambda gradient, before, _: aten.gelu_backward.grad_input(
            gradient, before, approximate=approximate, grad_input=gradient
        ),
    )


def silu() -> Activation:
    """Return z times its sigmoid."""
    return Activation(
        "SiLU",
        lambda before, after: aten.silu.out(before, out=after),
        lambda gradient, before, _: aten.silu_backward.grad_input(gradient, before, grad_input=gradient),
    )


def elu(alpha: float) -> Activation:
    """Return z where it is positive, else alpha (exp z - 1)."""
    return Activation(
        "ELU",
        lambda before, after: aten.elu.out(before, alpha, out=after),
        lambda gradient, before, _: aten.elu_backward.grad_input(
            gradient, alpha, 1, 1, False, before, grad_input=gradient
        ),
    )


def activation_of(module: nn.Module) -> Activation | None:
    """Return what exactly `module` computes, or None if it is no activation known here."""
    made = _MODULES.get(type(module))
    return None if made is None else made(module)


_MODULES: dict[type[nn.Module], Callable[..., Activation]] = {
    nn.ReLU: lambda _: relu(),
    nn.LeakyReLU: lambda module: leaky_relu(module.negative_slope),
    nn.Tanh: lambda _: tanh(),
    nn.Sigmoid: lambda _: sigmoid(),
    nn.GELU: lambda module: gelu(module.approximate),
    nn.SiLU: lambda _: silu(),
    nn.ELU: lambda module: elu(module.alpha),
}

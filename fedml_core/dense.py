"""Dense layers by oneDNN, for which torch itself takes another library: on some CPUs it is half as fast.

Whether a call takes this way depends on shapes and types alone, never on measurements, so that a run repeats.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fedml_core.backward_graph import users_backward
from fedml_core.replaced_forward import has_forward_of, replaced_forwards

__all__ = ["Factors", "factored_weights", "product", "quick_dense"]

Factors = tuple[Tensor, Tensor, Tensor]
"""A weight (m, k), the errors (n, m) of its outputs, and its inputs (n, k)."""

_FACTORS: ContextVar[list[Factors] | None] = ContextVar("fedveil_factors", default=None)

# Multiplications of a forward pass below which a step spends more on the detour than it gains.
_FEWEST = 1 << 21


def quick_dense(module: nn.Module, device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which large `nn.Linear` layers of `module`, on a CPU, compute by oneDNN.

    Guarantees: results and gradients differ from torch's own by the order of float32 sums only; gradients of gradients
    work too. Other types than float32, autocast, and `torch.func` are left to torch.
    """
    if device.type != "cpu" or not _has_product():
        return nullcontext()
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear) and has_forward_of(layer, nn.Linear)]
    return replaced_forwards({layer: partial(_forward, layer) for layer in layers})


def product(rows: Tensor, columns: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return rows (n, k) times columns (m, k) transposed, plus the bias (m,), without a gradient to speak of.

    By oneDNN on a CPU, for float32 and where it is worth the detour: the choice depends on shapes and types alone.
    """
    large = rows.numel() * len(columns) >= _FEWEST
    if large and rows.dtype == torch.float32 and rows.device.type == "cpu" and _has_product():
        return _product(rows, columns, bias)
    return nn.functional.linear(rows, columns, bias)


def _has_product() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _forward(layer: nn.Linear, inputs: Tensor) -> Tensor:
    weight, bias = layer.weight, layer.bias
    if inputs.numel() * len(weight) < _FEWEST or not _fits(inputs, weight, bias):
        return nn.functional.linear(inputs, weight, bias)
    return _Dense.apply(inputs, weight, bias)  # type: ignore[no-any-return, no-untyped-call]  # torch annotates neither


def _fits(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    tensors = (inputs, weight) if bias is None else (inputs, weight, bias)
    return (
        all(type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
        and all(t.layout == torch.strided and t.device.type == "cpu" for t in tensors)
        and inputs.dim() > 1
        and inputs.shape[-1] == weight.shape[1]
        and not torch.is_autocast_enabled("cpu")
        # Both transform functions, and would have to know this one's rule.
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def _product(rows: Tensor, columns: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return rows (n, k) times columns (m, k) transposed, plus the bias."""
    return torch.ops.mkldnn._linear_pointwise.default(rows, columns, bias, "none", [], "")  # type: ignore[no-any-return]


@contextmanager
def factored_weights(losses: Tensor) -> Iterator[list[Factors]]:
    """Let the backward pass of `losses`, inside, leave the gradients of large weights as the factors that are given.

    A weight's `.grad` is then what it contributes otherwise, or None. None are left where a user's own function, which
    might ask for a gradient, has a part in the pass.
    """
    factors: list[Factors] = []
    token = _FACTORS.set(None if users_backward(losses, _Dense) else factors)
    try:
        yield factors
    finally:
        _FACTORS.reset(token)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.leaf = weight if weight.is_leaf else None
        return _product(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs, weight = ctx.saved_tensors
        (gradient,) = gradients
        of_inputs, of_weight, of_bias = ctx.needs_input_grad
        # Under create_graph, this pass is itself differentiated, which oneDNN's product is not.
        times = (lambda rows, columns: rows @ columns.t()) if torch.is_grad_enabled() else _product
        rows, columns = gradient.reshape(-1, gradient.shape[-1]).contiguous(), inputs.reshape(-1, inputs.shape[-1])
        factors = _FACTORS.get()
        if of_weight and factors is not None and ctx.leaf is not None and not torch.is_grad_enabled():
            factors.append((ctx.leaf, rows, columns))
            of_weight = False
        return (
            times(rows, weight.t()).view(inputs.shape) if of_inputs else None,
            times(rows.t(), columns.t()) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )

"""Linear layers of K clients, of which each gradient has its weights' own layout, or is never made.

Torch sees to the layout for one matrix but not for many, and a step on transposed gradients takes several times as
long.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import (
    CVmapInterpreterPtr,
    TransformType,
    _add_batch_dim,
    _unwrap_batched,
    peek_interpreter_stack,
)
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack

from fedml_core.backward_graph import backward_nodes, users_backward
from simulations.engines.batch_trainer import UnsupportedError

__all__ = ["Factors", "Linears", "leaves_factors"]


Factors = tuple[Tensor, Tensor, Tensor]
"""A weight (K, o, i), the errors (K, n, o) of its outputs, and its inputs (K, n, i)."""


class Linears:
    """The linear layers of a model, whose weights' gradients may be left in their factors.

    `able`: for the caller to keep whether they may; see `leaves_factors`.
    """

    def __init__(self) -> None:
        self.able: bool | None = None
        self._factors: list[Factors] | None = None

    @contextmanager
    def factoring(self, wanted: bool) -> Iterator[list[Factors]]:
        """Let backward passes inside leave the gradient of each weight that is a leaf as the factors that are given.

        Autograd returns none of it, or what the weight contributes otherwise. Nothing happens unless `wanted`.
        """
        factors: list[Factors] = []
        self._factors = factors if wanted else None
        try:
            yield factors
        finally:
            self._factors = None

    def forward(self, layer: nn.Linear, values: Tensor) -> Tensor:
        """Return what nn.Linear returns; inside `torch.vmap` its weights may be each client's own."""
        lead = values.shape[:-1]
        flat = values if len(lead) == 1 else values.reshape(lead.numel(), values.shape[-1])
        made = self._per_client(flat, layer.weight, layer.bias)
        return made if len(lead) == 1 else made.view(*lead, -1)

    def _per_client(self, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the outputs (n, o) for values (n, i), a weight (o, i) and a bias (o,); under a map, of all clients.

        This is what torch does with an `autograd.Function` that has a rule for maps, at two fifths of its cost, which
        for small models is most of what a layer costs.
        """
        if torch.is_autocast_enabled(kind := values.device.type):
            # As autocast does it: gradients go back through the casts, and none is taken of what is kept in float32.
            low = torch.get_autocast_dtype(kind)
            values, weight, bias = values.to(low), weight.to(low), None if bias is None else bias.to(low)
        innermost = peek_interpreter_stack()
        if innermost is None or innermost.key() != TransformType.Vmap:
            return F.linear(values, weight, bias)
        level, clients = innermost.level(), CVmapInterpreterPtr(innermost).batchSize()
        given = (values, weight, bias)
        parts = [None if part is None else _first(*_unwrap_batched(part, level), clients) for part in given]
        with temporarily_pop_interpreter_stack():
            made: Tensor = _Products.apply(*parts, self)  # type: ignore[no-untyped-call]  # torch's own
        return _add_batch_dim(made, 0, level)

    def leave(self, weight: Tensor | None, above: Tensor, values: Tensor) -> bool:
        """Keep a gradient's factors, if that is wanted of this weight, and return whether it is."""
        if self._factors is None or weight is None:
            return False
        self._factors.append((weight, above, values))
        return True


class _Products(torch.autograd.Function):
    """(K, n, i) times (K, o, i), plus (K, o)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor | None, linears: Linears) -> Tensor:
        """Return (K, n, o)."""
        ctx.save_for_backward(values, weight)
        ctx.linears, ctx.leaf = linears, weight if weight.is_leaf else None
        if bias is None:
            return torch.bmm(values, weight.mT)
        return torch.baddbmm(bias[:, None], values, weight.mT)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients that are needed."""
        values, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        of_values = torch.bmm(above, weight) if wanted[0] else None
        of_weight = None
        if wanted[1] and not ctx.linears.leave(ctx.leaf, above, values):
            of_weight = torch.bmm(above.mT, values)
        return of_values, of_weight, above.sum(dim=1) if wanted[2] else None, None


def leaves_factors(losses: Tensor) -> bool:
    """Return whether a backward pass may leave factors: not where a user's own function might ask for what they make.

    Raises: UnsupportedError: for an operation whose gradients torch's maps get wrong.
    """
    for node in backward_nodes(losses):
        _refuse_wrong_rules(node)
    return not users_backward(losses, _Products)


def _refuse_wrong_rules(node: object) -> None:
    if type(node).__name__ != "EmbeddingBackward0":
        return
    if getattr(node, "_saved_scale_grad_by_freq", False):
        raise UnsupportedError("an embedding scales its gradient by frequency, which a map gets wrong")
    if 0 <= getattr(node, "_saved_padding_idx", -1) < 1 << 62:
        raise UnsupportedError("F.embedding is called with a padding_idx, which a map gets wrong; use nn.Embedding")


def _first(part: Tensor, dim: int | None, clients: int) -> Tensor:
    if dim is None:
        return part.expand(clients, *part.shape)
    return part if dim == 0 else part.movedim(dim, 0)

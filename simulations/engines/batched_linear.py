"""Linear layers of K clients, of which each gradient has its weights' own layout.

Torch sees to that for one matrix but not for many, and a step on transposed gradients takes several times as long.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["linear"]


def linear(layer: nn.Linear, values: Tensor) -> Tensor:
    """Return what nn.Linear returns; inside `torch.vmap` its weights may be each client's own."""
    lead = values.shape[:-1]
    flat = values if len(lead) == 1 else values.reshape(lead.numel(), values.shape[-1])
    made: Tensor = _PerClient.apply(flat, layer.weight, layer.bias)  # type: ignore[no-untyped-call]  # torch's own
    return made if len(lead) == 1 else made.view(*lead, -1)


class _PerClient(torch.autograd.Function):
    """Where `torch.vmap` meets the products of many matrices."""

    @staticmethod
    def forward(values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return one client's outputs; nobody asks for their gradient."""
        return F.linear(values, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep nothing."""

    @staticmethod
    def vmap(
        info: Any, dims: tuple[int | None, ...], values: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, int]:
        """Return all clients' outputs, clients first."""
        clients: int = info.batch_size
        given = zip((values, weight, bias), dims, strict=True)
        parts = [None if part is None else _first(part, dim, clients) for part, dim in given]
        made: Tensor = _Products.apply(*parts)  # type: ignore[no-untyped-call]  # torch's own
        return made, 0


class _Products(torch.autograd.Function):
    """(K, n, i) times (K, o, i), plus (K, o)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return (K, n, o)."""
        ctx.save_for_backward(values, weight)
        if bias is None:
            return torch.bmm(values, weight.mT)
        return torch.baddbmm(bias[:, None], values, weight.mT)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients that are needed."""
        values, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            torch.bmm(above, weight) if wanted[0] else None,
            torch.bmm(above.mT, values) if wanted[1] else None,
            above.sum(dim=1) if wanted[2] else None,
        )


def _first(part: Tensor, dim: int | None, clients: int) -> Tensor:
    return part.expand(clients, *part.shape) if dim is None else part.movedim(dim, 0)

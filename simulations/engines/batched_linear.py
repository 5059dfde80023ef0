"""Linear layers of K clients, of which each gradient has its weights' own layout, or is never stored.

Torch sees to the layout for one matrix but not for many, and a step on transposed gradients takes several times as
long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from torch.autograd.function import BackwardCFunction

from simulations.engines.batch_trainer import UnsupportedError

__all__ = ["Linears", "lone_weights"]


class Linears:
    """The linear layers of a model. Weights that it is told of take SGD's step within the backward pass.

    `lone`: for the caller to keep what `lone_weights` found.
    """

    def __init__(self) -> None:
        self.lone: list[int] | None = None
        self._rate = 0.0
        self._waiting, self._done = frozenset[int](), list[int]()

    @contextmanager
    def descending(self, weights: Sequence[Tensor], rate: float) -> Iterator[None]:
        """Let each of the clients' `weights` (K, o, i) descend by rate x its gradient, as soon as that is known.

        Autograd returns no gradient of it.

        Args: weights: of which each is used by one linear layer, once, and by nothing else; see `lone_weights`.
        Raises: UnsupportedError: on leaving, if one has not taken its step, or two.
        """
        self._rate = rate
        self._waiting, self._done = frozenset(weight.data_ptr() for weight in weights), []
        try:
            yield
            if sorted(self._done) != sorted(self._waiting):
                raise UnsupportedError("the loss needs a linear layer at some steps and not, or twice, at others")
        finally:
            self._waiting = frozenset()

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

    def take(self, weight: Tensor, above: Tensor, values: Tensor) -> bool:
        """Take the step of a weight whose gradient is (K, n, o) times (K, n, i); return whether it is to take one."""
        if (place := weight.data_ptr()) not in self._waiting:
            return False
        self._done.append(place)
        weight.baddbmm_(above.mT, values, alpha=-self._rate)
        return True


class _Products(torch.autograd.Function):
    """(K, n, i) times (K, o, i), plus (K, o)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor | None, linears: Linears) -> Tensor:
        """Return (K, n, o)."""
        ctx.save_for_backward(values, weight)
        ctx.linears = linears
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
        if wanted[1] and not ctx.linears.take(weight, above, values):
            of_weight = torch.bmm(above.mT, values)
        return of_values, of_weight, above.sum(dim=1) if wanted[2] else None, None


def lone_weights(losses: Tensor, leaves: Sequence[Tensor]) -> list[int]:
    """Return the places of those `leaves` that the losses need as the weight of one linear layer, and for nothing else.

    None of them, where a user's own function has a part in the backward pass: it may keep values of a weight.
    Raises: UnsupportedError: for an operation whose gradients torch's maps get wrong.
    """
    places = {id(leaf): place for place, leaf in enumerate(leaves)}
    uses, lone = [0] * len(leaves), [False] * len(leaves)
    waiting, seen = [losses.grad_fn], {losses.grad_fn}
    while waiting:
        node = waiting.pop()
        if isinstance(node, BackwardCFunction) and type(node).__name__ != _BACKWARD:
            return []
        _refuse_wrong_rules(node)
        for number, (source, _) in enumerate(() if node is None else node.next_functions):
            place = places.get(id(getattr(source, "variable", None)))
            if place is not None:
                uses[place] += 1
                lone[place] = number == 1 and type(node).__name__ == _BACKWARD
            elif source is not None and source not in seen:
                seen.add(source)
                waiting.append(source)
    return [place for place, once in enumerate(lone) if once and uses[place] == 1]


_BACKWARD = f"{_Products.__name__}Backward"


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

"""The weights of K clients, and how a step changes them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from simulations.engines.fused_stack import Dense


@dataclass(frozen=True)
class Descent:
    """How an error becomes a step: w becomes keep w + rate (drift - gradient).

    `drift`: (p,), (K, p) or None. `max_norm`: clips each client's gradient.
    """

    rate: float
    keep: float = 1.0
    drift: Tensor | None = field(default=None, repr=False)
    max_norm: float | None = None

    def kept(self, steps: int) -> float:
        """Return what `steps` steps leave of a weight."""
        return float(self.keep**steps)

    def drifted(self, steps: int) -> float:
        """Return how much of the drift `steps` steps add up to."""
        return self.rate * sum(self.kept(step) for step in range(steps))


class Workspace:
    """Memory that is used again by every step and every chunk: fresh memory costs more than the work on it."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Return float32 memory of `shape`, whose content is undefined; the next taker of `name` gets the same."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size:
            held = self._held[name] = torch.empty(size)
        return held[:size].view(shape)


@dataclass(frozen=True)
class Weights:
    """One layer's weights of K clients: `weight` (K, out, in) and `bias` (K, 1, out)."""

    layer: Dense
    weight: Tensor = field(repr=False)
    bias: Tensor | None = field(repr=False)

    @classmethod
    def of(cls, layer: Dense, values: Tensor) -> Weights:
        """Return views of `values` (K, d)."""
        start, bias = layer.weight.offset, layer.bias
        return cls(
            layer,
            values[:, start : start + layer.weight.size].unflatten(1, layer.weight.shape),
            None if bias is None else values[:, bias.offset : bias.offset + bias.size].unsqueeze(1),
        )

    @classmethod
    def held(cls, layer: Dense, count: int, workspace: Workspace) -> Weights:
        """Return room for `count` clients' weights, contiguous: only then does torch batch products into them."""
        weight = workspace.take(layer.weight.name, count, *layer.weight.shape)
        bias = None if layer.bias is None else workspace.take(layer.bias.name, count, 1, layer.outputs)
        return cls(layer, weight, bias)

    def copy(self, source: Weights) -> None:
        """Take over the weights of one client for all."""
        self.weight.copy_(source.weight.expand_as(self.weight))
        if self.bias is not None and source.bias is not None:
            self.bias.copy_(source.bias.expand_as(self.bias))

    def moved(self, start: Weights, out: Weights) -> None:
        """Fill `out` with how far each client's weights are from those of `start`."""
        torch.sub(self.weight, start.weight, out=out.weight)
        if self.bias is not None and start.bias is not None:
            torch.sub(self.bias, start.bias, out=out.bias)

    def add(self, other: Weights, amounts: Tensor) -> None:
        """Add `other`, of one client for all or of each, times each client's amount (K,)."""
        self.weight.addcmul_(other.weight.expand_as(self.weight), amounts.view(-1, 1, 1))
        if self.bias is not None and other.bias is not None:
            self.bias.addcmul_(other.bias.expand_as(self.bias), amounts.view(-1, 1, 1))

    def put(self, values: Tensor) -> None:
        """Copy the weights to where they belong in `values` (K, d)."""
        there = Weights.of(self.layer, values)
        there.weight.copy_(self.weight)
        if there.bias is not None and self.bias is not None:
            there.bias.copy_(self.bias)

    def add_up(self, factors: Tensor, out: Tensor) -> None:
        """Put the sum of all clients' weights, each times its factor (K,), to where it belongs in `out` (d,)."""
        there = Weights.of(self.layer, out.unsqueeze(0))
        torch.mv(self.weight.flatten(1).t(), factors, out=there.weight.view(-1))
        if there.bias is not None and self.bias is not None:
            torch.mv(self.bias.flatten(1).t(), factors, out=there.bias.view(-1))

    def part(self, clients: slice) -> Weights:
        """Return some of the clients' weights."""
        return Weights(self.layer, self.weight[clients], None if self.bias is None else self.bias[clients])

    def forward(self, inputs: Tensor, out: Tensor) -> Tensor:
        """Fill `out` (K, B, out) with what the layer makes of `inputs` (K, B, in)."""
        if self.bias is None:
            return torch.bmm(inputs, self.weight.transpose(1, 2), out=out)
        return torch.baddbmm(self.bias, inputs, self.weight.transpose(1, 2), out=out)

    def descend(self, errors: Tensor, inputs: Tensor, rate: float, keep: float) -> None:
        """Take a step along the gradient, which is never stored."""
        self.weight.baddbmm_(errors.transpose(1, 2), inputs, beta=keep, alpha=-rate)
        if self.bias is not None:
            summed = errors.sum(dim=1, keepdim=True)
            (self.bias if keep == 1 else self.bias.mul_(keep)).sub_(summed, alpha=rate)

    def drift(self, drift: Weights, amount: float) -> None:
        """Add `amount` of `drift`, of one client for all or of each."""
        self.weight.add_(drift.weight, alpha=amount)
        if self.bias is not None and drift.bias is not None:
            self.bias.add_(drift.bias, alpha=amount)


def shared_forward(weights: Weights, rows: Tensor, out: Tensor) -> Tensor:
    """Fill `out` with the outputs of one client's weights for all rows."""
    if weights.bias is None:
        return torch.mm(rows, weights.weight[0].t(), out=out)
    return torch.addmm(weights.bias[0, 0], rows, weights.weight[0].t(), out=out)

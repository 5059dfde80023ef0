"""One step of K clients through the layers of a dense stack, once the first layer's outputs are known.

No gradient of a weight is ever stored: each layer after the first descends by one product, and the first layer's error
is left to whoever keeps its weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from simulations.engines.fused_errors import Errors
from simulations.engines.fused_products import Threads
from simulations.engines.fused_stack import Stack
from simulations.engines.fused_weights import Descent, Weights, Workspace

__all__ = ["Bench", "Network", "Target"]


@dataclass(frozen=True)
class Target:
    """What a step's outputs are held against: `errors` at `rows`, where `outputs` (R, c) keep them."""

    errors: Errors
    outputs: Tensor = field(repr=False)
    rows: slice


@dataclass(frozen=True)
class Bench:
    """What a chunk is worked on with: memory that is used again, and so many threads. `batch_size`: of every step."""

    workspace: Workspace = field(repr=False)
    batch_size: int
    threads: Threads


class _Active:
    """What the `count` clients still training need at each step: views, made once for as long as they are as many."""

    def __init__(self, network: Network, count: int) -> None:
        clients, size, layers = slice(count), network.batch_size, network.stack.layers
        self.count = count
        self.rest = [weights.part(clients) for weights in network.rest]
        self.drifts = [drift.part(clients) if len(drift.weight) > 1 else drift for drift in network.drifts[1:]]
        take = network.workspace.take
        self.before = [take(f"before {place}", count, size, layer.outputs) for place, layer in enumerate(layers)]
        self.after = [
            take(f"after {place}", count, size, layer.outputs) if layer.activation else before
            for place, (layer, before) in enumerate(zip(layers, self.before, strict=True))
        ]
        self.errors = [take(f"error {place}", count, size, layer.outputs) for place, layer in enumerate(layers)]


class Network:
    """K clients that all start from `start` (d,); `rest` are their weights after the first layer's.

    `threads`: how many of them each piece of work gets.
    """

    def __init__(self, stack: Stack, start: Tensor, count: int, descent: Descent, bench: Bench) -> None:
        self.stack, self.descent, self.workspace, self.batch_size = stack, descent, bench.workspace, bench.batch_size
        self.count, self.size, self.threads = count, len(start), bench.threads
        self.start = [Weights.of(layer, start.unsqueeze(0)) for layer in stack.layers]
        self.rest = [Weights.held(layer, count, bench.workspace) for layer in stack.layers[1:]]
        for weights, source in zip(self.rest, self.start[1:], strict=True):
            weights.copy(source)
        drift = descent.drift
        self.drifts = [] if drift is None else [Weights.of(layer, torch.atleast_2d(drift)) for layer in stack.layers]
        self._active: _Active | None = None

    def step_flops(self, first: int) -> float:
        """Return the floating-point operations of a step of all clients in the layers from `first` on."""
        layers = self.stack.layers[first:]
        return 6.0 * self.count * self.batch_size * sum(layer.inputs * layer.outputs for layer in layers)

    def step(self, before: Tensor, target: Target, inner: Tensor | None, error: Tensor) -> None:
        """Take one step and leave the first layer's errors (m, B, out) in `error`.

        Args: before: the first layer's outputs (m, B, out) of the m clients still training. inner: the inner products
            (m, B, B) of the step's rows, one added for a bias, where gradients are clipped.
        """
        count = len(before)
        if self._active is None or self._active.count != count:
            self._active = _Active(self, count)
        active = self._active
        befores, afters, gradients = [before, *active.before[1:]], list(active.after), list(active.errors)
        if error.is_contiguous():  # otherwise torch would not batch a product into it
            gradients[0] = error
        afters[-1] = target.outputs[target.rows].view_as(afters[-1])
        self._forward(active, befores, afters)
        target.errors.at(target.rows, afters[-1].flatten(0, 1), gradients[-1].flatten(0, 1))
        self._backward(active, befores, afters, gradients)
        if inner is not None:
            self._clip(inner, gradients, afters)
        for place, weights in enumerate(active.rest):
            weights.descend(gradients[place + 1], afters[place], self.descent.rate, self.descent.keep)
            if active.drifts:
                weights.drift(active.drifts[place], self.descent.rate)
        if gradients[0] is not error:
            error.copy_(gradients[0])

    def change(self) -> None:
        """Let `rest` hold how far the weights have moved; no step may follow."""
        for weights, start in zip(self.rest, self.start[1:], strict=True):
            weights.moved(start, weights)

    def _forward(self, active: _Active, befores: list[Tensor], afters: list[Tensor]) -> None:
        """Fill the outputs of every layer before and after its activation; without one they are the same tensor."""
        layers, last = self.stack.layers, len(afters) - 1
        for place, layer in enumerate(layers):
            if place and place == last and layer.activation is None:
                befores[place] = afters[place]
            if place:
                active.rest[place - 1].forward(afters[place - 1], befores[place])
            if layer.activation is not None:
                layer.activation.forward(befores[place], afters[place])
            elif place < last:
                afters[place] = befores[place]
            elif place == 0:
                afters[place].copy_(befores[place])

    def _backward(self, active: _Active, befores: list[Tensor], afters: list[Tensor], gradients: list[Tensor]) -> None:
        """Turn the gradient at the outputs into that before every layer's activation."""
        for place in range(len(gradients) - 1, -1, -1):
            activation = self.stack.layers[place].activation
            if activation is not None:
                activation.backward(gradients[place], befores[place], afters[place])
            if place:
                torch.bmm(gradients[place], active.rest[place - 1].weight, out=gradients[place - 1])

    def _clip(self, inner: Tensor, gradients: list[Tensor], afters: list[Tensor]) -> None:
        """Scale each client's errors as the norm of its gradient asks, which inner products give without it."""
        maximum = self.descent.max_norm
        assert maximum is not None
        squares = (torch.bmm(gradients[0], gradients[0].mT) * inner).sum(dim=(1, 2))
        for layer, error, inputs in zip(self.stack.layers[1:], gradients[1:], afters, strict=False):
            products = torch.bmm(inputs, inputs.mT).add_(1.0 if layer.bias else 0.0)
            squares += (torch.bmm(error, error.mT) * products).sum(dim=(1, 2))
        scales = (maximum / (squares.clamp_min_(0).sqrt_() + 1e-6)).clamp_max_(1.0).view(-1, 1, 1)
        for error in gradients:
            error.mul_(scales)

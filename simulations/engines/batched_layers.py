"""Layers that torch cannot vectorise over clients as they are, or not well: BatchNorm, recurrent networks, Linear.

Each gets another forward pass with the same results, made of operations that `torch.vmap` knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from fedml_core.replaced_forward import has_forward_of, replaced_forwards
from simulations.engines.batch_trainer import UnsupportedError
from simulations.engines.batched_linear import Linears

__all__ = ["Averages", "vectorised_layers"]


class Averages:
    """Keeps each client's running statistics of BatchNorm: in-place changes of buffers that the caller gives.

    Torch's own kernel would change a copy of them under `torch.vmap`.
    """

    def __init__(self, module: nn.Module) -> None:
        self.layers = [
            layer
            for layer in module.modules()
            if isinstance(layer, _BatchNorm) and has_forward_of(layer, _BatchNorm) and _keeps_averages(layer)
        ]
        self.restart()

    def restart(self) -> None:
        """Count anew from what the layers, as they are loaded, have seen."""
        self._seen = {layer: _batches_seen(layer) for layer in self.layers}
        self._now = dict.fromkeys(self.layers, 0)

    def next_step(self) -> None:
        """Count the forward passes of the step that ends."""
        for layer, times in self._now.items():
            self._seen[layer] += times
        self.next_forward()

    def next_forward(self) -> None:
        """Begin a forward pass; the groups of a step have one each, which count once."""
        for layer in self.layers:
            self._now[layer] = 0

    def forward(self, layer: _BatchNorm, values: Tensor) -> Tensor:
        """Return the normalised values, and move the running statistics as torch does."""
        layer._check_input_dim(values)
        self._now[layer] += 1
        share = layer.momentum
        if share is None:
            share = 1.0 / (self._seen[layer] + self._now[layer])
        normal = F.batch_norm(values, None, None, layer.weight, layer.bias, True, 0.0, layer.eps)
        mean, variance = layer.running_mean, layer.running_var
        assert mean is not None
        assert variance is not None
        with torch.no_grad():
            others = [0, *range(2, values.dim())]
            # Torch normalises by the plain variance, but remembers the unbiased one.
            batch_variance, batch_mean = torch.var_mean(values, others, correction=1)
            mean.mul_(1 - share).add_(batch_mean, alpha=share)
            variance.mul_(1 - share).add_(batch_variance, alpha=share)
        return normal


@contextmanager
def vectorised_layers(module: nn.Module, linears: Linears) -> Iterator[Averages]:
    """Let the layers of `module`, in train mode, be vectorised as long as the context lasts.

    Raises: UnsupportedError: for a layer that keeps running statistics in a way of its own.
    """
    averages = Averages(module)
    forwards: dict[nn.Module, Callable[..., Any]] = {
        layer: partial(averages.forward, layer) for layer in averages.layers
    }
    for name, layer in module.named_modules():
        if isinstance(layer, _NormBase) and _keeps_averages(layer) and layer not in forwards:
            raise UnsupportedError(f"layer {name} ({type(layer).__name__}) keeps running statistics in its own way")
        if isinstance(layer, nn.RNNBase) and any(has_forward_of(layer, kind) for kind in _CELLS):
            forwards[layer] = partial(_recurrent, name, layer)
        if isinstance(layer, nn.Embedding) and layer.padding_idx is not None and has_forward_of(layer, nn.Embedding):
            forwards[layer] = partial(_padded, layer)
        if isinstance(layer, nn.Linear) and has_forward_of(layer, nn.Linear):
            forwards[layer] = partial(linears.forward, layer)
    with replaced_forwards(forwards):
        yield averages


def _keeps_averages(layer: _NormBase) -> bool:
    return layer.training and layer.track_running_stats and layer.running_mean is not None


def _batches_seen(layer: _NormBase) -> int:
    return 0 if layer.num_batches_tracked is None else int(layer.num_batches_tracked)


def _padded(layer: nn.Embedding, numbers: Tensor) -> Tensor:
    """Return what nn.Embedding returns; the map's own rule spares the padding of one client only from training."""
    rows = F.embedding(numbers, layer.weight, None, layer.max_norm, layer.norm_type, layer.scale_grad_by_freq)
    padding = torch.eq(numbers, layer.padding_idx or 0)
    return torch.where(padding.unsqueeze(-1), rows.detach(), rows)


def _recurrent(name: str, layer: nn.RNNBase, values: Any, state: Any = None) -> tuple[Tensor, Any]:
    """Return what nn.RNN, nn.LSTM and nn.GRU return for a padded batch."""
    if not isinstance(values, Tensor) or values.dim() != 3:
        raise UnsupportedError(f"layer {name} ({type(layer).__name__}) is given no padded batch of sequences")
    if layer.proj_size or (layer.dropout and layer.training and layer.num_layers > 1):
        raise UnsupportedError(f"layer {name} ({type(layer).__name__}) has a proj_size, or draws dropout of its own")
    if layer.batch_first:
        values = values.transpose(0, 1)
    directions = 2 if layer.bidirectional else 1
    pair = isinstance(layer, nn.LSTM)
    if state is None:
        zeros = values.new_zeros(layer.num_layers * directions, values.shape[1], layer.hidden_size)
        state = (zeros, zeros) if pair else zeros
    starts = state if pair else (state,)
    ends: list[tuple[Tensor, ...]] = []
    for depth in range(layer.num_layers):
        outputs = []
        for direction in range(directions):
            start = tuple(part[depth * directions + direction] for part in starts)
            made, end = _one_way(layer, f"_l{depth}" + "_reverse" * direction, values, start)
            outputs.append(made)
            ends.append(end)
        values = torch.cat(outputs, dim=2)
    final = tuple(torch.stack(parts) for parts in zip(*ends, strict=True))
    return values.transpose(0, 1) if layer.batch_first else values, final if pair else final[0]


def _one_way(
    layer: nn.RNNBase, suffix: str, values: Tensor, state: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    biases = (getattr(layer, f"bias_ih{suffix}"), getattr(layer, f"bias_hh{suffix}")) if layer.bias else (None, None)
    inward = F.linear(values, getattr(layer, f"weight_ih{suffix}"), biases[0])
    again, cell = getattr(layer, f"weight_hh{suffix}"), _cell_of(layer)
    times, outputs = range(len(values)), []
    for time in reversed(times) if suffix.endswith("_reverse") else times:
        state = cell(inward[time], F.linear(state[0], again, biases[1]), state)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if suffix.endswith("_reverse") else outputs), state


def _gru(inward: Tensor, again: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    reset_in, update_in, new_in = inward.chunk(3, dim=-1)
    reset_again, update_again, new_again = again.chunk(3, dim=-1)
    reset, update = torch.sigmoid(reset_in + reset_again), torch.sigmoid(update_in + update_again)
    new = torch.tanh(new_in + reset * new_again)
    return (new + update * (state[0] - new),)


def _lstm(inward: Tensor, again: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    enter, forget, cell, leave = (inward + again).chunk(4, dim=-1)
    memory = torch.sigmoid(forget) * state[1] + torch.sigmoid(enter) * torch.tanh(cell)
    return torch.sigmoid(leave) * torch.tanh(memory), memory


def _tanh(inward: Tensor, again: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (torch.tanh(inward + again),)


def _relu(inward: Tensor, again: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (torch.relu(inward + again),)


Cell = Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]
_CELLS: dict[type[nn.RNNBase], Cell] = {nn.GRU: _gru, nn.LSTM: _lstm, nn.RNN: _tanh}


def _cell_of(layer: nn.RNNBase) -> Cell:
    if isinstance(layer, nn.RNN) and layer.nonlinearity == "relu":
        return _relu
    return next(cell for kind, cell in _CELLS.items() if isinstance(layer, kind))

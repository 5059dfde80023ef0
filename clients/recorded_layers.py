"""Layers that remember what came in and what came back, so that one backward pass gives every example's gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clients.gradient_pieces import Lookup, Outer, Piece, Positions, Rows
from clients.per_example import UnsuitedError
from fedml_core.dense import product
from fedml_core.replaced_forward import has_forward_of

__all__ = ["Recording", "linear_pieces", "recorded_forward"]

Pieces = dict[nn.Parameter, Piece]


class _Rule(NamedTuple):
    """A layer's forward pass, its gradient by input, and its parameters' gradients; each is given the layer first."""

    forward: Callable[[Any, Tensor], Tensor]
    back: Callable[[Any, Tensor, Tensor], Tensor | None]
    pieces: Callable[[Any, Tensor, Tensor], Pieces]


class Recording:
    """What the backward pass of one batch left: the pieces of each parameter's gradients, by its uses."""

    def __init__(self) -> None:
        self.count = 0
        self.pieces: dict[nn.Parameter, list[Piece]] = {}

    def begin(self, count: int) -> None:
        """Forget everything; the next batch has `count` examples."""
        self.count, self.pieces = count, {}

    def take(self, rule: _Rule, layer: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
        """Add one use of a layer."""
        if (inputs.dim() < 2 and not isinstance(layer, nn.Embedding)) or len(inputs) != self.count:
            raise UnsuitedError(
                f"a {type(layer).__name__} takes {len(inputs)} rows for {self.count} examples, so nobody can tell "
                "whose they are; keep the examples in the first dimension"
            )
        for parameter, piece in rule.pieces(layer, inputs, gradient).items():
            self.pieces.setdefault(parameter, []).append(piece)


def recorded_forward(layer: nn.Module, anchor: Tensor, recording: Recording) -> Callable[[Tensor], Tensor] | None:
    """Return a forward pass for `layer` that is recorded, or None if no rule knows the layer.

    `anchor`: any scalar that requires a gradient; without it the layers nearest to the data would have none to record.
    """
    for kind, rule in _RULES.items():
        if has_forward_of(layer, kind) and _known(layer):
            if isinstance(layer, _NORMS):
                return partial(_norm_forward, rule, layer, anchor, recording)
            return partial(_apply, rule, layer, anchor, recording)
    return None


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, anchor: Tensor, rule: _Rule, layer: nn.Module, recording: Recording
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.recorded = rule, layer, recording
        return rule.forward(layer, inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inputs,), (gradient,) = ctx.saved_tensors, gradients
        rule, layer, recording = ctx.recorded
        recording.take(rule, layer, inputs.detach(), gradient)
        return (rule.back(layer, inputs, gradient) if ctx.needs_input_grad[0] else None), None, None, None, None


def _apply(rule: _Rule, layer: nn.Module, anchor: Tensor, recording: Recording, inputs: Tensor) -> Tensor:
    return _Recorded.apply(inputs, anchor, rule, layer, recording)  # type: ignore[no-any-return, no-untyped-call]  # torch annotates neither


def _norm_forward(rule: _Rule, layer: Any, anchor: Tensor, recording: Recording, inputs: Tensor) -> Tensor:
    """Normalise as torch does, and record only the scaling that follows."""
    if isinstance(layer, nn.LayerNorm):
        normal = nn.functional.layer_norm(inputs, layer.normalized_shape, None, None, layer.eps)
    elif isinstance(layer, nn.GroupNorm):
        normal = nn.functional.group_norm(inputs, layer.num_groups, None, None, layer.eps)
    else:
        normal = nn.functional.instance_norm(inputs, eps=layer.eps)
    return _apply(rule, layer, anchor, recording, normal)


def _known(layer: nn.Module) -> bool:
    if isinstance(layer, _CONVOLUTIONS):
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if isinstance(layer, nn.Embedding):
        return layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse
    return not (isinstance(layer, _INSTANCE_NORMS) and layer.track_running_stats)


def _held(layer: nn.Module, found: Mapping[str, Callable[[], Piece]]) -> Pieces:
    """Return the pieces of the parameters that the layer has and that training changes."""
    parameters = layer._parameters
    return {p: make() for name, make in found.items() if (p := parameters.get(name)) is not None and p.requires_grad}


def _linear(layer: nn.Linear, inputs: Tensor) -> Tensor:
    if inputs.dim() == 2:
        return product(inputs, layer.weight, layer.bias)
    return nn.functional.linear(inputs, layer.weight, layer.bias)


def _linear_back(layer: nn.Linear, inputs: Tensor, gradient: Tensor) -> Tensor:
    return product(gradient, layer.weight.t()) if gradient.dim() == 2 else gradient @ layer.weight


def linear_pieces(layer: nn.Linear, inputs: Tensor, gradient: Tensor) -> Pieces:
    """Return what a dense layer's parameters get from one use, given what came in and what came back."""
    if inputs.dim() == 2:
        back = Rows(gradient)
        return _held(layer, {"weight": lambda: Outer(back, inputs), "bias": lambda: back})
    columns, across = gradient.flatten(1, -2), inputs.flatten(1, -2)
    return _held(layer, {"weight": lambda: _positions(columns, across), "bias": lambda: Rows(columns.sum(dim=1))})


def _positions(columns: Tensor, across: Tensor) -> Piece:
    made = Positions(columns, across)
    return made if 2 * columns.shape[1] ** 2 <= columns.shape[2] * across.shape[2] else Rows(made.rows())


def _convolution(layer: Any, inputs: Tensor) -> Tensor:
    made: Tensor = layer._conv_forward(inputs, layer.weight, layer.bias)
    return made


def _convolution_back(layer: Any, inputs: Tensor, gradient: Tensor) -> Tensor:
    return _differentiated(layer, inputs, gradient, [True, False, False])[0]


def _convolution_pieces(layer: Any, inputs: Tensor, gradient: Tensor) -> Pieces:
    return _held(
        layer,
        {"weight": lambda: _weight_rows(layer, inputs, gradient), "bias": lambda: Rows(gradient.flatten(2).sum(dim=2))},
    )


def _weight_rows(layer: Any, inputs: Tensor, gradient: Tensor) -> Piece:
    places = gradient[0, 0].numel()
    if isinstance(layer, nn.Conv2d) and layer.groups == 1 and 2 * places**2 <= layer.weight.numel():
        padding: Any = layer.padding
        patches = nn.functional.unfold(inputs, layer.kernel_size, layer.dilation, padding, layer.stride)
        return Positions(gradient.flatten(2).transpose(1, 2), patches.transpose(1, 2))

    def one(example: Tensor, back: Tensor) -> Tensor:
        return _differentiated(layer, example, back, [False, True, False])[1]

    if inputs.device.type != "cpu":
        alone: Tensor = torch.func.vmap(lambda x, g: one(x.unsqueeze(0), g.unsqueeze(0)))(inputs, gradient)
        return Rows(alone)
    # On a CPU, one call an example costs hardly more than one for all, and far less than unfolding the images.
    return Rows(torch.stack([one(x, g) for x, g in zip(inputs.split(1), gradient.split(1), strict=True)]))


def _differentiated(layer: Any, inputs: Tensor, gradient: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    zeros = [0] * len(layer.stride)
    made: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        gradient, inputs, layer.weight, None, layer.stride, layer.padding, layer.dilation, False, zeros, layer.groups,
        wanted,
    )  # fmt: skip
    return made


def _embedding(layer: nn.Embedding, inputs: Tensor) -> Tensor:
    return nn.functional.embedding(inputs, layer.weight)


def _embedding_pieces(layer: nn.Embedding, inputs: Tensor, gradient: Tensor) -> Pieces:
    indices, back = inputs.reshape(len(inputs), -1), gradient.reshape(len(inputs), -1, gradient.shape[-1])
    if layer.padding_idx is not None:
        back = back * (indices != layer.padding_idx).unsqueeze(2)
    return _held(layer, {"weight": lambda: Lookup(indices, back, len(layer.weight))})


def _channels(layer: Any, values: Tensor, like: Tensor) -> Tensor:
    return values if isinstance(layer, nn.LayerNorm) else values.view(1, -1, *[1] * (like.dim() - 2))


def _scaling(layer: Any, normal: Tensor) -> Tensor:
    scaled = normal * _channels(layer, layer.weight, normal)
    return scaled if layer.bias is None else scaled + _channels(layer, layer.bias, normal)


def _scaling_back(layer: Any, normal: Tensor, gradient: Tensor) -> Tensor:
    return gradient * _channels(layer, layer.weight, normal)


def _scaling_pieces(layer: Any, normal: Tensor, gradient: Tensor) -> Pieces:
    def summed(values: Tensor) -> Piece:
        if isinstance(layer, nn.LayerNorm):
            return Rows(values.reshape(len(values), -1, *layer.normalized_shape).sum(dim=1))
        return Rows(values.flatten(2).sum(dim=2) if values.dim() > 2 else values)

    return _held(layer, {"weight": lambda: summed(gradient * normal), "bias": lambda: summed(gradient)})


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_NORMS = (nn.LayerNorm, nn.GroupNorm, *_INSTANCE_NORMS)
_RULES: dict[type[nn.Module], _Rule] = {
    nn.Linear: _Rule(_linear, _linear_back, linear_pieces),
    nn.Embedding: _Rule(_embedding, lambda *_: None, _embedding_pieces),
    **{kind: _Rule(_convolution, _convolution_back, _convolution_pieces) for kind in _CONVOLUTIONS},
    **{kind: _Rule(_scaling, _scaling_back, _scaling_pieces) for kind in _NORMS},
}

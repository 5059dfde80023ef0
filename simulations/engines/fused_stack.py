"""Recognises a module that is exactly a stack of linear layers with activations between them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fedml_core.model import ModelSpec, TensorSpec
from simulations.engines import fused_layers as layers
from simulations.engines.batch_trainer import UnsupportedError
from simulations.engines.fused_layers import Activation

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What a call takes beside its input: names in order, with their defaults.
_Signature = tuple[Callable[..., Activation], tuple[tuple[str, Any], ...]]
_IN_PLACE = ("inplace", False)
_CALLS: dict[object, _Signature] = {
    torch.relu: (layers.relu, ()),
    torch.relu_: (layers.relu, ()),
    "relu": (layers.relu, ()),
    "relu_": (layers.relu, ()),
    F.relu: (layers.relu, (_IN_PLACE,)),
    F.leaky_relu: (layers.leaky_relu, (("slope", 0.01), _IN_PLACE)),
    torch.tanh: (layers.tanh, ()),
    "tanh": (layers.tanh, ()),
    F.tanh: (layers.tanh, ()),
    torch.sigmoid: (layers.sigmoid, ()),
    "sigmoid": (layers.sigmoid, ()),
    F.sigmoid: (layers.sigmoid, ()),
    F.gelu: (layers.gelu, (("approximate", "none"),)),
    F.silu: (layers.silu, (_IN_PLACE,)),
    F.elu: (layers.elu, (("alpha", 1.0), _IN_PLACE)),
}
_RENAMED = {"negative_slope": "slope"}
# How torch's tracer says what users call otherwise.
_REASONS = {"control flow": "what it computes depends on the values of a tensor"}


@dataclass(frozen=True)
class Dense:
    """A linear layer, where its weight (outputs, inputs) and bias lie in the model's vector, and what follows it."""

    weight: TensorSpec
    bias: TensorSpec | None
    activation: Activation | None = None

    @property
    def inputs(self) -> int:
        """Return the number of features it takes."""
        return self.weight.shape[1]

    @property
    def outputs(self) -> int:
        """Return the number of features it gives."""
        return self.weight.shape[0]


@dataclass(frozen=True)
class Stack:
    """Linear layers one after the other. `flattens`: each example is first made one vector."""

    layers: tuple[Dense, ...]
    spec: ModelSpec = field(repr=False)
    flattens: bool

    def rows(self, inputs: Tensor) -> Tensor:
        """Return the examples (n, ...) as rows (n, features) of the first layer.

        Raises: UnsupportedError: if they do not fit it.
        """
        features = self.layers[0].inputs
        shape = tuple(inputs.shape[1:])
        if inputs.dtype != torch.float32:
            raise UnsupportedError(f"the fused trainer takes float32 inputs, got {inputs.dtype}")
        if math.prod(shape) != features or not shape or (len(shape) > 1 and not self.flattens):
            raise UnsupportedError(f"the first linear layer takes {features} features, got examples of shape {shape}")
        return inputs.reshape(len(inputs), features)


def stack_of(module: nn.Module) -> Stack:
    """Return the stack that `module` is.

    Raises: UnsupportedError: naming the layer or call that makes it another.
    """
    spec = ModelSpec.of(module)
    _check_tensors(module, spec)
    root, tracer = nn.Sequential(module), _Tracer()
    try:
        graph = tracer.trace(root)
    except Exception as error:  # whatever the user's code raises when it is given a symbol
        line = " ".join(str(error).split())
        reason = next((text for sign, text in _REASONS.items() if sign in line), line)
        raise UnsupportedError(
            f"{tracer.where or type(module).__name__}.forward cannot be read as a stack of layers: {reason}"
        ) from error
    reader = _Reader(root, {tensor.name: tensor for tensor in spec.parameters})
    for node in graph.nodes:
        reader.read(node)
    return reader.stack(spec)


class _Tracer(fx.Tracer):
    """Notes in `where` the innermost layer of the user's own in which tracing failed."""

    where = ""

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace one layer."""
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if not self.where:
                name, kind = _own_name(self.path_of_module(m)), type(m).__name__
                self.where = f"layer {name} ({kind})" if name else kind
            raise


def _own_name(target: str) -> str:
    """Return the name that a layer has in the user's model, which stands at place 0 of the one that is traced."""
    return target.removeprefix("0").removeprefix(".")


def _check_tensors(module: nn.Module, spec: ModelSpec) -> None:
    for name, part in module.named_modules(prefix="model"):
        if any(getattr(part, hooks) for hooks in _HOOKS):
            raise UnsupportedError(f"{name} has hooks, which the fused trainer would not call")
    if spec.frozen_digest:
        raise UnsupportedError("the model has frozen parameters, which the fused trainer cannot leave out")
    for name, _ in module.named_buffers():
        raise UnsupportedError(f"the model has the buffer {name}; the fused trainer takes linear layers only")
    for tensor in spec.parameters:
        if tensor.dtype != "float32":
            raise UnsupportedError(f"parameter {tensor.name} is {tensor.dtype}; the fused trainer takes float32")
    for name, parameter in module.named_parameters():
        if parameter._backward_hooks:
            raise UnsupportedError(f"parameter {name} has hooks, which the fused trainer would not call")


class _Reader:
    """Follows a traced forward pass, node by node, as long as it is one chain."""

    def __init__(self, root: nn.Module, parameters: dict[str, TensorSpec]) -> None:
        self._root, self._unused = root, parameters
        self._layers: list[Dense] = []
        self._flattens = False
        self._width: int | None = None
        self._at: fx.Node | None = None
        self._shapes: set[fx.Node] = set()
        self._counts: set[fx.Node] = set()

    def read(self, node: fx.Node) -> None:
        """Follow one node, or raise UnsupportedError with its name."""
        if node.op == "placeholder":
            if self._at is not None or node.args or str(node.target).startswith("*"):
                raise UnsupportedError(f"the model's forward takes another argument, {node.target}; one input only")
            self._at = node
        elif node.op == "output":
            if node.args != (self._at,):
                raise UnsupportedError("the model does not return its last layer's output alone")
        elif node.op == "call_module" and (node.args, node.kwargs) == ((self._at,), {}):
            self._module(str(node.target), self._root.get_submodule(str(node.target)))
            self._at = node
        elif node.op in ("call_function", "call_method"):
            self._call(node)
        else:
            raise _unknown(node)

    def stack(self, spec: ModelSpec) -> Stack:
        """Return what was read."""
        if not self._layers:
            raise UnsupportedError("the model has no linear layer")
        if self._unused:
            raise UnsupportedError(f"parameter {next(iter(self._unused))} is not used by a linear layer")
        if self._width not in (None, self._layers[0].inputs):
            raise UnsupportedError(f"the model's forward views {self._width} features as {self._layers[0].inputs}")
        for before, after in zip(self._layers, self._layers[1:], strict=False):
            if before.outputs != after.inputs:
                raise UnsupportedError(f"{after.weight.name} takes {after.inputs} features, given {before.outputs}")
        return Stack(tuple(self._layers), spec, self._flattens)

    def _module(self, target: str, module: nn.Module) -> None:
        name = _own_name(target)
        activation = layers.activation_of(module)
        if type(module) is nn.Linear:
            self._linear(name, module)
        elif activation is not None:
            self._activate(activation)
        elif type(module) is nn.Flatten:
            self._flatten(module.start_dim, module.end_dim)
        elif type(module) is not nn.Identity:
            raise UnsupportedError(f"layer {name or 'model'} is a {type(module).__name__}, which is not fused")

    def _linear(self, name: str, module: nn.Linear) -> None:
        lead = f"{name}." if name else ""
        weight = self._take(f"{lead}weight")
        bias = None if module.bias is None else self._take(f"{lead}bias")
        self._layers.append(Dense(weight, bias))

    def _take(self, name: str) -> TensorSpec:
        if name not in self._unused:
            raise UnsupportedError(f"parameter {name} is tied or used twice, which is not fused")
        return self._unused.pop(name)

    def _activate(self, activation: Activation) -> None:
        if not self._layers:
            raise UnsupportedError(f"{activation.name} before the first linear layer is not fused")
        last = self._layers[-1]
        if last.activation is not None:
            raise UnsupportedError(f"{activation.name} after {last.activation.name} without a linear layer between")
        self._layers[-1] = Dense(last.weight, last.bias, activation)

    def _flatten(self, start: object, end: object) -> None:
        if start != 1 or end != -1:
            raise UnsupportedError(f"flatten from dimension {start} to {end} is not fused; flatten from 1 to -1")
        # After a linear layer on rows there is nothing left to flatten.
        self._flattens = self._flattens or not self._layers

    def _call(self, node: fx.Node) -> None:
        if self._asks_for_shape(node):
            return
        if not node.args or node.args[0] is not self._at:
            raise _unknown(node)
        if node.target in (torch.flatten, "flatten"):
            self._flatten(*_bound(node, (("start_dim", 0), ("end_dim", -1))))
        elif node.target in ("view", "reshape", torch.reshape):
            self._view(node)
        elif node.target in _CALLS:
            made, names = _CALLS[node.target]
            values = _bound(node, names)
            self._activate(made(*(v for v, (name, _) in zip(values, names, strict=True) if name != "inplace")))
        else:
            raise _unknown(node)
        self._at = node

    def _asks_for_shape(self, node: fx.Node) -> bool:
        """Return whether the node only reads the size of the batch, and note it."""
        asked = (node.target, node.args, node.kwargs)
        if asked in ((getattr, (self._at, "shape"), {}), ("size", (self._at,), {})):
            self._shapes.add(node)
        elif asked == ("size", (self._at, 0), {}) or asked in [(operator.getitem, (s, 0), {}) for s in self._shapes]:
            self._counts.add(node)
        else:
            return False
        return True

    def _view(self, node: fx.Node) -> None:
        shape = tuple(node.args[1:])
        if len(shape) == 1 and isinstance(shape[0], tuple | list):
            shape = tuple(shape[0])
        if node.kwargs or len(shape) != 2 or self._layers:
            raise _unknown(node)
        counted = isinstance(shape[0], fx.Node) and shape[0] in self._counts
        width = shape[1] if isinstance(shape[1], int) and shape[1] > 0 else None
        # (-1, width) keeps examples apart only where each has `width` numbers: then the first layer must take as many.
        if not (counted and (shape[1] == -1 or width)) and not (shape[0] == -1 and width):
            raise _unknown(node)
        self._width, self._flattens = width or self._width, True


def _bound(node: fx.Node, names: tuple[tuple[str, Any], ...]) -> list[Any]:
    given = dict(zip((name for name, _ in names), node.args[1:], strict=False))
    given.update({_RENAMED.get(name, name): value for name, value in node.kwargs.items()})
    known = {name for name, _ in names}
    if len(node.args) > 1 + len(names) or set(given) - known or any(isinstance(v, fx.Node) for v in given.values()):
        raise _unknown(node)
    return [given.get(name, default) for name, default in names]


def _unknown(node: fx.Node) -> UnsupportedError:
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return UnsupportedError(f"the model's forward calls {target} ({node.op}), which is not fused")

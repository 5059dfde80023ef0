"""A user's module as a function of K clients' parameters: one forward pass for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedml_core.dropout import KeyedDropout
from fedml_core.errors import ConfigError, SpecMismatchError, StrategyError
from fedml_core.evaluation import Evaluator
from fedml_core.randomness import Key
from simulations.engines.batch_trainer import UnsupportedError
from simulations.engines.batched_layers import Averages, vectorised_layers
from simulations.engines.batched_linear import Linears
from simulations.engines.tensor_slots import TensorSlots

__all__ = ["OWN_ERRORS", "BatchedModel", "Layers", "explained"]

OWN_ERRORS = (UnsupportedError, torch.OutOfMemoryError, ConfigError, SpecMismatchError, StrategyError)
"""What the caller must know as it is; any other failure is the work's, and shows again client by client."""

Layers = Callable[[nn.Module, Linears], AbstractContextManager[Averages]]

_REASONS = {
    "aten::rrelu": "it draws random numbers, and only dropout layers draw what each client would draw alone",
    "random operation": "it draws random numbers, and only dropout layers draw what each client would draw alone",
    "data-dependent control flow": "what it computes depends on the values of a tensor",
    ".item() on a Tensor": "it reads a tensor's values in Python",
    "Batching rule not implemented": "torch cannot vectorise one of its operations",
    "inplace arithmetic": "it changes a tensor in place that the clients share",
    "mutate a captured Tensor": "it changes a tensor in place that the clients share",
}


class BatchedModel:
    """Runs an evaluator's module with a leading dimension, the clients, on its parameters, buffers and inputs.

    Args: layers: gives a context in which the module's layers can be mapped.
    """

    def __init__(self, bench: Evaluator, layers: Layers = vectorised_layers) -> None:
        self._layers, self.linears = layers, Linears()
        self.module, self._spec, self._device = bench.module, bench.spec, bench.device
        for name, tensor in chain(self.module.named_parameters(), self.module.named_buffers()):
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                raise UnsupportedError(f"{name} is {tensor.dtype}; clients side by side train float32 models only")
        self._dropout = KeyedDropout(self.module)
        self._names = [tensor.name for tensor in (*self._spec.parameters, *self._spec.buffers)]
        self.parameters = len(self._spec.parameters)
        self._step = 0
        self._before: dict[str, tuple[Tensor, int]] = {}
        _refuse_hooks(self.module)
        self._slots = TensorSlots(self.module, self._names)
        parameters, buffers = self.module.named_parameters(), self.module.named_buffers()
        self._all = TensorSlots(self.module, [name for name, _ in chain(parameters, buffers)])
        self._vectorised = torch.vmap(self._one, randomness="error")

    @contextmanager
    def running(self, purpose: tuple[Key, ...]) -> Iterator[None]:
        """Prepare the module to be called, in train mode, for clients with keys (*purpose, number).

        Raises: UnsupportedError: for a layer that cannot be vectorised; on leaving, if the module changed what the
            clients share.
        """
        self.module.train()
        with ExitStack() as stack:
            stack.enter_context(self._dropout.drawing(purpose))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(_no_slow_path())
            self._averages = stack.enter_context(self._layers(self.module, self.linears))
            yield
        now = self._shared()
        changed = [name for name, tensor in self._before.items() if not _is(now.get(name), *tensor)]
        if changed or len(now) != len(self._before):
            what = changed[0] if changed else "its buffers"
            raise UnsupportedError(f"the model changes {what}, which clients side by side would share")

    def begin_step(self, number: int) -> None:
        """Say that forward passes from now on are those of step `number`, from 0."""
        self._averages.next_step()
        self._step = number

    def begin(self) -> None:
        """Forget the forward passes so far; the module holds what all clients start from."""
        self._averages.restart()
        self._before = {name: (tensor, tensor._version) for name, tensor in self._shared().items()}

    def single(self, inputs: tuple[Tensor, ...]) -> Any:
        """Return the outputs for one client with the parameters that the module holds."""
        self._dropout.at(0, 0)
        self._averages.next_forward()
        return self.module(*inputs)

    def alone(self, parameters: Mapping[str, Tensor], inputs: Sequence[Tensor], stream: Tensor) -> Any:
        """Return the outputs for one example, in a batch of its own, under other parameters; for use under a map.

        Args: stream: the number by which dropout draws.
        Raises: UnsupportedError: if the forward pass changes a buffer.
        """
        self._dropout.at(self._step, stream)
        self._averages.next_forward()
        held = dict(chain(self.module.named_parameters(), self.module.named_buffers()))
        given = [parameters.get(name, tensor) for name, tensor in held.items()]
        try:
            outputs, replaced = self._all.call(given, [tensor.unsqueeze(0) for tensor in inputs])
        finally:
            self._dropout.at(0, 0)
        for place in replaced:
            raise UnsupportedError(f"the model changes {list(held)[place]}, which no noise would protect")
        return outputs

    def __call__(self, state: Sequence[Tensor], inputs: Sequence[Tensor], streams: Tensor) -> Any:
        """Return K clients' outputs; their buffers in `state` are changed in place.

        Args: state: (K, *shape) each: parameters, then buffers, in the order of the spec. streams: their numbers, (K,).
        """
        self._averages.next_forward()
        try:
            return self._vectorised(tuple(state), tuple(inputs), streams)
        finally:
            self._dropout.at(0, 0)

    def _one(self, state: tuple[Tensor, ...], inputs: tuple[Tensor, ...], stream: Tensor) -> Any:
        self._dropout.at(self._step, stream)
        outputs, replaced = self._slots.call(state, inputs)
        for place, tensor in replaced.items():
            # A module may put a new tensor in a buffer's place instead of changing it.
            state[place].copy_(tensor)
        return outputs

    def _shared(self) -> Mapping[str, Tensor]:
        tensors = chain(self.module.named_parameters(), self.module.named_buffers())
        return {name: tensor for name, tensor in tensors if name not in set(self._names)}

    def layer_of(self, error: BaseException) -> str:
        """Return which layer an error came out of, in words, or an empty text."""
        names: dict[nn.Module, str] = {layer: name for name, layer in self.module.named_modules()}
        found, trace = "", error.__traceback__
        while trace is not None:
            owner = trace.tb_frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and owner in names:
                found = f"layer {names[owner]} ({type(owner).__name__})" if names[owner] else type(owner).__name__
            trace = trace.tb_next
        return found


def explained(error: Exception, model: BatchedModel, what: str) -> UnsupportedError:
    """Return an error in one line that says which layer, or else `what`, cannot be vectorised and why."""
    line = " ".join(str(error).split())
    reason = next((text for sign, text in _REASONS.items() if sign in line), None)
    where = model.layer_of(error) or what
    return UnsupportedError(f"{where} cannot be vectorised: {reason or f'{type(error).__name__}: {line:.160}'}")


def _refuse_hooks(module: nn.Module) -> None:
    """Refuse hooks on gradients, which would not be called.

    Raises: UnsupportedError: naming what has one.
    """
    for name, part in module.named_modules(prefix="model"):
        if part._backward_hooks or part._backward_pre_hooks:
            raise UnsupportedError(f"{name} ({type(part).__name__}) has hooks on its gradients")
    for name, parameter in module.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise UnsupportedError(f"parameter {name} has hooks on its gradient")


def _is(now: Tensor | None, before: Tensor, version: int) -> bool:
    """Return whether a tensor is still the one that it was, unchanged."""
    return now is before and now._version == version


@contextmanager
def _no_slow_path() -> Iterator[None]:
    """Let an operation without a batching rule be an error, instead of a loop over clients with a warning."""
    switch: Any = torch._C._functorch  # its stubs leave these two out
    before = switch._is_vmap_fallback_enabled()
    switch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        switch._set_vmap_fallback_enabled(before)

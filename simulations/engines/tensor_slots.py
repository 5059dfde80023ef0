"""A module called with other tensors in the place of its own, also where one module has several names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from simulations.engines.batch_trainer import UnsupportedError

__all__ = ["TensorSlots"]


class TensorSlots:
    """Where a module and its parts hold the tensors called `names`; a tied one is held in several places.

    `torch.func.functional_call` leaves a tensor of the call behind in a module that has two names.
    Raises: UnsupportedError: for a module compiled by TorchScript, whose places cannot be set.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
            raise UnsupportedError("the model is compiled by TorchScript, which holds on to its own tensors")
        held: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        places = {id(held[name]): place for place, name in enumerate(names)}
        homes: list[dict[str, Any]] = [home for part in module.modules() for home in (part._parameters, part._buffers)]
        self._module = module
        self._slots = [
            (home, key, places[id(tensor)]) for home in homes for key, tensor in home.items() if id(tensor) in places
        ]

    def call(self, tensors: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Any, dict[int, Tensor]]:
        """Return the module's outputs with `tensors` for its own, and what it has put in whose place by itself."""
        before = [home[key] for home, key, _ in self._slots]
        try:
            for home, key, place in self._slots:
                home[key] = tensors[place]
            outputs = self._module(*inputs)
            return outputs, {at: home[key] for home, key, at in self._slots if home[key] is not tensors[at]}
        finally:
            for (home, key, _), tensor in zip(self._slots, before, strict=True):
                home[key] = tensor

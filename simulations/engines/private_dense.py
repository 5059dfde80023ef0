"""Dense layers whose gradients of examples are never made: an outer product's norm and sum need its factors only.

Goodfellow (2015), arXiv:1510.01799, and Bu et al. (2022), arXiv:2210.00038, for K clients at once: what goes into a
layer is noted, and what comes back is the gradient of a zero that is added to what comes out of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedml_core.replaced_forward import has_forward_of, replaced_forwards
from simulations.engines.private_rows import Outer, Piece, Whole

__all__ = ["DenseLayers", "NotDenseError"]


class NotDenseError(Exception):
    """The model uses its dense layers in a way that is not known here."""


class DenseLayers:
    """The trainable dense layers of a module, while one example passes through it, under a map.

    `able`: whether every trainable parameter belongs to one such layer and to no other.
    """

    def __init__(self, module: nn.Module) -> None:
        trained = {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
        self._layers = {
            layer: name
            for name, layer in module.named_modules()
            if has_forward_of(layer, nn.Linear) and any(id(p) in trained for p in layer.parameters(recurse=False))
        }
        own = [id(p) for layer in self._layers for p in layer.parameters(recurse=False)]
        self.able = len(own) == len(set(own)) and trained <= set(own)
        self._names = {name: place for place, name in enumerate(self._layers.values())}
        self._probes: Sequence[Tensor] = ()
        self._seen: dict[int, Tensor] = {}

    @property
    def numbers(self) -> int:
        """How many numbers one example leaves behind."""
        return sum(layer.weight.shape[0] + layer.weight.shape[1] for layer in self._layers)

    def zeros(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return what is to be added to what comes out of each layer."""
        return tuple(torch.zeros(layer.weight.shape[0], device=device) for layer in self._layers)

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """Let the layers note what goes into them."""
        with replaced_forwards({layer: partial(self._forward, at, layer) for at, layer in enumerate(self._layers)}):
            yield

    @contextmanager
    def noting(self, probes: Sequence[Tensor]) -> Iterator[dict[int, Tensor]]:
        """Add a probe to what comes out of each layer, and give what went in, by the layer's place.

        Raises: NotDenseError: if a layer is called twice, not at all, or with more than one row.
        """
        self._probes, self._seen = probes, {}
        try:
            yield self._seen
        finally:
            self._probes, seen = (), self._seen
        if len(seen) != len(self._layers):
            raise NotDenseError("a dense layer is not used")

    def pieces(self, names: Sequence[str], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Piece]:
        """Return each parameter's gradients of examples.

        Args: inputs, outputs: by layer, what went in (K, b, i), and the gradient of what came out (K, b, o).
        """
        found: list[Piece] = []
        for name in names:
            owner, _, leaf = name.rpartition(".")
            place = self._names[owner]
            found.append(Outer(outputs[place], inputs[place]) if leaf == "weight" else Whole(outputs[place]))
        return found

    def _forward(self, place: int, layer: nn.Module, values: Tensor) -> Tensor:
        assert isinstance(layer, nn.Linear)
        plain = F.linear(values, layer.weight, layer.bias)
        if not self._probes:
            return plain
        if place in self._seen or values.dim() != 2 or len(values) != 1:
            raise NotDenseError("a dense layer is used more than once, or for more than one row")
        self._seen[place] = values[0]
        return plain + self._probes[place]

"""Ways of taking clipped sums that need no other library: by bookkeeping, and by one function for all examples.

`Bookkeeping` is for models of the usual layers: one forward and one backward pass, about the price of a plain step.
`Vmapped` is for everything else that torch can map: it makes every example's gradient, so it is for small models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from clients.gradient_pieces import Piece, Rows, joined
from clients.per_example import (
    Clip,
    Clipped,
    LossOf,
    UnsuitedError,
    clipped_rows,
    differentiate,
    finite_rows,
    kept,
    trainable,
)
from clients.recorded_layers import Recording, recorded_forward
from fedml_core.minibatches import Batch
from fedml_core.replaced_forward import replaced_forwards

__all__ = ["Bookkeeping", "Vmapped"]


class Bookkeeping:
    """Records what goes into each layer and what comes back, and makes the clipped sum of it: no gradient twice."""

    def __init__(self, module: nn.Module, losses: LossOf) -> None:
        self._module, self._losses = module, losses
        self._parameters = list(trainable(module).values())
        self._recording = Recording()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Replace the layers' forward passes by recorded ones.

        Raises: UnsuitedError: if a parameter belongs to a layer that no rule knows.
        """
        with replaced_forwards(self._forwards()):
            try:
                yield
            finally:
                self._recording.begin(0)

    def _forwards(self) -> dict[nn.Module, Callable[..., Any]]:
        anchor = torch.ones((), device=self._parameters[0].device, requires_grad=True)
        found: dict[nn.Module, Callable[..., Any]] = {}
        for name, layer in self._module.named_modules():
            if not any(parameter.requires_grad for parameter in layer.parameters(recurse=False)):
                continue
            forward = recorded_forward(layer, anchor, self._recording)
            if forward is None:
                raise UnsuitedError(f"layer {name or 'of the model'} ({type(layer).__name__}) is none that is recorded")
            found[layer] = forward
        return found

    def clipped(self, batch: Batch, clip: Clip) -> Clipped:
        """Return the clipped sum of one batch."""
        self._recording.begin(len(batch[1]))
        differentiate(self._losses(batch))
        pieces = [self._piece(parameter) for parameter in self._parameters]
        norms = torch.stack([piece.norms() for piece in pieces])
        finite = finite_rows(norms)
        if finite is None:
            factors = clip.factors(norms)
            sums = [self._total(place, piece, factors[place]) for place, piece in enumerate(pieces)]
            return Clipped(sums, factors)
        if not len(finite):
            return Clipped([torch.zeros_like(parameter) for parameter in self._parameters])
        return self.clipped(kept(batch, finite), clip)

    def _piece(self, parameter: nn.Parameter) -> Piece:
        found = self._recording.pieces.get(parameter)
        # A parameter that the loss did not reach.
        return joined(found) if found else Rows(parameter.new_zeros(self._recording.count, 1))

    def _total(self, place: int, piece: Piece, factors: Tensor) -> Tensor:
        parameter = self._parameters[place]
        if parameter not in self._recording.pieces:
            return torch.zeros_like(parameter)
        return piece.total(factors).view(parameter.shape)


class Vmapped:
    """Differentiates one example's loss, mapped over the batch: right for every model, as each example is alone.

    A dropout layer draws from torch's generator, anew for each example.
    """

    def __init__(self, module: nn.Module, losses: LossOf) -> None:
        self._parameters = trainable(module)
        self._loss = _Loss(module, losses)

    def attached(self) -> nullcontext[None]:
        """Return an empty context: nothing is attached."""
        return nullcontext()

    def clipped(self, batch: Batch, clip: Clip) -> Clipped:
        """Return the clipped sum of one batch.

        Raises: UnsuitedError: if torch cannot map the model.
        """
        inputs, targets, weights = batch
        weighting = None if weights is None else 0
        gradient = torch.func.grad(self._loss.of)
        mapped = torch.func.vmap(gradient, in_dims=(None, 0, 0, weighting), randomness="different")
        parameters = {name: parameter.detach() for name, parameter in self._parameters.items()}
        try:
            rows = mapped(parameters, inputs, targets, weights)
        except (RuntimeError, NotImplementedError) as error:
            raise UnsuitedError(f"torch cannot map the model over examples: {' '.join(str(error).split())}") from error
        return clipped_rows([rows[name].detach() for name in parameters], clip)


class _Loss(nn.Module):
    """The loss of one example, with the module inside so that its parameters can be replaced."""

    def __init__(self, module: nn.Module, losses: LossOf) -> None:
        super().__init__()
        self.inner = module
        self._losses = losses

    def forward(self, inputs: tuple[Tensor, ...], targets: Tensor, weights: Tensor | None) -> Tensor:
        """Return the loss of the only example."""
        alone = tuple(tensor.unsqueeze(0) for tensor in inputs)
        return self._losses((alone, targets.unsqueeze(0), None if weights is None else weights.unsqueeze(0)))[0]

    def of(self, parameters: dict[str, Tensor], *example: Any) -> Tensor:
        """Return the loss under other parameters."""
        named = {f"inner.{name}": tensor for name, tensor in parameters.items()}
        made: Tensor = torch.func.functional_call(self, named, example)
        return made

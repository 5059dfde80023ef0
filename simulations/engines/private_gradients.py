"""Gradients of K clients' examples, each taken as if the example were alone: nothing mixes it with another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from simulations.engines.batch_trainer import UnsupportedError
from simulations.engines.batched_layers import Averages
from simulations.engines.batched_linear import Linears
from simulations.engines.batched_model import BatchedModel
from simulations.engines.private_dense import DenseLayers, NotDenseError
from simulations.engines.private_rows import Piece, Places, Whole

__all__ = ["ExampleGradients", "layers_of_examples"]

_MOST_COLUMNS = 1 << 31  # so that no two examples of a chunk draw dropout by one number
_TOLERANCE = 1e-3
_NOTHING = 1e-9  # norms of products are rounded up, those of no gradient at all, too


@contextmanager
def layers_of_examples(module: nn.Module, _: Linears) -> Iterator[Averages]:
    """Leave layers as they are: the faster rules are for one map, and a private model has no layer that needs one."""
    yield Averages(module)


class ExampleGradients:
    """Differentiates weight x loss of each example with respect to its own client's parameters.

    Where all that is trained are dense layers, used once, gradients are products whose factors are enough; that is
    tried out on a few examples first, against gradients that are made. Otherwise they are made, by two maps.

    Args: names: of the parameters, in the order in which they are given. loss: the task's.
    """

    def __init__(
        self, model: BatchedModel, names: Sequence[str], loss: Callable[[Any, Tensor], Tensor], device: torch.device
    ) -> None:
        self._model, self._names, self._loss, self._device = model, list(names), loss, device
        self._dense = DenseLayers(model.module)
        self._factored, self._settled = self._dense.able, not self._dense.able
        self._whole = _mapped(torch.func.grad(self._one), given=1)
        self._factors = _mapped(torch.func.grad(self._probed, has_aux=True), given=2)

    def settle(self, parameters: Sequence[Tensor], places: Places) -> None:
        """Choose the way, once and for all: `places` are the first examples of clients, three of each at most."""
        if self._settled:
            return
        self._settled = True
        made = self._made(parameters, places)
        try:
            self._factored = _same(self._products(parameters, places), made)
        except NotDenseError:
            self._factored = False

    @property
    def numbers(self) -> int:
        """How many numbers the gradients of one example take."""
        if self._factored:
            return self._dense.numbers
        return sum(parameter.numel() for parameter in self._model.module.parameters() if parameter.requires_grad)

    def __call__(self, parameters: Sequence[Tensor], places: Places) -> Sequence[Piece]:
        """Return a piece for each parameter.

        Args: parameters: (K, *shape) each.
        Raises: UnsupportedError: if the loss is not one an example, or the model changes a buffer or its ways.
        """
        if not self._factored:
            return self._made(parameters, places)
        try:
            return self._products(parameters, places)
        except NotDenseError as error:
            raise UnsupportedError(f"{error} at some steps, and once at others") from error

    def _made(self, parameters: Sequence[Tensor], places: Places) -> list[Piece]:
        found = self._whole(*self._given(parameters, places))
        return [Whole(gradient) for gradient in found]

    def _products(self, parameters: Sequence[Tensor], places: Places) -> list[Piece]:
        with self._dense.replaced():
            found = self._factors(self._dense.zeros(self._device), *self._given(parameters, places))
        outputs, inputs = found
        return self._dense.pieces(self._names, inputs, outputs)

    def _given(self, parameters: Sequence[Tensor], places: Places) -> tuple[Any, ...]:
        clients = torch.arange(len(parameters[0]), device=self._device)[:, None] * _MOST_COLUMNS
        columns = torch.arange(places.columns.start, places.columns.stop, device=self._device)
        given = tuple(parameter.detach() for parameter in parameters)
        return given, places.inputs, places.targets, places.weights, clients + columns

    def _probed(self, probes: tuple[Tensor, ...], *given: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        with self._dense.noting(probes) as seen:
            loss = self._one(*given)
        return loss, tuple(seen[place] for place in range(len(probes)))

    def _one(self, parameters: tuple[Tensor, ...], *example: Any) -> Tensor:
        inputs, target, weight, stream = example
        outputs = self._model.alone(dict(zip(self._names, parameters, strict=True)), inputs, stream)
        losses = self._loss(outputs, target.unsqueeze(0))
        if not isinstance(losses, Tensor) or losses.shape != (1,):
            raise UnsupportedError("private training needs one loss an example, of shape (batch,)")
        weighted: Tensor = losses[0] * weight.to(losses.dtype)
        return weighted


def _mapped(gradient: Callable[..., Any], *, given: int) -> Callable[..., Any]:
    """Return a function of one example, mapped over examples and then over clients.

    `given`: how many of its arguments are not an example's own; of these, the last is a client's own.
    """
    example = (0, 0, 0, 0)
    inner = torch.func.vmap(gradient, in_dims=(*[None] * given, *example), randomness="error")
    found: Callable[..., Any] = torch.func.vmap(inner, in_dims=(*[None] * (given - 1), 0, *example), randomness="error")
    return found


def _same(found: Sequence[Piece], made: Sequence[Piece]) -> bool:
    """Return whether both are the same gradients, beyond rounding."""
    for one, other in zip(found, made, strict=True):
        norms, expected = one.norms(), other.norms()
        ones = torch.ones_like(expected)
        apart = (one.total(ones) - other.total(ones)).norm()
        most = _TOLERANCE * expected.sum() + _NOTHING
        if not bool((norms - expected).abs().sum() <= most) or not bool(apart <= most):
            return False
    return True

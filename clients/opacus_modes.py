"""Opacus's ways of taking every example's gradient, attached to a module as it is: hooks, functorch, ghost clipping.

Yousefpour et al. (2021), arXiv:2109.12298; Li et al. (2022), arXiv:2110.05679, for ghost clipping. Only gradients come
from Opacus: clipping, sampling, noise and accounts are ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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
from clients.recorded_layers import linear_pieces
from fedml_core.minibatches import Batch

__all__ = ["OpacusGhost", "OpacusHooks"]


class OpacusHooks:
    """Makes every example's gradient, by Opacus's formulas for each layer or, if `functorch`, by torch's mapping."""

    def __init__(self, module: nn.Module, losses: LossOf, *, functorch: bool = False) -> None:
        self._module, self._losses, self._functorch = module, losses, functorch
        self._parameters: list[Any] = list(trainable(module).values())

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach the hooks.

        Raises: UnsuitedError: if Opacus refuses the module.
        """
        from opacus.grad_sample import GradSampleHooks

        made = _made(GradSampleHooks, self._module, loss_reduction="sum", force_functorch=self._functorch)
        with _held(made, self._parameters):
            yield

    def clipped(self, batch: Batch, clip: Clip) -> Clipped:
        """Return the clipped sum of one batch."""
        _forget(self._module, self._parameters)
        differentiate(self._losses(batch))
        count = len(batch[1])
        rows = [_gradients(parameter, count) for parameter in self._parameters]
        _forget(self._module, self._parameters)
        return clipped_rows(rows, clip)


class OpacusGhost:
    """Takes norms without gradients, then the clipped sum by a second backward pass; for flat clipping."""

    def __init__(self, module: nn.Module, losses: LossOf) -> None:
        self._module, self._losses = module, losses
        self._parameters: list[Any] = list(trainable(module).values())
        self._hooks: Any = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach the hooks.

        Raises: UnsuitedError: if Opacus refuses the module.
        """
        from opacus.grad_sample import GradSampleHooksFastGradientClipping

        self._hooks = _made(GradSampleHooksFastGradientClipping, self._module, loss_reduction="sum")
        # Opacus's own norms of dense layers are too small where terms cancel or vanish, and it has none for 4-d inputs.
        self._hooks.NORM_SAMPLERS = {**self._hooks.NORM_SAMPLERS, nn.Linear: _dense_norms}
        with _held(self._hooks, self._parameters):
            yield

    def clipped(self, batch: Batch, clip: Clip) -> Clipped:
        """Return the clipped sum of one batch.

        Raises: UnsuitedError: for clipping by layer, or a parameter whose norms Opacus does not give.
        """
        if clip.apart:
            raise UnsuitedError("ghost clipping cuts whole gradients only; take flat clipping")
        _forget(self._module, self._parameters)
        losses = self._losses(batch)
        differentiate(losses, again=True)
        norms = torch.stack([_norms(parameter, len(losses)) for parameter in self._parameters])
        finite = finite_rows(norms)
        if finite is not None:
            _forget(self._module, self._parameters)
            if not len(finite):
                return Clipped([torch.zeros_like(parameter) for parameter in self._parameters])
            return self.clipped(kept(batch, finite), clip)
        factors = clip.factors(norms)
        unknown = [parameter for parameter in self._parameters if not hasattr(parameter, "_norm_sample")]
        self._again(torch.dot(losses, factors[0].to(losses.dtype)))
        if any(bool((parameter.grad != 0).any()) for parameter in unknown):
            raise UnsuitedError("Opacus gives no norms for a parameter that examples move; take another way")
        sums = [parameter.grad.clone() for parameter in self._parameters]
        _forget(self._module, self._parameters)
        return Clipped(sums, factors)

    def _again(self, loss: Tensor) -> None:
        for parameter in self._parameters:
            parameter.grad = None
        self._hooks.disable_hooks()
        try:
            differentiate(loss)
        finally:
            self._hooks.enable_hooks()
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def _dense_norms(layer: nn.Linear, inputs: list[Tensor], gradient: Tensor) -> dict[nn.Parameter, Tensor]:
    found = linear_pieces(layer, inputs[0].to(gradient.dtype), gradient)
    return {parameter: piece.norms() for parameter, piece in found.items()}


def _made(kind: Any, module: nn.Module, **arguments: Any) -> Any:
    try:
        return kind(module, **arguments)
    except (NotImplementedError, ValueError) as error:
        raise UnsuitedError(f"Opacus cannot take the model: {' '.join(str(error).split())}") from error


@contextmanager
def _held(hooks: Any, parameters: list[Any]) -> Iterator[None]:
    """Let the hooks work, and leave no trace of them in the module."""
    with warnings.catch_warnings():
        # Opacus asks for an autocast to float32, and the layer nearest to the data has inputs without gradients.
        warnings.filterwarnings("ignore", message="In CPU autocast, but the target dtype", category=UserWarning)
        warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
        try:
            yield
        finally:
            module = hooks._module
            hooks.cleanup()
            _forget(module, ())
            for parameter in parameters:
                parameter.grad = None


def _gradients(parameter: Any, count: int) -> Tensor:
    rows = parameter.grad_sample
    if rows is None:
        return torch.zeros((count, *parameter.shape), dtype=parameter.dtype, device=parameter.device)
    if not isinstance(rows, Tensor) or len(rows) != count:
        raise UnsuitedError("Opacus cannot tell which example a gradient is of; keep examples in the first dimension")
    return rows.detach()


def _norms(parameter: Any, count: int) -> Tensor:
    norms = getattr(parameter, "_norm_sample", None)
    if norms is None:
        return torch.zeros(count, dtype=parameter.dtype, device=parameter.device)
    if norms.shape != (count,):
        raise UnsuitedError("Opacus cannot tell which example a gradient is of; keep examples in the first dimension")
    kept_norms: Tensor = norms.detach()
    return kept_norms


def _forget(module: nn.Module, parameters: Any) -> None:
    """Drop what a backward pass left, also one that failed half way."""
    for parameter in parameters:
        parameter.grad, parameter.grad_sample, parameter._forward_counter = None, None, 0
        for name in ("_norm_sample", "_current_grad_sample"):
            vars(parameter).pop(name, None)
    for part in module.modules():
        for name in ("activations", "max_batch_len"):
            vars(part).pop(name, None)

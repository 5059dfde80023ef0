"""Losses by hand: the gradient at the outputs step by step, each example's loss for all steps at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fedml_core.task import Loss, cross_entropy, squared_error
from simulations.engines.batch_trainer import UnsupportedError

# Sums of exponentials outside would lose digits or overflow; then the largest output is subtracted first.
_SAFE = 1e15


class Errors(Protocol):
    """The loss of R rows, of which each step handles a slice."""

    def at(self, rows: slice, outputs: Tensor, error: Tensor) -> None:
        """Fill `error` (r, c) with the gradient of the step's weighted mean loss with respect to `outputs` (r, c)."""
        ...

    def losses(self, outputs: Tensor) -> Tensor:
        """Return each row's loss, (R,), after `at` has seen all `outputs` (R, c)."""
        ...


class CrossEntropy:
    """Cross-entropy of class targets.

    Source: p - onehot(target), with p from one exponential a logit, one product with ones and one scaling: several
        times faster than torch's softmax over a handful of classes.
    """

    def __init__(self, targets: Tensor, shares: Tensor, classes: int) -> None:
        if targets.dtype != torch.int64 or targets.dim() != 1:
            raise UnsupportedError(
                f"cross_entropy is fused for int64 targets of shape (n,), got {targets.dtype} {tuple(targets.shape)}"
            )
        low, high = (int(bound) for bound in targets.aminmax())
        if low < 0 or high >= classes:
            raise UnsupportedError(f"cross_entropy is fused for targets 0 to {classes - 1}, got {low} to {high}")
        self._targets, self._shares, self._minus = targets.unsqueeze(1), shares, -shares.unsqueeze(1)
        self._sums, self._tops = torch.empty_like(shares), torch.zeros_like(shares)
        self._scales, self._ones = torch.empty_like(shares), torch.ones(classes)

    def at(self, rows: slice, outputs: Tensor, error: Tensor) -> None:
        """Fill `error` with (softmax(outputs) - onehot) times each row's share."""
        sums = self._sums[rows]
        torch.exp(outputs, out=error)
        torch.mv(error, self._ones, out=sums)
        low, high = torch.aminmax(sums)
        # Written so that NaN is not safe.
        if not (low.item() > 1 / _SAFE and high.item() < _SAFE):
            tops = outputs.amax(dim=1)
            torch.exp(outputs - tops.unsqueeze(1), out=error)
            torch.mv(error, self._ones, out=sums)
            self._tops[rows] = tops
        scales = torch.div(self._shares[rows], sums, out=self._scales[rows])
        error.mul_(scales.unsqueeze(1)).scatter_add_(1, self._targets[rows], self._minus[rows])

    def losses(self, outputs: Tensor) -> Tensor:
        """Return log sum exp(outputs) - outputs[target]."""
        return self._sums.log().add_(self._tops).sub_(outputs.gather(1, self._targets).squeeze(1))


class SquaredError:
    """Mean squared error of targets with as many numbers an example as there are outputs."""

    def __init__(self, targets: Tensor, shares: Tensor, width: int) -> None:
        if targets.dtype not in (torch.float32, torch.int64):
            raise UnsupportedError(f"squared_error is fused for float32 or int64 targets, got {targets.dtype}")
        if targets[0].numel() != width:
            raise UnsupportedError(f"squared_error is fused for {width} targets an example, got {targets[0].numel()}")
        self._targets = targets.reshape(len(targets), width).float()
        self._scales = shares.unsqueeze(1) * (2 / width)

    def at(self, rows: slice, outputs: Tensor, error: Tensor) -> None:
        """Fill `error` with 2 (outputs - targets) / width times each row's share."""
        torch.sub(outputs, self._targets[rows], out=error).mul_(self._scales[rows])

    def losses(self, outputs: Tensor) -> Tensor:
        """Return the mean over an example's numbers."""
        return (outputs - self._targets).square_().mean(dim=1)


_ERRORS: dict[Loss, Callable[[Tensor, Tensor, int], Errors]] = {
    cross_entropy: CrossEntropy,
    squared_error: SquaredError,
}


def errors_of(loss: Loss) -> Callable[[Tensor, Tensor, int], Errors]:
    """Return what makes the errors of `loss` from targets (R, ...), shares (R,) and the number of outputs.

    Raises: UnsupportedError: if no gradient of it was written by hand.
    """
    try:
        found = _ERRORS.get(loss)
    except TypeError:
        found = None
    if found is None:
        name = getattr(loss, "__name__", type(loss).__name__)
        raise UnsupportedError(f"the loss {name} is not fused; cross_entropy and squared_error are")
    return found

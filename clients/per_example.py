"""Clipping example by example: how long each example's gradient may be, and sums of gradients that were cut to it.

Abadi et al. (2016), arXiv:1607.00133. One clipped sum can be taken in several ways, which differ in time and memory
only; each is a `GradientMode`. An example whose gradient is not finite adds nothing, so that it can neither end a
training nor be seen in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedml_core.checks import require_number
from fedml_core.errors import TaskError
from fedml_core.forward import guarded
from fedml_core.minibatches import Batch

__all__ = [
    "AdaptiveClipping",
    "Clip",
    "Clipped",
    "Clipping",
    "FlatClipping",
    "GradientMode",
    "LossOf",
    "PerLayerClipping",
    "UnsuitedError",
    "clipped_rows",
    "differentiate",
    "finite_rows",
    "kept",
    "lengths",
    "losses_of",
    "trainable",
    "weighted",
]

LossOf = Callable[[Batch], Tensor]
"""Returns the losses of a batch, one an example."""

_INWARDS = 1 - 2.0**-12  # more than float32 norms and products of float32 can be off
_LONGEST = 1 << 14  # squares that are added up in one go; with more, small ones would vanish beside a large one


class UnsuitedError(TaskError):
    """This way of taking clipped sums cannot do that model; the message says why. Another way may."""


@dataclass(frozen=True)
class Clip:
    """One step's clipping: gradients are cut to `norm`, together or, if `apart`, each parameter to an equal share.

    The shares are of the square: k parameters are cut to norm / sqrt(k) each, so that all together are within `norm`.
    `counted`: somebody wants to know how many were not cut.
    """

    norm: float
    apart: bool = False
    counted: bool = False

    def factors(self, norms: Tensor) -> Tensor:
        """Return what each gradient is multiplied by, (k, n), given finite norms by parameter and example (k, n)."""
        if self.apart:
            return _shortening(norms, self.norm / math.sqrt(len(norms)))
        return _shortening(torch.linalg.vector_norm(norms, dim=0), self.norm).expand_as(norms)


@dataclass(frozen=True)
class Clipped:
    """A sum of clipped gradients: one tensor for each parameter, and what each was multiplied by, (k, n)."""

    sums: Sequence[Tensor] = field(repr=False)
    factors: Tensor | None = field(default=None, repr=False)

    @property
    def unclipped(self) -> int:
        """Return how many examples needed no clipping; one that is not finite did."""
        return 0 if self.factors is None else int((self.factors >= 1).all(dim=0).sum())


@dataclass(frozen=True)
class FlatClipping:
    """Cuts each example's whole gradient to an L2 norm of `clip_norm` (> 0): the usual way."""

    clip_norm: float

    def __post_init__(self) -> None:
        """Check the norm."""
        require_number("clip_norm", self.clip_norm, at_least=1e-12, at_most=1e12)

    def clip(self, norm: float) -> Clip:
        """Return the clipping of a step."""
        return Clip(norm)


@dataclass(frozen=True)
class PerLayerClipping:
    """Cuts each parameter's part to clip_norm / sqrt(number of parameters): for layers of very different scales."""

    clip_norm: float

    def __post_init__(self) -> None:
        """Check the norm."""
        require_number("clip_norm", self.clip_norm, at_least=1e-12, at_most=1e12)

    def clip(self, norm: float) -> Clip:
        """Return the clipping of a step."""
        return Clip(norm, apart=True)


@dataclass(frozen=True)
class AdaptiveClipping:
    """Moves the norm, step by step, towards the one that a share `quantile` of the gradients is within.

    It learns the share from a noised count, which the same noise_multiplier pays for: the gradients get more noise,
    (z^-2 - (2 count_noise)^-2)^(-1/2) instead of z. Every training begins at `clip_norm` anew.

    Args: clip_norm: > 0, of the first step. quantile: the wanted share of gradients that need no clipping.
        learning_rate: > 0. count_noise: > z/2, the standard deviation of the count's noise, in examples.
        least, most: what the norm stays within.
    Source: Andrew et al. (2021), arXiv:1905.03871, Algorithm 1, whose units are clients.
    """

    clip_norm: float
    quantile: float = 0.5
    learning_rate: float = 0.2
    count_noise: float = 10.0
    least: float = 1e-6
    most: float = 1e6

    def __post_init__(self) -> None:
        """Check the numbers."""
        require_number("least", self.least, at_least=1e-12, at_most=1e12)
        require_number("most", self.most, at_least=self.least, at_most=1e12)
        require_number("clip_norm", self.clip_norm, at_least=self.least, at_most=self.most)
        require_number("quantile", self.quantile, above=0, below=1)
        require_number("learning_rate", self.learning_rate, above=0, at_most=10)
        require_number("count_noise", self.count_noise, above=0)

    def clip(self, norm: float) -> Clip:
        """Return the clipping of a step."""
        return Clip(norm, counted=True)

    def next_norm(self, norm: float, share: float) -> float:
        """Return the norm of the next step, given the noised share of gradients that were within this one's."""
        # A share that is far out is noise, and would throw the norm as far.
        moved = -self.learning_rate * (min(max(share, 0.0), 1.0) - self.quantile)
        return min(max(norm * math.exp(moved), self.least), self.most)


Clipping = FlatClipping | PerLayerClipping | AdaptiveClipping


class GradientMode(Protocol):
    """A way of taking clipped sums of one module's gradients."""

    def attached(self) -> AbstractContextManager[None]:
        """Return a context in which the module may be used for `clipped`, and for nothing else.

        Raises: UnsuitedError: if the module has something that this way cannot do.
        """
        ...

    def clipped(self, batch: Batch, clip: Clip) -> Clipped:
        """Return the sum over a batch (of at least one example) of the clipped gradients of weight x loss.

        Guarantees: one example moves the sum by an L2 norm of at most clip.norm, whatever it holds.
        """
        ...


def clipped_rows(rows: Sequence[Tensor], clip: Clip) -> Clipped:
    """Return the clipped sum of gradients that are there example by example: (n, *shape) for each parameter.

    Guarantees: each example adds a vector of L2 norm at most clip.norm; one that is not finite adds nothing.
    """
    norms = torch.stack([lengths(gradient) for gradient in rows])
    finite = finite_rows(norms)
    if finite is not None:
        if not len(finite):
            return Clipped([torch.zeros_like(gradient[0]) for gradient in rows])
        return clipped_rows([gradient[finite] for gradient in rows], clip)
    factors = clip.factors(norms)
    return Clipped([weighted(gradient, f) for gradient, f in zip(rows, factors, strict=True)], factors)


def finite_rows(norms: Tensor) -> Tensor | None:
    """Return which examples have finite norms in all of (k, n), or None if all have."""
    # A finite sum proves it; in float64, where finite float32 numbers cannot add up to infinity.
    total = norms.sum() if norms.device.type == "mps" else norms.sum(dtype=torch.float64)
    if math.isfinite(total.item()):
        return None
    return torch.isfinite(norms).all(dim=0).nonzero().squeeze(1)


def kept(batch: Batch, rows: Tensor) -> Batch:
    """Return some examples of a batch."""
    inputs, targets, weights = batch
    return tuple(t[rows] for t in inputs), targets[rows], None if weights is None else weights[rows]


def weighted(rows: Tensor, factors: Tensor) -> Tensor:
    """Return the sum of the rows (n, *shape), each times its factor (n,)."""
    return (factors @ rows.reshape(len(rows), -1)).view(rows.shape[1:])


def losses_of(forward: Callable[[Batch], tuple[Tensor, Any]]) -> LossOf:
    """Return the losses of `forward`, each times its example's weight, once they are one an example.

    Raises: TaskError: for a scalar loss, of which nobody can tell whose it is.
    """

    def losses(batch: Batch) -> Tensor:
        found, _ = forward(batch)
        if found.shape != (len(batch[1]),):
            raise TaskError("private training needs one loss an example, of shape (batch,); got a scalar loss")
        return found if batch[2] is None else found * batch[2].to(found.dtype)

    return losses


def _backward(losses: Tensor, again: bool) -> None:
    # Summed, not given ones as a gradient: torch would import sympy to compare the shapes.
    losses.sum().backward(retain_graph=again)


def differentiate(losses: Tensor, *, again: bool = False) -> None:
    """Run the backward pass of the losses' sum; `again`: another one will follow.

    Raises: UnsuitedError: if the model, or what is attached to it, fails.
    """
    guarded(_backward, "the backward pass", "in private training", UnsuitedError)(losses, again)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that training changes, by name, in the order of a model's vector."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def lengths(rows: Tensor) -> Tensor:
    """Return the norms (n,) of gradients (n, *shape), at most 2^-13 too small wherever clipping could notice."""
    flat = rows.reshape(len(rows), -1)
    if flat.shape[1] <= _LONGEST:
        return torch.linalg.vector_norm(flat, dim=1)  # type: ignore[no-any-return]
    parts = [torch.linalg.vector_norm(part, dim=1) for part in flat.split(_LONGEST, dim=1)]
    return torch.linalg.vector_norm(torch.stack(parts), dim=0)  # type: ignore[no-any-return]


def _shortening(norms: Tensor, bound: float) -> Tensor:
    return (bound * _INWARDS / norms).clamp_(max=1)

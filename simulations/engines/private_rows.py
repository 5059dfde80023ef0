"""Clipped sums of K clients' gradients, example by example: bounded whatever the examples hold, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clients import gradient_pieces
from clients.per_example import Clip
from fedml_core.data import Examples

__all__ = ["BatchTable", "ClippedSums", "Gradients", "Outer", "Piece", "Places", "Whole"]


@dataclass(frozen=True)
class BatchTable:
    """K batches as one table: `places` (K, B) into packed examples, of which the first `counts[k]` are client k's.

    The rest of a row is an example of the client's that counts for nothing.
    """

    places: NDArray[np.int64] = field(repr=False)
    counts: NDArray[np.int64] = field(repr=False)

    @classmethod
    def of(cls, samples: Sequence[NDArray[np.int64]], offsets: NDArray[np.int64]) -> BatchTable:
        """Return the table of the samples, each of a client whose examples begin at its offset."""
        counts = np.array([len(sample) for sample in samples], dtype=np.int64)
        places = np.repeat(offsets[: len(samples), None], int(counts.max(initial=0)), axis=1)
        for place, sample in enumerate(samples):
            places[place, : len(sample)] += sample
        return cls(places, counts)

    @property
    def counted(self) -> NDArray[np.bool_]:
        """Return (K, B): which places count."""
        return np.arange(self.places.shape[1]) < self.counts[:, None]

    def examples(self, packed: Examples, columns: range | None = None) -> Places:
        """Return the examples of some columns, or of all."""
        columns = range(self.places.shape[1]) if columns is None else columns
        table = torch.from_numpy(self.places[:, columns.start : columns.stop]).to(packed.targets.device)

        def at(column: Tensor) -> Tensor:
            return column.index_select(0, table.reshape(-1)).view(*table.shape, *column.shape[1:])

        weights = torch.ones(table.shape, device=table.device) if packed.weights is None else at(packed.weights).float()
        return Places(tuple(at(column) for column in packed.inputs), at(packed.targets), weights, columns)


@dataclass(frozen=True)
class Places:
    """Some columns of K batches: inputs and targets (K, b, ...), weights (K, b), and the numbers of the columns."""

    inputs: tuple[Tensor, ...] = field(repr=False)
    targets: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)
    columns: range


class Piece(Protocol):
    """The gradients of K clients' examples with respect to one parameter: (K, b, *shape)."""

    def norms(self) -> Tensor:
        """Return their L2 norms (K, b), never too small by more than clipping stays inside by."""
        ...

    def where(self, finite: Tensor) -> Piece:
        """Return them with zeros in the place of those that are not `finite` (K, b)."""
        ...

    def total(self, factors: Tensor) -> Tensor:
        """Return each client's sum of them, each times its factor (K, b): (K, size)."""
        ...


@dataclass(frozen=True)
class Whole:
    """Gradients that are there."""

    gradients: Tensor = field(repr=False)

    def norms(self) -> Tensor:
        """Return their norms."""
        return gradient_pieces.Rows(self.gradients.flatten(0, 1)).norms().view(self.gradients.shape[:2])

    def where(self, finite: Tensor) -> Whole:
        """Return them without what is not finite."""
        return Whole(torch.where(finite[..., None], self.gradients.flatten(2), 0.0))

    def total(self, factors: Tensor) -> Tensor:
        """Return the weighted sums."""
        return torch.bmm(factors.unsqueeze(1), self.gradients.flatten(2)).squeeze(1)


@dataclass(frozen=True)
class Outer:
    """Products of a column (K, b, o) and a row (K, b, i), which are not made."""

    columns: Tensor = field(repr=False)
    across: Tensor = field(repr=False)

    def norms(self) -> Tensor:
        """Return the products of the norms."""
        columns = gradient_pieces.Rows(self.columns.flatten(0, 1))
        return gradient_pieces.Outer(columns, self.across.flatten(0, 1)).norms().view(self.columns.shape[:2])

    def where(self, finite: Tensor) -> Outer:
        """Return them without what is not finite."""
        at = finite[..., None]
        return Outer(torch.where(at, self.columns, 0.0), torch.where(at, self.across, 0.0))

    def total(self, factors: Tensor) -> Tensor:
        """Return one product for each client."""
        return torch.bmm((self.columns * factors[..., None]).transpose(1, 2), self.across).flatten(1)


Gradients = Callable[[Sequence[Tensor], Places], Sequence[Piece]]
"""Returns each example's gradient of weight x loss under its client's parameters, a piece for each parameter."""


@dataclass(frozen=True)
class ClippedSums:
    """Takes the clipped sums of steps. `clip`: cuts to 1; a client's own norm is divided out first.

    `width`: how many examples of each client are differentiated at once.
    """

    gradients: Gradients = field(repr=False)
    clip: Clip
    width: int

    def of(
        self, parameters: Sequence[Tensor], examples: Examples, rows: BatchTable, norms: Tensor
    ) -> tuple[Tensor, NDArray[np.int64]]:
        """Return the sums (K, p), and how many of each client's examples needed no clipping (K,).

        Guarantees: one example moves its own client's sum by an L2 norm of at most norms[k], whatever it holds, and no
            other client's. One whose gradient is not finite moves none.
        """
        device, clients = parameters[0].device, len(parameters[0])
        total = torch.zeros(clients, sum(p[0].numel() for p in parameters), device=device)
        unclipped = np.zeros(clients, dtype=np.int64)
        counted = torch.from_numpy(rows.counted)
        bounds = norms.to(device, torch.float32)[:, None]
        for start in range(0, rows.places.shape[1], self.width):
            columns = range(start, min(start + self.width, rows.places.shape[1]))
            found = self.gradients(parameters, rows.examples(examples, columns))
            sums, whole = self._clipped(found, counted[:, columns.start : columns.stop].to(device), bounds)
            # Parts of a batch add up in float64, where rounding tells next to nothing; Apple's GPUs have none.
            wide = total if not start or device.type == "mps" else total.double()
            total = wide.add_(torch.cat(sums, dim=1))
            unclipped += whole.cpu().numpy()
        return total, unclipped

    def _clipped(self, pieces: Sequence[Piece], counted: Tensor, bounds: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return each parameter's sums (K, size), and how many examples of each client were left whole."""
        norms = torch.stack([piece.norms() for piece in pieces])
        finite = torch.isfinite(norms).all(dim=0)
        if not bool(finite.all()):
            pieces = [piece.where(finite) for piece in pieces]
            norms = torch.where(finite, norms, 0.0)
        scaled = self.clip.factors((norms / bounds).flatten(1)).view(norms.shape)
        keeps = counted & finite
        factors = torch.where(keeps, scaled, 0.0)
        whole = ((scaled >= 1).all(dim=0) & keeps).sum(dim=1)
        return [piece.total(each) for piece, each in zip(pieces, factors, strict=True)], whole

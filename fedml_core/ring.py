"""Updates as ring vectors and back: where a secure sum's whole numbers meet the model's float32 vector."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedml_core.accumulate import Accumulator
from fedml_core.errors import ConfigError, SecureAggregationError, StrategyError
from fedml_core.privacy.noised_encoding import NoisedDecoded, NoisedEncoding
from fedml_core.randomness import Key, key_bytes
from fedml_core.secagg.encoding import Decoded, RingEncoding
from fedml_core.secagg.masks import ring_type
from fedml_core.secagg.scalars import Count, Measure, Scalar
from fedml_core.secagg.secrets import SecretBytes
from fedml_core.update import Total, Update, check_update

__all__ = ["Encoding", "RingSum", "encoding_from_table", "encoding_to_table", "ring_rows", "summed", "total_of"]

Encoding = RingEncoding | NoisedEncoding
"""What a secure sum's vectors mean: reals with their scalars, or integers to which each client added its noise."""


def encoding_to_table(encoding: Encoding) -> dict[str, Any]:
    """Return what both sides must know of an encoding, beside the ring's bits, as plain values."""
    if isinstance(encoding, NoisedEncoding):
        return encoding.to_table()
    scalars = [
        ["count", scalar.name, scalar.most] if isinstance(scalar, Count) else ["measure", scalar.name, scalar.scale]
        for scalar in encoding.scalars
    ]
    weight = encoding.max_weight
    return {"clip": encoding.clip, "clients": encoding.clients, "max_weight": weight, "scalars": scalars}


def encoding_from_table(table: Mapping[str, Any], bits: int) -> Encoding:
    """Return the encoding that `encoding_to_table` described.

    Raises: SecureAggregationError: if it is none.
    """
    try:
        encoding = NoisedEncoding.from_table(table) if "noise" in table else _reals_from_table(table, bits)
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise SecureAggregationError(f"the secure sum's encoding cannot be used: {error}") from error
    if encoding_to_table(encoding) != dict(table) or encoding.bits != bits:
        raise SecureAggregationError("the secure sum's encoding holds what this version does not know")
    return encoding


def _reals_from_table(table: Mapping[str, Any], bits: int) -> RingEncoding:
    scalars: list[Scalar] = []
    for kind, name, size in table["scalars"]:
        scalars.append({"count": Count, "measure": Measure}[kind](name, size))
    return RingEncoding(
        table["clip"], table["clients"], bits=bits, max_weight=table["max_weight"], scalars=tuple(scalars)
    )


def summed(encoding: Encoding) -> tuple[str, ...]:
    """Return the names of what is summed beside the update; none where clients add noise."""
    return tuple(scalar.name for scalar in encoding.scalars)


def ring_rows(encoding: Encoding, update: Update, keys: Sequence[SecretBytes]) -> NDArray[Any]:
    """Return the ring vectors of one client's update, or of K: (K, length).

    The values of an update are already weighted; the encoding weighs, so they are divided by their weight first.
    Metrics beyond their range are taken for its end; counts and weights beyond theirs are refused. Where clients add
    noise, metrics are left out, and rounding and noise take fresh keys instead of `keys`.
    Args: keys: of the rounding, 32 bytes for each.
    Raises: SecureAggregationError: if anything is not finite, out of range, or not what the encoding sums.
    """
    values, weight = torch.atleast_2d(update.values), torch.atleast_1d(update.weight)
    if isinstance(encoding, NoisedEncoding):
        return encoding.encode_rows(values.numpy(force=True), weight.tolist())
    if bool((weight != 1).any()):
        values = values / weight.unsqueeze(-1).to(values)
    wanted = {scalar.name for scalar in encoding.scalars}
    if update.sums.keys() != wanted:
        raise SecureAggregationError(
            f"this client's task reports {', '.join(sorted(update.sums))}, the run sums {', '.join(sorted(wanted))}; "
            "install the same task on both sides"
        )
    scalars = {
        scalar.name: _in_range(scalar, torch.atleast_1d(update.sums[scalar.name])) for scalar in encoding.scalars
    }
    return encoding.encode_rows(values.numpy(force=True), keys, weights=weight.tolist(), scalars=scalars)


def _in_range(scalar: Scalar, values: Tensor) -> list[float]:
    if isinstance(scalar, Count):
        return [float(value) for value in values]
    # A NaN stays one, and is refused.
    return [
        min(max(float(value), -scalar.scale), scalar.scale) if math.isfinite(value) else math.nan for value in values
    ]


def total_of(decoded: Decoded) -> Total:
    """Return what a decoded sum is to a strategy; `facts` tells how many coordinates were clipped, and the noise."""
    values = torch.from_numpy(decoded.values.astype(np.float32))
    facts = {"clipped": float(decoded.clipped)}
    if isinstance(decoded, NoisedDecoded):
        facts["noise"] = decoded.noise
    return Total(values, decoded.weight, decoded.count, dict(decoded.scalars), facts)


class RingSum(Accumulator):
    """The sum of updates as ring vectors, for simulations: exact, so that it is the same in any order and split.

    Trust: whoever runs it sees every update. Masks, where they are drawn, are added to its total by whoever runs it.
    Args: rounding: the key of the rounding of each client's vector, completed by the client's number.
    """

    def __init__(self, encoding: Encoding, size: int, rounding: tuple[Key, ...]) -> None:
        super().__init__(size, encoding.max_weight or 1.0)
        self.encoding, self._rounding = encoding, rounding
        self.ring: NDArray[Any] = np.zeros(encoding.length(size), ring_type(encoding.bits))

    def add(self, update: Update, clients: Sequence[int] = ()) -> None:
        """Add an update of one client, or of K, whose numbers are `clients`."""
        check_update(update, self.size, self.max_weight)
        count = math.prod(update.lead)
        if len(clients) != count:
            raise StrategyError(f"a ring sum needs the numbers of {count} clients, got {len(clients)}")
        keys = [hashlib.sha256(key_bytes(*self._rounding, client)).digest() for client in clients]
        for row in ring_rows(self.encoding, update, keys):
            np.add(self.ring, row, out=self.ring)
        self.count += count

    def merge(self, other: Self) -> None:
        """Add what another ring sum has taken."""
        if other.encoding != self.encoding or len(other.ring) != len(self.ring):
            raise StrategyError("cannot merge two ring sums of different encodings")
        np.add(self.ring, other.ring, out=self.ring)
        self.count += other.count

    def total(self) -> Total:
        """Return the decoded total; of nothing, zeros."""
        return (
            total_of(self.encoding.decode(self.ring, self.count))
            if self.count
            else Total(torch.zeros(self.size), 0.0, 0)
        )

    def _add_values(self, values: Tensor) -> None:
        raise StrategyError("a ring sum takes updates, not values")

    def _merge_values(self, other: Self) -> None:
        raise StrategyError("a ring sum merges whole")

    def _total_values(self) -> Tensor:
        return self.total().values

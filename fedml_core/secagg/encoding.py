"""What one client's ring vector means: its update, clipped and rounded to whole numbers, and then its scalars.

Bonawitz et al. (2019), arXiv:1912.00131, with a centred decode: a sum means the same however many survived.

Guarantees: the sum of up to `clients` encoded vectors never overflows the ring; a range that could is not configurable.
Guarantees: the decoded sum is the sum of the clipped, weighted updates in expectation, and the mean that it makes has a
    standard deviation of at most clip / (2 Q omega sqrt(n)) per coordinate around theirs.
Guarantees: an update that holds NaN or infinity, or whose weight is out of range, raises, and nothing is returned.
Trust: encoding runs at the client and hides nothing; masks do. What was clipped is only known as a sum over clients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedml_core.checks import require_number, require_whole
from fedml_core.errors import ConfigError, SecureAggregationError
from fedml_core.secagg.keystream import Keystream
from fedml_core.secagg.masks import RING_BITS, ring_type
from fedml_core.secagg.rounding import Rounder
from fedml_core.secagg.scalars import Count, Measure, Scalar, as_number, check_names, from_digits, to_digits
from fedml_core.secagg.secrets import SecretBytes

__all__ = ["Decoded", "RingEncoding"]

_FEWEST_STEPS = 1 << 6
_MOST_STEPS = 1 << 52  # float64 holds no more digits of a coordinate
_ROUNDING_BLOCK = 1 << 127  # far from where masks begin: one key for both by mistake would share no block


@dataclass(frozen=True)
class Decoded:
    """What `count` members' vectors add up to.

    `values`: float64, (d,), the sum of weight times update. `weight`: the summed weights. `clipped`: how many of the
    count * d coordinates were clipped. `scalars`: the other sums by name.
    """

    values: NDArray[np.float64] = field(repr=False)
    weight: float
    clipped: int
    count: int
    scalars: Mapping[str, float]


@dataclass(frozen=True)
class RingEncoding:
    """Encodes vectors of any length for a ring modulo 2^bits.

    Args: clip: > 0, the largest absolute value of one coordinate, in parameter units; larger ones are clipped.
        clients: the most vectors that are ever added. bits: 16, 32 or 64. max_weight: the largest weight of a client;
        None if none has a weight (each counts 1). scalars: what else is summed.
    Raises: ConfigError: if a range is none, or so many clients leave fewer than 64 steps to each.
    """

    clip: float
    clients: int
    _: KW_ONLY
    bits: int = 32
    max_weight: float | None = None
    scalars: tuple[Scalar, ...] = ()

    def __post_init__(self) -> None:
        """Check every range."""
        require_number("clip", self.clip, at_least=1e-30, at_most=1e30)
        require_whole("clients", self.clients, at_least=1)
        if self.bits not in RING_BITS:
            raise ConfigError(f"bits must be 16, 32 or 64, got {self.bits}")
        if self.max_weight is not None:
            require_number("max_weight", self.max_weight, at_least=1e-30, at_most=1e30)
        if self.steps < _FEWEST_STEPS:
            most = (2**self.bits - 1) // (2 * _FEWEST_STEPS)
            raise ConfigError(
                f"a ring of {self.bits} bits leaves {self.steps} steps to each of {self.clients} clients, and at least "
                f"{_FEWEST_STEPS} are needed; use more bits, or at most {most} clients"
            )
        check_names((Measure("weight", 1.0), Count("clipped"), *self.scalars))

    @cached_property
    def steps(self) -> int:
        """Q: the largest absolute value of one client's ring element; clients * Q stays below half the ring."""
        return min(((1 << self.bits) - 1) // (2 * self.clients), _MOST_STEPS)

    @cached_property
    def _all_scalars(self) -> tuple[Scalar, ...]:
        weight = () if self.max_weight is None else (Measure("weight", self.max_weight),)
        return (*weight, Count("clipped"), *self.scalars)

    @cached_property
    def _limb_bits(self) -> int:
        return (self.steps + 1).bit_length() - 1

    @cached_property
    def _digits(self) -> tuple[int, ...]:
        return tuple(scalar.digits(self._limb_bits, self.clients) for scalar in self._all_scalars)

    def length(self, size: int) -> int:
        """Return how many ring elements an update of `size` coordinates takes, with its scalars."""
        return size + sum(self._digits)

    def mean_error(self, count: int, mean_weight: float | None = None) -> float:
        """Return the bound on the standard deviation of each coordinate of the mean of `count` updates.

        Args: mean_weight: the mean of their weights, where clients have weights.
        """
        omega = 1.0 if self.max_weight is None else (mean_weight or 0.0) / self.max_weight
        return self.clip / (2 * self.steps * omega * math.sqrt(count)) if omega > 0 and count > 0 else math.inf

    def encode(
        self, values: NDArray[Any], key: SecretBytes, *, weight: float = 1.0, scalars: Mapping[str, Any] | None = None
    ) -> NDArray[Any]:
        """Return one client's ring vector, of shape (length(d),).

        Args: values: float32 or float64, (d,). key: 32 fresh random bytes that round this vector and do nothing else.
            weight: from 0 to max_weight. scalars: a number for every configured name.
        Raises: SecureAggregationError: if an argument is out of range; nothing is returned.
        """
        if values.ndim != 1:
            raise SecureAggregationError(f"an update must have shape (d,), got {values.shape}")
        rows = {name: [value] for name, value in (scalars or {}).items()}
        encoded: NDArray[Any] = self.encode_rows(values[None], [key], weights=[weight], scalars=rows)[0]
        return encoded

    def encode_rows(
        self,
        values: NDArray[Any],
        keys: Sequence[SecretBytes],
        *,
        weights: Sequence[float] | None = None,
        scalars: Mapping[str, Sequence[Any]] | None = None,
    ) -> NDArray[Any]:
        """Return K clients' ring vectors, (K, length(d)), each as `encode` makes it from its row, key and numbers."""
        rows = self._checked_rows(values, keys, weights)
        facts: Mapping[str, Sequence[Any]] = scalars or {}
        self._check_facts(facts, len(keys))
        size = values.shape[1]
        out = np.empty((len(keys), self.length(size)), dtype=ring_type(self.bits))
        rounder = Rounder(values.dtype, self.clip)
        for row, (key, weight) in enumerate(zip(keys, rows, strict=True)):
            stream = Keystream(key, _ROUNDING_BLOCK)
            clipped = rounder.round(values[row], self._limit(weight), stream, out[row, :size])
            own = {"weight": weight, "clipped": clipped}
            self._write_scalars(own | {name: column[row] for name, column in facts.items()}, out[row, size:])
        return out

    def decode(self, total: NDArray[Any], count: int) -> Decoded:
        """Return what the sum of `count` vectors means.

        Guarantees: a sum that `count` honest vectors cannot have is refused, never returned.
        Raises: SecureAggregationError: if so, or if the array is not a ring vector of this encoding.
        """
        dtype, scalars_size = ring_type(self.bits), sum(self._digits)
        if total.dtype != dtype or total.ndim != 1 or len(total) < scalars_size:
            raise SecureAggregationError(
                f"a sum must be {dtype} with at least {scalars_size} elements, got {total.dtype} {total.shape}"
            )
        if not 1 <= count <= self.clients:
            raise SecureAggregationError(f"a sum must be of 1 to {self.clients} vectors, got {count}")
        centred = total.view(np.dtype(f"<i{self.bits // 8}"))
        self._check_sum(centred, count)
        size = len(total) - scalars_size
        values = centred[:size].astype(np.float64)
        values *= self.clip * (self.max_weight or 1.0)
        values /= self.steps
        sums = self._read_scalars(centred[size:])
        weight, clipped = sums.pop("weight", float(count)), int(sums.pop("clipped"))
        return Decoded(values, weight, clipped, count, MappingProxyType(sums))

    def _limit(self, weight: float) -> float:
        return float(self.steps) if self.max_weight is None else self.steps * (weight / self.max_weight)

    def _checked_rows(
        self, values: NDArray[Any], keys: Sequence[SecretBytes], weights: Sequence[float] | None
    ) -> list[float]:
        """Return the weights, after the checks of what belongs to each row."""
        if values.dtype not in (np.float32, np.float64) or values.ndim != 2:
            raise SecureAggregationError(
                f"updates must be float32 or float64 of shape (K, d), got {values.dtype} {values.shape}"
            )
        rows = [1.0] * len(values) if weights is None else [as_number(weight) for weight in weights]
        if not len(values) == len(keys) == len(rows):
            raise SecureAggregationError(
                f"{len(values)} updates need as many keys and weights, got {len(keys)} and {len(rows)}"
            )
        if self.max_weight is None and any(weight != 1.0 for weight in rows):
            raise SecureAggregationError("a weight other than 1 needs max_weight to be configured; nothing was sent")
        if self.max_weight is not None and not all(0.0 <= weight <= self.max_weight for weight in rows):
            raise SecureAggregationError(
                f"a weight is not between 0 and max_weight, which is {self.max_weight:g}; nothing was sent"
            )
        return rows

    def _check_facts(self, facts: Mapping[str, Sequence[Any]], rows: int) -> None:
        wanted = {scalar.name for scalar in self.scalars}
        if facts.keys() != wanted:
            raise SecureAggregationError(
                f"scalars must be {', '.join(sorted(wanted)) or 'none'}, got {', '.join(sorted(facts)) or 'none'}"
            )
        if any(len(column) != rows for column in facts.values()):
            raise SecureAggregationError(f"each scalar must have {rows} values, one for each update")

    def _check_sum(self, centred: NDArray[Any], count: int) -> None:
        largest = count * self.steps
        if len(centred) and not -largest <= int(centred.min()) <= int(centred.max()) <= largest:
            raise SecureAggregationError(
                f"the sum holds elements that {count} vectors cannot add up to: a mask is still on it, or a member "
                "sent what the encoding does not allow"
            )

    def _write_scalars(self, facts: Mapping[str, Any], out: NDArray[Any]) -> None:
        digits: list[int] = []
        for scalar, count in zip(self._all_scalars, self._digits, strict=True):
            digits += to_digits(scalar.to_whole(facts[scalar.name], self.clients), count, self._limb_bits)
        out[:] = np.array(digits, dtype=np.int64).astype(out.dtype)

    def _read_scalars(self, centred: NDArray[Any]) -> dict[str, float]:
        rest, sums = centred.tolist(), {}
        for scalar, count in zip(self._all_scalars, self._digits, strict=True):
            digits, rest = rest[:count], rest[count:]
            sums[scalar.name] = scalar.from_whole(from_digits(digits, self._limb_bits), self.clients)
        return sums

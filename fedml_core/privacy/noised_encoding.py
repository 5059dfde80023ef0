"""One client's part of a noised sum: clipped, rotated, rounded to integers and noised, ready for secure aggregation.

The distributed discrete Gaussian mechanism of Kairouz, Liu and Steinke (2021), arXiv:2102.06387, Algorithms 1 and 2, or
the Skellam mechanism of Agarwal, Kairouz and Liu (2021), arXiv:2110.04995. No client adds enough noise for itself; the
fewest honest clients whose sum is ever revealed do together. It is the sibling of `secagg.encoding.RingEncoding`, with
nothing beside the update in it: an exact sum of losses or examples would tell what the noise hides.

Guarantees: the integers that noise is added to have at most the L2 norm that the event's accounting assumes.
Guarantees: the honest clients' noise together has a standard deviation of at least noise_multiplier x clip_norm.
Guarantees: the noise of each row comes from a fresh key of the operating system; no argument decides it.
Guarantees: an update that holds NaN or infinity, or has another weight than 1, raises, and nothing is returned.
Trust: server sees only noised sums, as long as `honest` of the clients in each add their noise and keep it secret.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedml_core.checks import require_number, require_whole
from fedml_core.errors import ConfigError, PrivacyError, SecureAggregationError
from fedml_core.privacy.distributed import rounded_l2
from fedml_core.privacy.entropy import NoiseStream
from fedml_core.privacy.integer_noise import GaussianIntegers, IntegerNoise
from fedml_core.privacy.packing import pack, packed_length, unpack, word_bits
from fedml_core.privacy.rotation import Rotation, padded_size
from fedml_core.secagg.encoding import Decoded
from fedml_core.secagg.scalars import Scalar

__all__ = ["NoisedDecoded", "NoisedEncoding"]

_DEVIATIONS = 6.0
"""How many of its standard deviations a sum's coordinate has room for: outside are 2 in 10^9."""

_BETA = math.exp(-0.5)  # the rounding is drawn again with at most this probability
_MOST_TRIES = 500  # all fail with a probability of at most beta^500, which is 10^-108
_INWARDS = 1 - 2.0**-20  # more than a rotation in float32 can lengthen an update
_FEWEST_STEPS = 1.0
_CHUNK = 1 << 14  # coordinates: what rounding works on stays in a core's cache


@dataclass(frozen=True)
class NoisedDecoded(Decoded):
    """A noised sum. `noise`: the standard deviation that honest noise gives each coordinate at least, in its units."""

    noise: float


@dataclass(frozen=True)
class NoisedEncoding:
    """Encodes updates of one length; every party to a sum has an equal one.

    Guarantees: `event` describes exactly what `encode_rows` does with these fields.
    Trust: all fields are public.
    Args: size: of the updates. clients: the most in one sum. honest: the fewest whose noise is in every sum, and kept
        secret. clip_norm: > 0, in parameter units. noise_multiplier: > 0, of the honest noise over clip_norm. bits: of
        each coordinate's sum, 16, 20 or 32; see `packing`. noise: its distribution. rotation: the public key.
    Raises: ConfigError: if a number is out of range, or the bits leave noise of less than one step to a client.
    """

    size: int
    clients: int
    honest: int
    clip_norm: float
    noise_multiplier: float
    _: KW_ONLY
    sum_bits: int = 16
    noise: IntegerNoise = field(default_factory=GaussianIntegers)
    rotation: str = ""

    def __post_init__(self) -> None:
        """Check every field, and that they fit together."""
        padded_size(self.size)
        require_whole("cohort_size", self.clients, at_least=1, at_most=1 << 24)
        require_whole("honest", self.honest, at_least=1, at_most=self.clients)
        require_number("clip_norm", self.clip_norm, at_least=1e-9, at_most=1e9)
        require_number("noise_multiplier", self.noise_multiplier, at_least=1e-3, at_most=1e6)
        word_bits(self.sum_bits)
        if not isinstance(self.noise, IntegerNoise) or type(self.rotation) is not str or len(self.rotation) > 128:
            raise ConfigError(f"noise must be GaussianIntegers or SkellamIntegers, got {self.noise!r:.80}")
        if self._room <= 0 or self.deviation < _FEWEST_STEPS:
            raise ConfigError(
                f"{self.sum_bits} bits for the sum of {self.clients} clients leave less than one step to the noise of "
                "each; use more bits, or smaller cohorts"
            )
        self.noise.sampler(self.deviation)

    @property
    def bits(self) -> int:
        """Return the bits of the words that travel."""
        return word_bits(self.sum_bits)

    @property
    def max_weight(self) -> float | None:
        """Return that no client has a weight."""
        return None

    @property
    def scalars(self) -> tuple[Scalar, ...]:
        """Return that nothing is summed beside the update."""
        return ()

    @cached_property
    def dimension(self) -> int:
        """Return the length of padded updates."""
        return padded_size(self.size)

    @cached_property
    def local_noise(self) -> float:
        """Return the standard deviation of one client's noise, in parameter units."""
        return self.noise_multiplier * self.clip_norm / math.sqrt(self.honest)

    @cached_property
    def scale(self) -> float:
        """Return how many steps a parameter unit has: as many as the bits have room for, if all updates are alike."""
        aligned = (self.clip_norm * self.clients) ** 2 / self.dimension
        return math.sqrt(self._room / (aligned + self.local_noise**2 * self.clients))

    @cached_property
    def deviation(self) -> float:
        """Return the standard deviation of one client's noise, in steps."""
        return self.local_noise * self.scale

    @property
    def _room(self) -> float:
        # 2^bits = 2 k sqrt(c^2 n^2 / d + (step^2 / 4 + local_noise^2) n) / step, solved for the step.
        return float((2**self.sum_bits / (2 * _DEVIATIONS)) ** 2 - self.clients / 4)

    @cached_property
    def _norm(self) -> float:
        return rounded_l2(self.clip_norm, self.scale, self.dimension, _BETA)

    def length(self, size: int) -> int:
        """Return how many ring elements an update of `size` coordinates takes.

        Raises: ConfigError: if that is not the size that the noise was accounted for.
        """
        if size != self.size:
            raise ConfigError(f"the noise was planned for {self.size} values and an update has {size}; set size={size}")
        return packed_length(self.dimension, self.sum_bits)

    def event(self) -> Mapping[str, Any]:
        """Return what an accountant must be told of one sum."""
        return {
            "name": self.noise.event,
            "clients": self.honest,
            "dimension": self.dimension,
            "l2": float(self.clip_norm),
            "local_noise": self.local_noise,
            "scale": self.scale,
            "ring_bits": self.sum_bits,
            "beta": _BETA,
        }

    def admit(self, members: int, minimum: int, corrupt: int) -> None:
        """Check that a session of `members`, of whom `corrupt` may collude, reveals no sum with too little noise.

        Args: minimum: the fewest members whose sum the session reveals.
        Raises: PrivacyError: if it could.
        """
        if members > self.clients:
            raise PrivacyError(f"{members} clients are in a sum that has room for {self.clients}; ask fewer")
        if minimum - corrupt < self.honest:
            left = max(0, minimum - corrupt)
            raise PrivacyError(
                f"a sum of {minimum} clients of whom {corrupt} may collude has the noise of {left} honest ones, and "
                f"{self.honest} are needed; raise the protocol's minimum to {self.honest + corrupt}, or lower honest"
            )

    def encode_rows(self, values: NDArray[Any], weights: Sequence[float] = ()) -> NDArray[Any]:
        """Return K clients' ring vectors, (K, length), each with noise of its own.

        Args: values: float32 or float64, (K, size). weights: 1 for each, or left out.
        Raises: SecureAggregationError: if an argument is out of range; nothing is returned.
        """
        if values.dtype not in (np.float32, np.float64) or values.ndim != 2 or values.shape[1] != self.size:
            raise SecureAggregationError(
                f"updates must be float32 or float64 of shape (K, {self.size}), got {values.dtype} {values.shape}"
            )
        if any(weight != 1 for weight in weights):
            raise SecureAggregationError("noise hides clients that count alike; a weight other than 1 was not sent")
        rows = [pack(self.integers(row), self.sum_bits) for row in values]
        return np.stack(rows) if rows else np.empty((0, self.length(self.size)), f"<u{self.bits // 8}")

    def integers(self, values: NDArray[Any]) -> NDArray[np.int64]:
        """Return one client's noised integers, (dimension,), before they are reduced modulo the ring.

        Raises: SecureAggregationError: if a value is NaN or infinite.
        """
        stream = NoiseStream.fresh()
        whole = self.rounded(values, stream)
        np.add(whole, self.noise.sampler(self.deviation).draw(stream, self.dimension), out=whole)
        return whole

    def rounded(self, values: NDArray[Any], stream: NoiseStream) -> NDArray[np.int64]:
        """Return the clipped, rotated and scaled vector, rounded at random until it is short enough: without noise.

        Raises: SecureAggregationError: if a value is NaN or infinite.
        """
        rotated = Rotation(self.size, self.rotation).forward(self._clipped(values))
        whole = np.empty(self.dimension, dtype=np.int64)
        # Less by what float64 may get wrong in a sum of squares, so that the bound holds for the integers themselves.
        longest = self._norm**2 * (1 - self.dimension * 2.0**-52)
        for _ in range(_MOST_TRIES):
            if _round(rotated, self.scale, stream, whole) <= longest:
                return whole
        raise SecureAggregationError("the update could not be rounded to a short enough one; nothing was sent")

    def decode(self, total: NDArray[Any], count: int) -> NoisedDecoded:
        """Return the noised sum of `count` clients' updates.

        Raises: SecureAggregationError: if the array is not a sum of such vectors, or of too few or too many of them.
        """
        dtype, length = np.dtype(f"<u{self.bits // 8}"), self.length(self.size)
        if total.dtype != dtype or total.shape != (length,):
            raise SecureAggregationError(f"a sum must be {dtype} of shape ({length},), got {total.dtype} {total.shape}")
        if not self.honest <= count <= self.clients:
            raise SecureAggregationError(
                f"a noised sum must be of {self.honest} to {self.clients} vectors, got {count}"
            )
        rotated = unpack(total, self.dimension, self.sum_bits) / self.scale
        values = Rotation(self.size, self.rotation).back(rotated)
        noise = self.local_noise * math.sqrt(self.honest)
        return NoisedDecoded(values, float(count), 0, count, MappingProxyType({}), noise)

    def rotated(self, key: str) -> NoisedEncoding:
        """Return the encoding with another key of its rotation."""
        return replace(self, rotation=key)

    def to_table(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return {**asdict(self), "noise": self.noise.to_config()}

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> NoisedEncoding:
        """Return the encoding that `to_table` described.

        Raises: ConfigError, TypeError: if it is none.
        """
        return cls(**{**table, "noise": IntegerNoise.from_config(table["noise"])})

    def _clipped(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the values scaled down to the clip norm, as float32."""
        exact = values.astype(np.float64)
        norm = float(np.linalg.norm(exact))
        if not math.isfinite(norm):
            raise SecureAggregationError("the update holds NaN or infinite values; nothing was sent")
        longest = self.clip_norm * _INWARDS
        if norm > longest:
            np.multiply(exact, longest / norm, out=exact)
        return exact.astype(np.float32)


def _round(values: NDArray[Any], scale: float, stream: NoiseStream, out: NDArray[np.int64]) -> float:
    """Write values x scale into `out`, rounded up with the probability of their fraction; return the sum of squares."""
    squares = 0.0
    coins = np.empty(min(_CHUNK, len(values)), dtype="<u8")
    for start in range(0, len(values), _CHUNK):
        real = values[start : start + _CHUNK] * np.float64(scale)
        whole = np.floor(real)
        np.subtract(real, whole, out=real)
        drawn = coins[: len(real)]
        stream.into(drawn)
        np.right_shift(drawn, np.uint64(11), out=drawn)
        np.add(whole, drawn * 2.0**-53 < real, out=whole)
        squares += float(np.dot(whole, whole))
        np.copyto(out[start : start + _CHUNK], whole, casting="unsafe")
    return squares

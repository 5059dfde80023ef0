"""Numbers that travel beside an update inside the masked vector: each in its own range, spread over ring elements.

A number becomes a whole one, and that its digits in base 2^limb_bits, all with its sign. The digits of all clients add
up without carries, so the sum of the numbers is read off the sums of their digits, in a ring of any size.

Guarantees: the sum of `Count`s is exact, in every ring.
Guarantees: the sum of `Measure`s is within 2^-60 of one client's `scale` of the exact sum, and then rounded to float64.
Guarantees: a number outside its range is refused, by a message that names the range and never the number.
Trust: server sees only sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fedml_core.checks import require_number, require_whole
from fedml_core.errors import ConfigError, SecureAggregationError

__all__ = ["Count", "Measure", "Scalar", "as_number", "check_names", "from_digits", "to_digits"]

_MOST = 1 << 52  # a float holds every whole number up to here, and the next ones
_PRECISION = 62


@dataclass(frozen=True)
class Count:
    """A whole number from 0 to `most` per client, such as examples seen."""

    name: str
    most: int = 1 << 40

    def __post_init__(self) -> None:
        """Check the range."""
        require_whole(f"most of {self.name!r}", self.most, at_least=1, at_most=_MOST)

    def digits(self, limb_bits: int, clients: int) -> int:
        """Return how many ring elements the count takes."""
        return -(-self.most.bit_length() // limb_bits)

    def to_whole(self, value: Any, clients: int) -> int:
        """Return the count as an integer.

        Raises: SecureAggregationError: if it is not a whole number in its range.
        """
        number = as_number(value)
        if not (0 <= number <= self.most and number.is_integer()):
            raise SecureAggregationError(
                f"scalar {self.name!r} must be a whole number from 0 to {self.most}; nothing was sent"
            )
        return int(number)

    def from_whole(self, total: int, clients: int) -> int:
        """Return the summed counts."""
        return total


@dataclass(frozen=True)
class Measure:
    """A real number of at most `scale` in absolute value per client, such as a summed loss; `scale` is public."""

    name: str
    scale: float

    def __post_init__(self) -> None:
        """Check the range."""
        require_number(f"scale of {self.name!r}", self.scale, at_least=1e-200, at_most=1e200)

    def _exponent(self, clients: int) -> int:
        """Return e of the step 2^e, so small that the roundings of all clients together stay below 2^-61 scale."""
        return math.frexp(self.scale)[1] - _PRECISION - (clients - 1).bit_length()

    def digits(self, limb_bits: int, clients: int) -> int:
        """Return how many ring elements the measure takes."""
        return -(-self.to_whole(self.scale, clients).bit_length() // limb_bits)

    def to_whole(self, value: Any, clients: int) -> int:
        """Return the measure as an integer number of steps.

        Raises: SecureAggregationError: if it is not a number in its range.
        """
        number = as_number(value)
        if not -self.scale <= number <= self.scale:
            raise SecureAggregationError(
                f"scalar {self.name!r} must be between -{self.scale:g} and {self.scale:g}; nothing was sent"
            )
        return round(math.ldexp(number, -self._exponent(clients)))

    def from_whole(self, total: int, clients: int) -> float:
        """Return the summed measures."""
        return math.ldexp(total, self._exponent(clients))


Scalar = Count | Measure


def check_names(scalars: tuple[Scalar, ...]) -> None:
    """Raise ConfigError unless every name is text, said once."""
    names = [scalar.name for scalar in scalars]
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise ConfigError(f"scalars must have distinct names, got {', '.join(map(repr, names))}")


def to_digits(whole: int, count: int, limb_bits: int) -> list[int]:
    """Return `count` digits of a whole number in base 2^limb_bits, the lowest first, each with the number's sign."""
    size, mask = abs(whole), (1 << limb_bits) - 1
    digits = [size >> (place * limb_bits) & mask for place in range(count)]
    return digits if whole >= 0 else [-digit for digit in digits]


def from_digits(digits: list[int], limb_bits: int) -> int:
    """Return the whole number of the digits, which may be sums of digits of any sign and size."""
    return sum(digit << (place * limb_bits) for place, digit in enumerate(digits))


def as_number(value: Any) -> float:
    """Return the number as a float; NaN where it is none, which is in no range."""
    try:
        return math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan

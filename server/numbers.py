"""A round's client numbers as a report keeps them: the first thousand, packed, so that a long run stays small."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import overload

__all__ = ["LISTED", "ClientNumbers"]

LISTED = 1000
"""How many client numbers a report holds of each kind, in memory as in its history."""

_CODES = ("B", "H", "I", "q")  # unsigned of 1, 2 and 4 bytes, then whatever a client number may be


class ClientNumbers(Sequence[int]):
    """At most `LISTED` client numbers; equal to any sequence of the same numbers.

    Guarantees: holds at most 8 bytes a number, 8,000 bytes in all, however many were given.
    Raises: TypeError, OverflowError: for what is no client number.

    Example:
        >>> ClientNumbers([3, 5, 9])
        [3, 5, 9]
    """

    __slots__ = ("_packed",)
    _packed: array[int]

    def __init__(self, numbers: Sequence[int]) -> None:
        self._packed = numbers._packed if isinstance(numbers, ClientNumbers) else _packed(numbers[:LISTED])

    def __len__(self) -> int:
        """Return how many are held."""
        return len(self._packed)

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> list[int]: ...
    def __getitem__(self, place: int | slice) -> int | list[int]:
        """Return the number at a place, or a list of those in a slice."""
        return self._packed[place].tolist() if isinstance(place, slice) else self._packed[place]

    def __iter__(self) -> Iterator[int]:
        """Yield each number."""
        return iter(self._packed)

    def __contains__(self, number: object) -> bool:
        """Return whether a number is held."""
        return number in self._packed

    def __eq__(self, other: object) -> bool:
        """Return whether the other holds the same numbers in the same order."""
        if isinstance(other, str | bytes) or not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __hash__(self) -> int:
        """Return the hash of a tuple of the numbers."""
        return hash(tuple(self._packed))

    def __repr__(self) -> str:
        """Return the numbers as a list shows them."""
        return repr(self._packed.tolist())

    @property
    def size_bytes(self) -> int:
        """Return what the numbers take."""
        return len(self._packed) * self._packed.itemsize


def _packed(numbers: Sequence[int]) -> array[int]:
    wide = array("q", numbers)
    low, high = min(wide, default=0), max(wide, default=0)
    fitting = next((code for code in _CODES[:-1] if low >= 0 and high < 1 << 8 * array(code).itemsize), "q")
    return wide if fitting == "q" else array(fitting, wide)

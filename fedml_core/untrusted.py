"""Reading what a stranger sent: a value is of the kind that it must be, or an error that names no content of it."""

from __future__ import annotations

from typing import Any


def as_text(value: Any) -> str:
    """Return a text.

    Raises: TypeError: if it is something else.
    """
    if not isinstance(value, str):
        raise TypeError("must be text")
    return value


def as_whole(value: Any) -> int:
    """Return a whole number; a boolean is none.

    Raises: TypeError: if it is something else.
    """
    if type(value) is not int:
        raise TypeError("must be a whole number")
    return value


def as_number(value: Any) -> float:
    """Return a number as a float; it may be NaN.

    Raises: TypeError: if it is something else. OverflowError: if it is too large for a float.
    """
    if type(value) not in (int, float):
        raise TypeError("must be a number")
    return float(value)


def as_table(value: Any) -> dict[str, Any]:
    """Return a table.

    Raises: TypeError: if it is something else.
    """
    if not isinstance(value, dict):
        raise TypeError("must be a table")
    return value


def printable(text: str, limit: int = 300) -> str:
    """Return `text` so that a terminal shows it and does nothing else; longer text is cut.

    Example:
        >>> printable("ward\\x1b[2J a")
        'ward?[2J a'
    """
    return "".join(letter if letter.isprintable() else "?" for letter in text[:limit])

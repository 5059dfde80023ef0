"""Whom to leave out of the next attempt when members say that the shares of others cannot be opened.

Guarantees: with no more corrupt members than stated, whoever more than so many others complain about is at fault.
Trust: of fewer complaints, either side may be the cause, and the one who complained has dropped out already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from fedml_core.errors import SecureAggregationError
from fedml_core.secagg.codec import Kind, Reader

__all__ = ["judged", "read_complaint"]


def read_complaint(message: bytes, senders: Collection[int]) -> tuple[int, ...]:
    """Return whose boxes a member could not open.

    Raises: SecureAggregationError: unless they are some of those who sent it one, ascending, each once.
    """
    reader = Reader(message, Kind.COMPLAINT)
    accused = tuple(reader.numbers())
    reader.finish()
    if not accused or list(accused) != sorted(set(accused)) or not set(accused).issubset(senders):
        raise SecureAggregationError("a complaint names members who sent no shares, or one twice, or nobody")
    return accused


def judged(complaints: Mapping[int, Collection[int]], corrupt: int) -> frozenset[int]:
    """Return who is to be left out, with at most `corrupt` corrupt members.

    Of more complaints about one member than that, one is honest. Otherwise whoever complained is to go, and so is
    whoever accuses, beyond those, more members than can be at fault.
    """
    counts = Counter(member for accused in complaints.values() for member in accused)
    rightly = {member for member, count in counts.items() if count > corrupt}
    wrongly = {
        who
        for who, accused in complaints.items()
        if rightly.isdisjoint(accused) or len(set(accused) - rightly) > corrupt
    }
    return frozenset(rightly | wrongly)

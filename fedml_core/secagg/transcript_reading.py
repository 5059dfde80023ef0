"""How a transcript is read, strictly, and how what was checked in it is said.

Guarantees: whatever value is read, the outcome is of the expected form, or a SecureAggregationError says where.
Trust: a form that fits says nothing about who wrote it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedml_core.errors import SecureAggregationError
from fedml_core.secagg.parameters import Parameters

__all__ = [
    "Finding",
    "Findings",
    "Verdict",
    "entries",
    "fixed_hex",
    "members",
    "optional_digest",
    "optional_whole",
    "read_parameters",
    "read_result",
    "read_signatures",
    "result_table",
    "table",
    "whole",
]

T = TypeVar("T")


class Verdict(StrEnum):
    """What became of one check."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_CHECKED = "not checked"


@dataclass(frozen=True)
class Finding:
    """One check: of what, how it ended, and in words."""

    what: str
    verdict: Verdict
    said: str


class Findings:
    """Collects what was checked."""

    def __init__(self) -> None:
        self.listed: list[Finding] = []

    def require(self, what: str, held: bool, said: str) -> bool:
        """Note that something holds or does not; `said` reads as the claim itself."""
        if held:
            self.listed.append(Finding(what, Verdict.PASSED, said))
        else:
            self.listed.append(Finding(what, Verdict.FAILED, f"this does not hold: {said}"))
        return held

    def failed(self, what: str, said: str) -> None:
        """Note a flaw."""
        self.listed.append(Finding(what, Verdict.FAILED, said))

    def on_trust(self, what: str, said: str) -> None:
        """Note what nobody can check here."""
        self.listed.append(Finding(what, Verdict.NOT_CHECKED, said))

    def attempt(self, what: str, claim: str, check: Callable[[], T]) -> T | None:
        """Return what `check` returns, noting the claim; or None, noting the error that it raised."""
        try:
            result = check()
        except SecureAggregationError as error:
            self.failed(what, str(error))
            return None
        self.listed.append(Finding(what, Verdict.PASSED, claim))
        return result


def table(value: Any, names: Iterable[str], where: str) -> Mapping[str, Any]:
    """Return a JSON object that has exactly these names."""
    wanted = set(names)
    if not isinstance(value, dict):
        raise SecureAggregationError(f"{where} must be a table, got {type(value).__name__}")
    if unknown := sorted(set(value) - wanted):
        raise SecureAggregationError(f"{where} has an unknown field {unknown[0]!r:.60}")
    if missing := sorted(wanted - set(value)):
        raise SecureAggregationError(f"{where} lacks the field {missing[0]!r}")
    return value


def whole(value: Any, where: str) -> int:
    """Return a whole number from 0 to below 2^32."""
    if type(value) is not int or not 0 <= value < 1 << 32:
        raise SecureAggregationError(f"{where} must be a whole number from 0 to below 2^32, got {value!r:.60}")
    return value


def fixed_hex(value: Any, size: int, where: str) -> bytes:
    """Return bytes of a given size from lower-case hexadecimal digits."""
    try:
        found = bytes.fromhex(value) if isinstance(value, str) else b""
    except ValueError:
        found = b""
    if len(found) != size or found.hex() != value:
        raise SecureAggregationError(f"{where} must be {size} bytes in lower-case hexadecimal, got {value!r:.60}")
    return found


def _listed(value: Any, where: str) -> list[Any]:
    """Return a JSON list."""
    if not isinstance(value, list):
        raise SecureAggregationError(f"{where} must be a list, got {type(value).__name__}")
    return value


def entries(value: Any, names: Iterable[str], where: str) -> list[Mapping[str, Any]]:
    """Return a list of tables that have exactly these names."""
    wanted = tuple(names)
    return [table(one, wanted, f"entry {place} of {where}") for place, one in enumerate(_listed(value, where))]


def members(value: Any, where: str) -> tuple[int, ...]:
    """Return numbers in ascending order, each once."""
    found = tuple(whole(one, f"each of {where}") for one in _listed(value, where))
    if list(found) != sorted(set(found)):
        raise SecureAggregationError(f"{where} must be in ascending order, each once")
    return found


def optional_whole(fields: Mapping[str, Any], name: str) -> int | None:
    """Return a field's whole number, or None for null."""
    return None if fields[name] is None else whole(fields[name], name)


def optional_digest(fields: Mapping[str, Any], name: str) -> bytes | None:
    """Return a field's 32 bytes, or None for null."""
    return None if fields[name] is None else fixed_hex(fields[name], 32, name)


def result_table(total: NDArray[Any] | None, count: int) -> dict[str, Any] | None:
    """Return what a transcript says about the sum of `count` vectors: the SHA-256 of its little-endian bytes."""
    if total is None:
        return None
    return {"count": count, "digest": hashlib.sha256(np.ascontiguousarray(total).data).hexdigest()}


def read_parameters(value: Any) -> Parameters:
    """Return the parameters in their canonical text."""
    if not isinstance(value, str):
        raise SecureAggregationError(f"parameters must be text, got {type(value).__name__}")
    return Parameters.from_text(value)


def read_signatures(value: Any, who: str, where: str) -> dict[int, bytes]:
    """Return signatures by the number of who signed, in ascending order."""
    found = entries(value, (who, "signature"), where)
    numbers = members([one[who] for one in found], f"the {who}s of {where}")
    return {
        number: fixed_hex(one["signature"], 64, f"a signature of {where}")
        for number, one in zip(numbers, found, strict=True)
    }


def read_result(value: Any) -> tuple[int, bytes] | None:
    """Return how many vectors were summed, and the digest of their sum; None if there is none."""
    if value is None:
        return None
    found = table(value, ("count", "digest"), "result")
    return whole(found["count"], "result.count"), fixed_hex(found["digest"], 32, "result.digest")

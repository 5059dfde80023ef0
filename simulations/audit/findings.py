"""What an audit found, and the verdict that follows from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

__all__ = ["REJECT", "Finding", "Verdict", "overall"]

REJECT = 1e-6
"""A p-value below which a claim does not hold."""


class Verdict(StrEnum):
    """PASS: every claim that could be tested held. WARN: a test was too weak, or something should be known. FAIL: a
    claim does not hold. INFO: nothing is claimed that it could be held against, or the test does not apply.
    """

    PASS = "PASS"
    WARN = "WARN"
    FAIL = "FAIL"
    INFO = "INFO"


@dataclass(frozen=True)
class Finding:
    """One test: of what, how it ended, in words, and in numbers."""

    what: str
    verdict: Verdict
    said: str
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**dataclasses.asdict(self), "verdict": str(self.verdict)}


def overall(findings: Sequence[Finding]) -> Verdict:
    """Return the worst verdict; what holds nothing against a claim does not count.

    Example:
        >>> overall([Finding("noise", Verdict.PASS, ""), Finding("canaries", Verdict.WARN, "")])
        <Verdict.WARN: 'WARN'>
    """
    found = {finding.verdict for finding in findings}
    return next((verdict for verdict in (Verdict.FAIL, Verdict.WARN) if verdict in found), Verdict.PASS)

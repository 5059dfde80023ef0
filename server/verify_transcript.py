"""`fedveil verify-transcript`: what a run recorded of its secure sums is read, line by line, and checked by anybody.

The file is not believed: whatever it holds, the outcome is findings. Beyond each attempt's own checks, no attempt may
be recorded twice, and no round may have two sums, whose difference could give somebody away.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from fedml_core.console import Console
from fedml_core.errors import ConfigError, SecureAggregationError
from fedml_core.secagg.parameters import Parameters
from fedml_core.secagg.transcript import Finding, Verdict, check

__all__ = ["verify_file"]

_LONGEST_LINE = 1 << 28
_Key = tuple[str, int, int]


@dataclass(frozen=True)
class Signatories:
    """Whose signatures count: identity keys by number, and the digest of the roster that has them."""

    keys: Mapping[int, bytes] = field(repr=False)
    digest: str


@dataclass(frozen=True)
class Attempt:
    """One line: what it calls itself, whether it has a sum, and what was found."""

    line: int
    key: _Key | None
    summed: bool
    findings: list[Finding]

    @property
    def name(self) -> str:
        """Return how it is spoken of."""
        if self.key is None:
            return f"line {self.line}"
        run, number, attempt = self.key
        return f"run {run[:16]!r}, round {number}, attempt {attempt}"

    def of(self, verdict: Verdict) -> list[Finding]:
        """Return the findings that ended so."""
        return [one for one in self.findings if one.verdict is verdict]


def verify_file(console: Console, path: Path, roster: Path | None, *, every: bool) -> None:
    """Check a transcript and say what was found; `every` shows what holds, too.

    Raises: typer.Exit: with code 1, if anything does not hold. ConfigError: if a file cannot be read or holds nothing.
    """
    known = None if roster is None else _signatories(roster)
    digest, attempts = hashlib.sha256(), list[Attempt]()
    for number, line in _lines(path):
        digest.update(line)
        attempts.append(_checked(number, line, known))
    if not attempts:
        raise ConfigError(f"the transcript {path} is empty; is it the right file?")
    _compare(attempts)
    for attempt in attempts:
        _tell(console, attempt, every=every or len(attempts) == 1)
    failed = sum(len(one.of(Verdict.FAILED)) for one in attempts)
    passed = sum(len(one.of(Verdict.PASSED)) for one in attempts)
    said = f"{failed} of {failed + passed} checks failed" if failed else f"all {passed} checks hold"
    if known is None:
        said += "; no signature was checked, because no --roster was given"
    console.table([("file", f"{path}, SHA-256 {digest.hexdigest()}"), ("verdict", said)])
    console.result(
        {
            "file": str(path),
            "sha256": digest.hexdigest(),
            "verdict": "failed" if failed else "passed",
            "passed": passed,
            "failed": failed,
            "signatures_checked": known is not None,
            "attempts": [_facts(attempt) for attempt in attempts],
        }
    )
    if failed:
        raise typer.Exit(1)


def _signatories(path: Path) -> Signatories:
    from fedml_core.identity import PinnedRoster, read_roster

    found = read_roster(path)
    keys = {site.client_id: site.keys.identity for site in found.admitted}
    return Signatories(keys, PinnedRoster.of(found).digest if found.operator else "")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as stream:
            number = 0
            while line := stream.readline(_LONGEST_LINE + 1):
                number += 1
                if len(line) > _LONGEST_LINE:
                    raise ConfigError(f"line {number} of {path} is longer than {_LONGEST_LINE} bytes")
                yield number, line
    except OSError as error:
        raise ConfigError(f"the transcript {path} cannot be read: {error.strerror}") from error


def _checked(number: int, line: bytes, known: Signatories | None) -> Attempt:
    try:
        value = json.loads(line, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        said = f"line {number} is no JSON that a transcript may hold ({type(error).__name__}); was it cut short?"
        return Attempt(number, None, False, [Finding("form", Verdict.FAILED, said)])
    findings = check(value, None if known is None else known.keys, roster_digest="" if known is None else known.digest)
    return Attempt(number, _key_of(value), isinstance(value, dict) and value.get("result") is not None, findings)


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name twice")
    return made


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _key_of(value: Any) -> _Key | None:
    """Return run, round and attempt, if the line is good enough to name them."""
    text = value.get("parameters") if isinstance(value, dict) else None
    try:
        found = Parameters.from_text(text) if isinstance(text, str) else None
    except SecureAggregationError:
        return None
    return None if found is None else (found.run, found.round, found.attempt)


def _compare(attempts: Sequence[Attempt]) -> None:
    """Note, with the later one, every attempt that is recorded twice and every round that has two sums."""
    seen: Counter[_Key] = Counter()
    summed: Counter[tuple[str, int]] = Counter()
    for attempt in attempts:
        if attempt.key is None:
            continue
        seen[attempt.key] += 1
        if seen[attempt.key] > 1:
            attempt.findings.append(Finding("attempt", Verdict.FAILED, "the same attempt is recorded before"))
        if attempt.summed:
            summed[attempt.key[:2]] += 1
            if summed[attempt.key[:2]] > 1:
                said = "the round has a sum before this one; their difference could give somebody away"
                attempt.findings.append(Finding("round", Verdict.FAILED, said))


def _tell(console: Console, attempt: Attempt, *, every: bool) -> None:
    counts = [f"{len(found)} {verdict.value}" for verdict in Verdict if (found := attempt.of(verdict))]
    console.say(f"{attempt.name}: {'a sum' if attempt.summed else 'no sum'}, {', '.join(counts)}")
    shown = attempt.findings if every else attempt.of(Verdict.FAILED)
    for one in shown:
        console.say(f"  {one.verdict.value:<11}  {one.what:<13}  {one.said}")


def _facts(attempt: Attempt) -> dict[str, Any]:
    run, number, serial = attempt.key or (None, None, None)
    return {
        "line": attempt.line,
        "run": run,
        "round": number,
        "attempt": serial,
        "summed": attempt.summed,
        "findings": [{"check": one.what, "verdict": one.verdict.value, "said": one.said} for one in attempt.findings],
    }

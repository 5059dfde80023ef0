"""What a secure sum recorded, as plain JSON values without any secret, and the check that a third party can run on it.

docs/secure-aggregation.md says what is recorded, and what a check can and cannot say.

Guarantees: whatever is checked, the outcome is a list of findings that say in words what was checked.
Guarantees: a transcript that was changed anywhere fails, but for the fields that are named as the server's word.
Trust: a check that passes says that members signed what is recorded, and that it fits together; it does not say that
    the server recorded every attempt, nor that the model was made from the sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from fedml_core.errors import SecureAggregationError
from fedml_core.secagg import transcript_assisted, transcript_secagg, transcript_secagg_check
from fedml_core.secagg.assisted_server import AssistedServer
from fedml_core.secagg.server import ServerSession
from fedml_core.secagg.transcript_reading import Finding, Findings, Verdict, read_parameters, table
from fedml_core.secagg.unmasked import UnmaskedServerSession

__all__ = ["Finding", "Verdict", "check", "record"]

_FORMAT = "fedveil-transcript"
_VERSION = 1
_UNMASKED = "simulated without masks"
_CHECKS = {
    transcript_secagg.PROTOCOL: (transcript_secagg.FIELDS, transcript_secagg_check.check_attempt),
    transcript_assisted.PROTOCOL: (transcript_assisted.FIELDS, transcript_assisted.check_attempt),
}


def record(session: ServerSession | AssistedServer, total: NDArray[Any] | None = None) -> dict[str, Any]:
    """Return what an attempt recorded, as far as it came: plain values for one line of JSON.

    Args: total: the unmasked sum, or None if there is none. Only its digest is kept.
    """
    if isinstance(session, AssistedServer):
        protocol, fields = transcript_assisted.PROTOCOL, transcript_assisted.record_attempt(session, total)
    else:
        protocol = _UNMASKED if isinstance(session, UnmaskedServerSession) else transcript_secagg.PROTOCOL
        fields = transcript_secagg.record_attempt(session, total)
    return {"format": _FORMAT, "version": _VERSION, "protocol": protocol, **fields}


def check(transcript: Any, roster: Mapping[int, bytes] | None = None, *, roster_digest: str = "") -> list[Finding]:
    """Return what was checked in a transcript, in the order of the exchanges.

    Args: transcript: one line's JSON value, of whatever form. roster: identity keys by number; without one no signature
        is checked, and a finding says so. roster_digest: of that roster, to be compared with what the parties pinned.
    """
    findings = Findings()
    try:
        fields, run = _fields(transcript)
    except SecureAggregationError as error:
        findings.failed("form", str(error))
    else:
        run(fields, roster, findings)
        if roster_digest:
            _compare_rosters(fields["parameters"], roster_digest, findings)
    return findings.listed


def _compare_rosters(text: Any, digest: str, findings: Findings) -> None:
    try:
        parameters = read_parameters(text)
    except SecureAggregationError:
        return  # the form's finding says so
    if parameters.active and parameters.roster == digest:
        findings.require("roster", True, "every party had pinned the roster that is given")
    elif parameters.active:
        said = "the parties had pinned another edition of the roster; give the one of that time to check that, too"
        findings.on_trust("roster", said)


def _fields(transcript: Any) -> tuple[Mapping[str, Any], Any]:
    if not isinstance(transcript, dict) or transcript.get("format") != _FORMAT:
        raise SecureAggregationError(f"a transcript must be a table with the format {_FORMAT!r}; is it the right file?")
    version, protocol = transcript.get("version"), transcript.get("protocol")
    if type(version) is not int or version != _VERSION:
        raise SecureAggregationError(f"the transcript has version {version!r:.40}, this check reads {_VERSION}")
    if protocol == _UNMASKED:
        raise SecureAggregationError("the attempt was simulated without masks: it protected nobody, and proves nothing")
    if not isinstance(protocol, str) or protocol not in _CHECKS:
        raise SecureAggregationError(f"the protocol must be one of {', '.join(_CHECKS)}, got {protocol!r:.40}")
    names, run = _CHECKS[protocol]
    return table(transcript, ("format", "version", "protocol", *names), "the transcript"), run

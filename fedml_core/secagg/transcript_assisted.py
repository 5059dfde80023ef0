"""What an assisted sum records, without any secret, and what can be checked in it afterwards.

Guarantees: a transcript holds nothing but what the server and every assistant saw, and the digest of the sum.
Trust: signatures and everything that is computed from signed values are checked; who was asked, who answered, who
    refused whom, and the digest of the sum are the server's word.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from fedml_core.secagg import transcript_reading as reading
from fedml_core.secagg.adverts import verify
from fedml_core.secagg.assistance import Assistance
from fedml_core.secagg.assisted import AssistantAdvert, Contribution, Panel, contributors_digest
from fedml_core.secagg.assisted_server import AssistedServer
from fedml_core.secagg.parameters import Parameters
from fedml_core.secagg.transcript_reading import Findings

__all__ = ["FIELDS", "ON_TRUST", "PROTOCOL", "check_attempt", "record_attempt"]

PROTOCOL = "assisted-one-shot"
FIELDS = (
    *("parameters", "cohort", "adverts", "session", "quorum", "binding", "bound", "contributions", "contributors"),
    *("refusals", "witnesses", "answered", "compared", "result"),
)
ON_TRUST = ("cohort", "refusals", "answered.assistant", "compared", "result.digest")
"""Fields of which a change may go unnoticed as long as they fit the others: nobody but the server vouches for them."""

_ADVERT = ("assistant", "sealing_key", "nonce", "signature")
_CONTRIBUTION = ("member", "public_key", "commitments", "signature")


def record_attempt(session: AssistedServer, total: NDArray[Any] | None) -> dict[str, Any]:
    """Return the fields of an attempt, as far as it came, as plain JSON values."""
    panel = session.panel if session.desk.closed else None
    return {
        "parameters": session.parameters.to_text(),
        "cohort": sorted(session.cohort),
        "adverts": [
            {
                "assistant": advert.assistant,
                "sealing_key": advert.sealing_key.hex(),
                "nonce": advert.nonce.hex(),
                "signature": advert.signature.hex(),
            }
            for advert in session.desk.adverts
        ],
        "session": panel.session.hex() if panel else None,
        "quorum": panel.quorum if panel else None,
        "binding": session.binding.hex() if panel else None,
        "bound": panel.bound(session.binding).hex() if panel else None,
        "contributions": [_contribution_table(one) for _, one in sorted(session.contributions.items())],
        "contributors": list(session.contributors),
        "refusals": [{"assistant": one, "members": list(refused)} for one, refused in sorted(session.refusals.items())],
        "witnesses": [{"assistant": one, "signature": made.hex()} for one, made in sorted(session.witnesses.items())],
        "answered": [{"subset": subset, "assistant": one} for subset, one in sorted(session.answered.items())],
        "compared": sorted(session.compared),
        "result": reading.result_table(total, len(session.contributors)),
    }


def _contribution_table(one: Contribution) -> dict[str, Any]:
    return {
        "member": one.member,
        "public_key": one.public_key.hex(),
        "commitments": [commitment.hex() for commitment in one.commitments],
        "signature": one.signature.hex(),
    }


@dataclass(frozen=True, kw_only=True)
class _Transcript:
    """The fields of an attempt, read and of the right form."""

    parameters: Parameters
    assistance: Assistance
    cohort: tuple[int, ...]
    adverts: tuple[AssistantAdvert, ...]
    session: bytes | None
    quorum: int | None
    binding: bytes | None
    bound: bytes | None
    contributions: Mapping[int, Contribution]
    contributors: tuple[int, ...]
    refusals: Mapping[int, tuple[int, ...]]
    witnesses: Mapping[int, bytes]
    answered: Mapping[int, int]
    compared: tuple[int, ...]
    result: tuple[int, bytes] | None

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> _Transcript:
        parameters = reading.read_parameters(fields["parameters"])
        contributions = [_read_contribution(one) for one in _tables(fields, "contributions", _CONTRIBUTION)]
        refusals = _tables(fields, "refusals", ("assistant", "members"))
        answered = _tables(fields, "answered", ("subset", "assistant"))
        reading.members([one.member for one in contributions], "the members of contributions")
        reading.members([one["assistant"] for one in refusals], "the assistants of refusals")
        reading.members([one["subset"] for one in answered], "the subsets of answered")
        return cls(
            parameters=parameters,
            assistance=Assistance.of(parameters),
            adverts=tuple(_read_advert(one) for one in _tables(fields, "adverts", _ADVERT)),
            quorum=reading.optional_whole(fields, "quorum"),
            session=reading.optional_digest(fields, "session"),
            binding=reading.optional_digest(fields, "binding"),
            bound=reading.optional_digest(fields, "bound"),
            cohort=reading.members(fields["cohort"], "cohort"),
            contributors=reading.members(fields["contributors"], "contributors"),
            compared=reading.members(fields["compared"], "compared"),
            contributions={one.member: one for one in contributions},
            refusals={one["assistant"]: reading.members(one["members"], "members of a refusal") for one in refusals},
            witnesses=reading.read_signatures(fields["witnesses"], "assistant", "witnesses"),
            answered={one["subset"]: reading.whole(one["assistant"], "who answered") for one in answered},
            result=reading.read_result(fields["result"]),
        )


def _tables(fields: Mapping[str, Any], name: str, names: tuple[str, ...]) -> list[Mapping[str, Any]]:
    return reading.entries(fields[name], names, name)


def _read_advert(one: Mapping[str, Any]) -> AssistantAdvert:
    return AssistantAdvert(
        reading.whole(one["assistant"], "assistant of an advert"),
        reading.fixed_hex(one["sealing_key"], 32, "sealing_key of an advert"),
        reading.fixed_hex(one["nonce"], 32, "nonce of an advert"),
        reading.fixed_hex(one["signature"], 64, "signature of an advert"),
    )


def _read_contribution(one: Mapping[str, Any]) -> Contribution:
    member = reading.whole(one["member"], "member of a contribution")
    listed = one["commitments"] if isinstance(one["commitments"], list) else [None]
    commitments = tuple(reading.fixed_hex(each, 32, "each of the commitments") for each in listed)
    key = reading.fixed_hex(one["public_key"], 32, "public_key of a contribution")
    return Contribution(
        member, key, commitments, {}, reading.fixed_hex(one["signature"], 64, "a contribution's signature")
    )


def check_attempt(fields: Mapping[str, Any], roster: Mapping[int, bytes] | None, findings: Findings) -> None:
    """Check the fields of one attempt; without a roster, no signature."""
    found = findings.attempt("form", "every field is there, alone, and of its form", lambda: _Transcript.read(fields))
    if found is None:
        return
    signed = found.parameters.active and roster is not None
    if not found.parameters.active:
        findings.on_trust("signatures", "the attempt was in semi-honest mode: nothing is signed")
    elif not signed:
        findings.on_trust("signatures", "no roster was given, so no signature was checked")
    _Check(found, roster if signed and roster is not None else None, findings).run()


class _Check:
    """One transcript's checks; `roster` is None where no signature is checked."""

    def __init__(self, found: _Transcript, roster: Mapping[int, bytes] | None, findings: Findings) -> None:
        self.found, self.roster, self.note = found, roster, findings

    def run(self) -> None:
        found, note = self.found, self.note
        panel = self.panel()
        if panel is None:
            return
        note.require("session", found.session == panel.session, "the session id follows from parameters and adverts")
        note.require("quorum", found.quorum == panel.quorum, f"the quorum of assistants is {panel.quorum}")
        bound = found.binding is not None and found.bound == panel.bound(found.binding)
        note.require("bound", bound, "masks and signatures are bound to the session and the digest of model and work")
        if found.bound is None:
            return
        self.contributions(panel, found.bound)
        if found.contributors:
            self.contributors(panel, found.bound)
        self.answers(panel)

    def panel(self) -> Panel | None:
        """Check which assistants advertised; return the panel unless the attempt ended there."""
        found, note = self.found, self.note
        if found.session is None:
            later = (found.quorum, found.binding, found.bound, found.result) == (None,) * 4
            lists = (found.contributions, found.contributors, found.refusals, found.witnesses, found.answered)
            empty = later and not any(lists) and not found.compared
            note.require("session", empty, "the attempt ended before a panel, and nothing after it is recorded")
            for advert in found.adverts:
                claim = f"assistant {advert.assistant} is one of this sum" + (" and signed" if self.roster else "")
                check = functools.partial(advert.check, found.parameters, self.roster or {}, self.verified)
                note.attempt("adverts", claim, check)
            return None
        signed = ", each signed by the identity on the roster" if self.roster is not None else ""
        return note.attempt(
            "adverts",
            f"{len(found.adverts)} assistants advertised, at least a quorum, with distinct keys{signed}",
            lambda: Panel.checked(found.parameters, found.adverts, self.roster or {}, self.verified),
        )

    def verified(self, key: bytes, signature: bytes, message: bytes) -> bool:
        return self.roster is None or verify(key, signature, message)

    def contributions(self, panel: Panel, bound: bytes) -> None:
        found, note = self.found, self.note
        fits = set(found.contributions) <= set(found.cohort)
        fits = fits and all(
            len(one.commitments) == len(panel.assistance.subsets) for one in found.contributions.values()
        )
        note.require("contributions", fits, f"{len(found.contributions)} of the {len(found.cohort)} asked contributed")
        for member, one in found.contributions.items() if self.roster is not None else ():
            if not verify((self.roster or {}).get(member, b""), one.signature, one.digest(bound)):
                note.failed("contributions", f"member {member} did not sign its contribution to this session and work")
        refused = {member for members in found.refusals.values() for member in members}
        fits = set(found.refusals) <= set(panel.assistants) and refused <= set(found.contributions)
        note.require("refusals", fits, f"{len(refused)} contributions were refused by an assistant")

    def contributors(self, panel: Panel, bound: bytes) -> None:
        found, note = self.found, self.note
        enough = set(found.contributors) <= set(found.contributions)
        enough = enough and len(found.contributors) >= found.parameters.minimum
        claim = f"{len(found.contributors)} contributions were to be summed, at least {found.parameters.minimum}"
        if not note.require("contributors", enough, claim):
            return
        digest = contributors_digest(bound, (found.contributions[one].digest(bound) for one in found.contributors))
        note.require(
            "witnesses",
            set(found.witnesses) <= set(panel.assistants),
            f"{len(found.witnesses)} assistants signed the contributors",
        )
        for one, signature in found.witnesses.items() if self.roster is not None else ():
            if not verify((self.roster or {}).get(one, b""), signature, digest):
                note.failed("witnesses", f"assistant {one} did not sign these contributors")

    def answers(self, panel: Panel) -> None:
        found, note, subsets = self.found, self.note, len(panel.assistance.subsets)
        if found.answered:
            enough = len(found.witnesses) >= panel.quorum and bool(found.contributors)
            note.require("quorum", enough, f"at least the quorum of {panel.quorum} signed before anybody answered")
        held = all(
            subset < subsets and one in panel.assistance.holders(subset) and one in found.witnesses
            for subset, one in found.answered.items()
        )
        note.require("answered", held, f"{len(found.answered)} sums of masks came from assistants that hold the roots")
        note.require("compared", set(found.compared) <= set(found.answered), f"{len(found.compared)} were compared")
        if found.result is None:
            opened = len(found.answered) == subsets
            could = "all masks were summed up, so whether there is one is the server's word"
            note.on_trust("result", f"no sum is recorded; {could if opened else 'masks are still on it'}")
            return
        note.require("opened", len(found.answered) == subsets, f"the masks of all {subsets} subsets were summed up")
        counted = found.result[0] == len(found.contributors) > 0
        note.require("result", counted, f"the sum is that of the {len(found.contributors)} contributors")
        note.on_trust("on trust", f"the server's word, as far as it fits the rest: {', '.join(ON_TRUST)}")

"""What can be checked in the transcript of a SecAgg+ attempt: every signature, set, threshold, id and bound.

Guarantees: whatever a transcript holds, the outcome is a list of findings.
Trust: without a roster no signature is checked, and in semi-honest mode there is none; the findings say so.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from fedml_core.secagg.adverts import check_signature, verify
from fedml_core.secagg.bulletin import Bulletin
from fedml_core.secagg.pairing import bound_id
from fedml_core.secagg.survivors import survivors_digest
from fedml_core.secagg.transcript_reading import Findings
from fedml_core.secagg.transcript_secagg import ON_TRUST, Transcript

__all__ = ["check_attempt"]


def check_attempt(fields: Mapping[str, Any], roster: Mapping[int, bytes] | None, findings: Findings) -> None:
    """Check the fields of one attempt; without a roster, no signature."""
    found = findings.attempt("form", "every field is there, alone, and of its form", lambda: Transcript.read(fields))
    if found is not None:
        _Check(found, roster, findings).run()


class _Check:
    """One transcript's checks, in the order of the exchanges; each ends the run if what follows would mean nothing."""

    def __init__(self, found: Transcript, roster: Mapping[int, bytes] | None, findings: Findings) -> None:
        self.found, self.note = found, findings
        self.signed = found.parameters.active and roster is not None
        self.roster = roster if roster is not None else {}

    def run(self) -> None:
        bulletin = self.adverts()
        if bulletin is None:
            return
        self.session(bulletin)
        if self.reached("shares", self.found.bound, (self.found.survivors, self.found.complaints)):
            self.shares(bulletin)
            if self.reached("survivors", self.found.survivors, (self.found.confirmations,)):
                self.survivors(bulletin)
                self.confirmations(bulletin)
                self.unmasking(bulletin)
        self.result(bulletin)

    def reached(self, what: str, is_there: object, later: tuple[Any, ...]) -> bool:
        """Note whether an exchange was reached; what comes after one that was not must be empty."""
        if is_there:
            return True
        empty = not any(later) and not self.found.unmasked and self.found.result is None
        self.note.require(what, empty, "the attempt ended before this exchange, and nothing after it is recorded")
        return False

    def adverts(self) -> Bulletin | None:
        """Check who advertised; return the bulletin unless the attempt ended there."""
        found, note = self.found, self.note
        count = len(found.adverts)
        strangers = {advert.member for advert in found.adverts}.difference(found.cohort)
        note.require(
            "adverts", not strangers, f"all {count} members that advertised are of the {len(found.cohort)} asked"
        )
        if not found.parameters.active:
            note.on_trust("signatures", "the attempt was in semi-honest mode: nothing is signed")
        elif not self.signed:
            note.on_trust("signatures", "no roster was given, so no signature was checked")
        if found.session is None:
            self.ended_early()
            return None
        roster = self.roster if self.signed else {advert.member: b"" for advert in found.adverts}
        trusting = verify if self.signed else lambda *_: True
        signed = ", each signed by the identity on the roster" if self.signed else ""
        return note.attempt(
            "adverts",
            f"{count} members advertised, at least {found.parameters.minimum}, with distinct keys{signed}",
            lambda: Bulletin.checked(found.parameters, found.adverts, roster, trusting),
        )

    def ended_early(self) -> None:
        found = self.found
        for advert in found.adverts if self.signed else ():
            check = functools.partial(check_signature, found.parameters, advert, self.roster, verify)
            self.note.attempt("adverts", f"member {advert.member} signed its advertisement", check)
        later = (found.degree, found.threshold, found.quorum, found.binding, found.bound)
        lists = (found.sharers, found.survivors, found.confirmations, found.unmasked, found.complaints, found.liars)
        empty = not any(lists) and later == (None,) * 5 and found.result is None
        self.note.require("session", empty, "the attempt ended before a bulletin, and nothing after it is recorded")

    def session(self, bulletin: Bulletin) -> None:
        found, note = self.found, self.note
        note.require("session", found.session == bulletin.session, "the session id follows from parameters and adverts")
        for name, computed in (
            ("degree", bulletin.degree),
            ("threshold", bulletin.threshold),
            ("quorum", bulletin.quorum),
        ):
            note.require(
                name, getattr(found, name) == computed, f"the {name} of {len(found.adverts)} members is {computed}"
            )

    def shares(self, bulletin: Bulletin) -> None:
        found, note = self.found, self.note
        among = set(found.sharers) <= set(bulletin.members) and len(found.sharers) >= bulletin.fewest
        note.require("shares", among, f"{len(found.sharers)} members sent shares, at least {bulletin.fewest}")
        bound = found.binding is not None and found.bound == bound_id(bulletin, found.binding)
        note.require(
            "bound", bound, "masks and confirmations are bound to the session and the digest of model and work"
        )
        about = {one for accused in found.complaints.values() for one in accused}
        fits = set(found.complaints) <= set(found.sharers) and about <= set(bulletin.members)
        fits = fits and not set(found.complaints).intersection(found.survivors)
        note.require(
            "complaints", fits, f"{len(found.complaints)} members complained of others, and none of them survived"
        )

    def survivors(self, bulletin: Bulletin) -> None:
        found, note = self.found, self.note
        alive = set(found.survivors)
        enough = alive <= set(found.sharers) and len(alive) >= bulletin.fewest
        note.require(
            "survivors", enough, f"{len(alive)} of those that sent shares survived, at least {bulletin.fewest}"
        )
        if not alive <= set(bulletin.members):
            return
        known = [member for member in found.sharers if member in bulletin.places]
        left = min((len(alive.intersection(bulletin.holders(member))) for member in known), default=0)
        note.require("holders", left >= bulletin.threshold, f"{bulletin.threshold} holders of every secret survived")
        note.require("graph", bulletin.connects(found.survivors), "the survivors are connected by masks between them")

    def confirmations(self, bulletin: Bulletin) -> None:
        found, note = self.found, self.note
        if found.bound is None or not found.confirmations:
            return
        members = set(found.confirmations) <= set(found.survivors)
        note.require("confirmations", members, f"{len(found.confirmations)} survivors confirmed who survived")
        if self.signed:
            digest = survivors_digest(found.bound, found.survivors)
            for member, signature in found.confirmations.items():
                if not verify(self.roster.get(member, b""), signature, digest):
                    note.failed("confirmations", f"member {member} did not sign these survivors")
        if found.parameters.active and found.unmasked:
            enough = len(found.confirmations) >= bulletin.quorum
            note.require(
                "quorum", enough, f"at least the quorum of {bulletin.quorum} confirmed before anybody unmasked"
            )

    def unmasking(self, bulletin: Bulletin) -> None:
        found, note = self.found, self.note
        confirmed = set(found.unmasked) <= set(found.confirmations)
        note.require("unmasked", confirmed, f"{len(found.unmasked)} of those that confirmed unmasked")
        note.require("liars", set(found.liars) <= set(found.unmasked), f"{len(found.liars)} sent wrong shares")

    def opened(self, bulletin: Bulletin) -> bool:
        """Return whether enough right shares of every secret came."""
        honest = set(self.found.unmasked).difference(self.found.liars)
        sharers = [member for member in self.found.sharers if member in bulletin.places]
        least = min((len(honest.intersection(bulletin.holders(member))) for member in sharers), default=0)
        return least >= bulletin.threshold

    def result(self, bulletin: Bulletin) -> None:
        found, note = self.found, self.note
        if found.result is None:
            note.on_trust("result", "no sum is recorded; " + self.could_have(bulletin))
            return
        count, _ = found.result
        enough = f"{bulletin.threshold} holders of every secret unmasked"
        note.require("opened", self.opened(bulletin), enough)
        counted = count == len(found.survivors) and count > 0
        note.require("result", counted, f"the sum is that of the {len(found.survivors)} survivors")
        note.on_trust("on trust", f"the server's word, as far as it fits the rest: {', '.join(ON_TRUST)}")

    def could_have(self, bulletin: Bulletin) -> str:
        if self.found.unmasked and self.opened(bulletin):
            return "enough shares came to open one, so whether it was opened is the server's word"
        return "too few shares came to open one"

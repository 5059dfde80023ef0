"""What a SecAgg+ attempt records, without any secret, and what can be checked in it afterwards.

Guarantees: a transcript holds nothing but what the server and every member saw, and the digest of the sum.
Trust: signatures and everything that is computed from signed values are checked; who sent shares, who unmasked, who
    complained and lied, and the digest of the sum are the server's word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from fedml_core.secagg import transcript_reading as reading
from fedml_core.secagg.adverts import Advert
from fedml_core.secagg.parameters import Parameters
from fedml_core.secagg.server import ServerSession

__all__ = ["FIELDS", "ON_TRUST", "PROTOCOL", "Transcript", "record_attempt"]

PROTOCOL = "secagg+"
FIELDS = (
    *("parameters", "cohort", "adverts", "session", "degree", "threshold", "quorum", "sharers", "binding", "bound"),
    *("survivors", "confirmations", "unmasked", "complaints", "liars", "result"),
)
ON_TRUST = ("cohort", "sharers", "unmasked", "complaints", "liars", "result.digest")
"""Fields of which a change may go unnoticed as long as they fit the others: nobody but the server vouches for them."""

_ADVERT = ("member", "sealing_key", "mask_key", "nonce", "commitment", "signature")


def record_attempt(session: ServerSession, total: NDArray[Any] | None) -> dict[str, Any]:
    """Return the fields of an attempt, as far as it came, as plain JSON values."""
    closed = session.closed
    bulletin = session.bulletin if closed else None
    return {
        "parameters": session.parameters.to_text(),
        "cohort": sorted(session.cohort),
        "adverts": [_advert_table(advert) for advert in session.adverts],
        "session": bulletin.session.hex() if bulletin else None,
        "degree": bulletin.degree if bulletin else None,
        "threshold": bulletin.threshold if bulletin else None,
        "quorum": bulletin.quorum if bulletin else None,
        "sharers": list(session.sharers),
        "binding": session.binding.hex() if session.sharers else None,
        "bound": session.bound.hex() if session.sharers else None,
        "survivors": list(session.survivors),
        "confirmations": [
            {"member": member, "signature": signature.hex()}
            for member, signature in sorted(session.confirmations.items())
        ],
        "unmasked": list(session.unmasked),
        "complaints": [
            {"member": member, "about": sorted(about)} for member, about in sorted(session.complaints.items())
        ],
        "liars": sorted(session.liars),
        "result": reading.result_table(total, len(session.survivors)),
    }


def _advert_table(advert: Advert) -> dict[str, Any]:
    values = zip(_ADVERT[1:5], advert.values, strict=True)
    named = {name: value.hex() for name, value in values}
    return {"member": advert.member, **named, "signature": advert.signature.hex()}


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """The fields of an attempt, read and of the right form; those of exchanges that were not reached are None."""

    parameters: Parameters
    cohort: tuple[int, ...]
    adverts: tuple[Advert, ...]
    session: bytes | None
    degree: int | None
    threshold: int | None
    quorum: int | None
    sharers: tuple[int, ...]
    binding: bytes | None
    bound: bytes | None
    survivors: tuple[int, ...]
    confirmations: Mapping[int, bytes]
    unmasked: tuple[int, ...]
    complaints: Mapping[int, tuple[int, ...]]
    liars: tuple[int, ...]
    result: tuple[int, bytes] | None

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Transcript:
        """Return the transcript in JSON values.

        Raises: SecureAggregationError: at the first value that is not of the right form.
        """
        return cls(
            parameters=reading.read_parameters(fields["parameters"]),
            adverts=tuple(_read_advert(one) for one in reading.entries(fields["adverts"], _ADVERT, "adverts")),
            confirmations=reading.read_signatures(fields["confirmations"], "member", "confirmations"),
            complaints=_read_complaints(fields["complaints"]),
            result=reading.read_result(fields["result"]),
            session=reading.optional_digest(fields, "session"),
            degree=reading.optional_whole(fields, "degree"),
            threshold=reading.optional_whole(fields, "threshold"),
            quorum=reading.optional_whole(fields, "quorum"),
            binding=reading.optional_digest(fields, "binding"),
            bound=reading.optional_digest(fields, "bound"),
            cohort=reading.members(fields["cohort"], "cohort"),
            sharers=reading.members(fields["sharers"], "sharers"),
            survivors=reading.members(fields["survivors"], "survivors"),
            unmasked=reading.members(fields["unmasked"], "unmasked"),
            liars=reading.members(fields["liars"], "liars"),
        )


def _read_advert(one: Mapping[str, Any]) -> Advert:
    sealing, mask, nonce, commitment = (
        reading.fixed_hex(one[name], 32, f"{name} of an advert") for name in _ADVERT[1:5]
    )
    signature = reading.fixed_hex(one["signature"], 64, "signature of an advert")
    return Advert(reading.whole(one["member"], "member of an advert"), sealing, mask, nonce, commitment, signature)


def _read_complaints(value: Any) -> dict[int, tuple[int, ...]]:
    found = reading.entries(value, ("member", "about"), "complaints")
    numbers = reading.members([one["member"] for one in found], "the members of complaints")
    return {
        number: reading.members(one["about"], "what a complaint is about")
        for number, one in zip(numbers, found, strict=True)
    }

"""A signed roster as secure aggregation needs it: who is admitted, under which identity key, and one digest of that.

Guarantees: two parties have the same digest only if the same operator admitted the same members with the same keys in
    the same change, so a roster that changed makes other sessions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from fedml_core.errors import ConfigError
from fedml_core.roster import Roster, read_roster

__all__ = ["PinnedRoster", "pin_roster"]


@dataclass(frozen=True)
class PinnedRoster:
    """The admitted members of a roster that `operator` signed.

    `keys`: 32 bytes (Ed25519) by member. `revoked`: who was admitted once. `serial`: grows with every change.
    `operator`: public key as hex. `digest`: hex, of operator, serial and keys.
    """

    keys: Mapping[int, bytes] = field(repr=False)
    revoked: frozenset[int]
    serial: int
    operator: str
    digest: str

    @classmethod
    def of(cls, roster: Roster) -> PinnedRoster:
        """Return what secure aggregation needs of a roster.

        Raises: ConfigError: if nobody signed it.
        """
        if not roster.operator:
            raise ConfigError(
                "the roster is not signed, and secure aggregation needs one that is; the operator runs fedveil keys "
                "operator once, then fedveil keys sign, and sends the roster to every site"
            )
        keys = {site.client_id: site.keys.identity for site in sorted(roster.admitted, key=lambda one: one.client_id)}
        digest = hashlib.sha256(b"fedveil/pinned-roster/1")
        digest.update(bytes.fromhex(roster.operator) + roster.serial.to_bytes(8, "big"))
        for member, key in keys.items():
            digest.update(member.to_bytes(4, "big") + key)
        revoked = frozenset(site.client_id for site in roster.sites if site.revoked)
        return cls(MappingProxyType(keys), revoked, roster.serial, roster.operator, digest.hexdigest())

    def require_member(self, member: int, identity: bytes) -> None:
        """Check that the roster admits `member` under its own identity key.

        Raises: ConfigError: if it does not, saying why.
        """
        if member in self.revoked:
            raise ConfigError(
                f"client {member} is revoked on the roster of serial {self.serial}; ask the operator why, and for "
                "a new number"
            )
        if member not in self.keys:
            raise ConfigError(
                f"client {member} is not on the roster of serial {self.serial}; ask the operator to enrol it, and for "
                "the roster"
            )
        if self.keys[member] != identity:
            raise ConfigError(
                f"the roster of serial {self.serial} has another identity key for client {member} than this site's; "
                "check id and keys.site, or ask the operator to enrol these keys"
            )


def pin_roster(path: Path, operator: str) -> PinnedRoster:
    """Return the roster in a file, if the operator whose public key is given (64 hex digits) signed it.

    Raises: ConfigError: if the file is missing, damaged or not signed, or another operator signed it.
    """
    pinned = PinnedRoster.of(read_roster(path))
    if pinned.operator != operator:
        raise ConfigError(
            f"the roster {path} is signed by {pinned.operator[:16]}, the pinned operator is {operator[:16]}; ask your "
            "operator, over another channel, which is right"
        )
    return pinned

"""The operator's roster: every site that was ever enrolled, signed as a whole, with a serial that every change raises.

A roster of version 1 is not signed. It says whom a server admits, and is not enough for secure aggregation, where sites
must believe it even if the server lies.

Guarantees: a key that was enrolled once cannot be enrolled again, under any name, not even after it was revoked.
Guarantees: a signed roster that was altered by anybody but the operator is not read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedml_core import private_files
from fedml_core.errors import ConfigError
from fedml_core.key_files import read_form
from fedml_core.operator_key import is_operator
from fedml_core.site_keys import PublicKeys, public_keys, read_public_keys

__all__ = ["Roster", "Site", "enrol", "read_roster", "revoke", "sign_roster"]

_FORMAT = "fedveil-roster"
_UNSIGNED, _SIGNED = 1, 2
_ENTRIES = {_UNSIGNED: ("sites",), _SIGNED: ("serial", "operator", "sites", "signature")}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SIGNATURE = re.compile(r"[0-9a-f]{128}")
_MAX_CLIENT_ID = 2**31 - 1
_MAX_SERIAL = 2**53


@dataclass(frozen=True)
class Site:
    """One line of a roster."""

    client_id: int
    name: str
    keys: PublicKeys
    revoked: bool = False


@dataclass(frozen=True)
class Roster:
    """Every site that was ever enrolled, in order of enrolment; client ids, names and keys are each unique.

    `serial`: how many changes the operator has signed. `operator`: the public key that signed, as hex. A roster that is
    not signed has serial 0 and no operator.
    """

    sites: tuple[Site, ...] = ()
    serial: int = 0
    operator: str = ""

    @property
    def admitted(self) -> tuple[Site, ...]:
        """Return the sites that may take part now."""
        return tuple(site for site in self.sites if not site.revoked)

    def by_node_key(self) -> Mapping[bytes, Site]:
        """Return the admitted sites by the PEM bytes of their node key."""
        return {site.keys.node: site for site in self.admitted}

    @property
    def signed_bytes(self) -> bytes:
        """Return what the operator signs: serial, operator and every line, in one canonical form."""
        content = {"serial": self.serial, "operator": self.operator, "sites": _lines(self.sites)}
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return f"{_FORMAT} {_SIGNED}\n{canonical}".encode()


def read_roster(path: Path) -> Roster:
    """Return the roster in a file, signed or not.

    Guarantees: if `operator` is not empty, its key signed all of it; whether that is the right key, the caller decides.
    Raises: ConfigError: if the file is missing or damaged, two sites share a client id, a name or a key, or its
        signature does not hold.
    """
    content = read_form(path, "the roster", _FORMAT, _ENTRIES)
    if not isinstance(content["sites"], list):
        raise ConfigError(f"the roster {path} must hold a list of sites, got {type(content['sites']).__name__}")
    sites = [_site(entry, f"site {index} of the roster {path}") for index, entry in enumerate(content["sites"])]
    _require_distinct(sites, f"the roster {path}")
    if content["version"] == _UNSIGNED:
        return Roster(tuple(sites))
    roster = Roster(tuple(sites), content["serial"], content["operator"])
    _require_signature(roster, content["signature"], path)
    return roster


def enrol(
    roster_path: Path, public_path: Path, *, name: str, client_id: int, operator: Ed25519PrivateKey | None = None
) -> Site:
    """Add the site that sent `public_path` to the roster file, which is made if there is none; return its line.

    Compare `site.keys.fingerprint` with the site over another channel: mail can be forged.
    Args: operator: the key to sign with; needed if the roster is signed, and an unsigned one becomes signed by it.
    Raises: ConfigError: if a file is damaged, the key is not the roster's operator's, or the client id, the name or a
        key is on the roster already.
    """
    keys = read_public_keys(public_path)
    roster = read_roster(roster_path) if roster_path.exists() else Roster()
    _require_operator(roster, operator, roster_path)
    site = _checked(Site(client_id, name, keys), f"the site {name!r}")
    sites = (*roster.sites, site)
    _require_distinct(sites, f"the roster {roster_path}")
    _write_roster(roster_path, replace(roster, sites=sites), operator)
    return site


def revoke(roster_path: Path, name: str, *, operator: Ed25519PrivateKey | None = None) -> Site:
    """Mark a site as revoked in the roster file and return its line; its id and keys stay taken.

    Args: operator: as `enrol`.
    Raises: ConfigError: if no admitted site has that name, or the key is not the roster's operator's.
    """
    roster = read_roster(roster_path)
    _require_operator(roster, operator, roster_path)
    found = [site for site in roster.admitted if site.name == name]
    if not found:
        known = ", ".join(site.name for site in roster.admitted) or "none"
        raise ConfigError(f"the roster {roster_path} admits no site {name!r}; admitted are: {known}")
    revoked = replace(found[0], revoked=True)
    sites = tuple(revoked if site is found[0] else site for site in roster.sites)
    _write_roster(roster_path, replace(roster, sites=sites), operator)
    return revoked


def sign_roster(roster_path: Path, operator: Ed25519PrivateKey) -> Roster:
    """Sign a roster as it stands, and return it: one that is not signed yet, or that another operator takes over.

    Every site that pinned another operator must pin the new one. A roster that this key signed stays as it is.
    Raises: ConfigError: if the roster is missing or damaged.
    """
    roster = read_roster(roster_path)
    if roster.operator == _public(operator):
        return roster
    return _write_roster(roster_path, roster, operator)


def _require_operator(roster: Roster, operator: Ed25519PrivateKey | None, path: Path) -> None:
    if roster.operator and operator is None:
        raise ConfigError(
            f"the roster {path} is signed; give the operator's key with --operator, or nobody could check the change"
        )
    if roster.operator and operator is not None and roster.operator != _public(operator):
        raise ConfigError(
            f"the roster {path} is signed by the operator {roster.operator[:16]}, not by {_public(operator)[:16]}; "
            "give its own operator's key, or take it over with fedveil keys sign"
        )


def _require_distinct(sites: Sequence[Site], where: str) -> None:
    seen: dict[tuple[str, object], Site] = {}
    for site in sites:
        marks: tuple[tuple[str, object], ...] = (
            ("client id {}", site.client_id),
            ("name {!r}", site.name),
            ("identity key", site.keys.identity),
            ("node key", site.keys.node),
        )
        for mark in marks:
            other = seen.setdefault(mark, site)
            if other is not site:
                raise ConfigError(f"{where} has the {mark[0].format(mark[1])} twice; {other.name!r} holds it already")


def _require_signature(roster: Roster, signature: object, path: Path) -> None:
    serial, operator = roster.serial, roster.operator
    if type(serial) is not int or not 1 <= serial <= _MAX_SERIAL:
        raise ConfigError(f"the roster {path} must have a serial from 1, got {str(serial)[:40]}")
    if not isinstance(operator, str) or not is_operator(operator):
        raise ConfigError(f"the roster {path} must name its operator by 64 hex digits, got {str(operator)[:80]!r}")
    try:
        if not isinstance(signature, str) or not _SIGNATURE.fullmatch(signature):
            raise ValueError("a signature has 128 hex digits")
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(operator))
        key.verify(bytes.fromhex(signature), roster.signed_bytes)
    except (InvalidSignature, ValueError):
        raise ConfigError(f"the roster {path} is not signed by the operator that it names; ask for it again") from None


def _checked(site: Site, where: str) -> Site:
    if isinstance(site.client_id, bool) or not isinstance(site.client_id, int):
        raise ConfigError(f"{where} needs a whole number as client id, got {site.client_id!r}")
    if not 0 <= site.client_id <= _MAX_CLIENT_ID:
        raise ConfigError(f"{where} needs a client id between 0 and {_MAX_CLIENT_ID}, got {site.client_id}")
    if not isinstance(site.name, str) or not _NAME.fullmatch(site.name):
        raise ConfigError(f"{where} needs a name of 1 to 64 letters, digits, '.', '_', '-', got {site.name!r}")
    if not isinstance(site.revoked, bool):
        raise ConfigError(f"{where} must say true or false for 'revoked', got {site.revoked!r}")
    return site


def _site(entry: Any, where: str) -> Site:
    names = {"client_id", "name", "identity", "node", "revoked"}
    if not isinstance(entry, dict) or set(entry) != names:
        raise ConfigError(f"{where} must have exactly the entries {', '.join(sorted(names))}")
    return _checked(Site(entry["client_id"], entry["name"], public_keys(entry, where), entry["revoked"]), where)


def _write_roster(path: Path, roster: Roster, operator: Ed25519PrivateKey | None) -> Roster:
    content: dict[str, Any] = {"format": _FORMAT, "version": _UNSIGNED, "sites": _lines(roster.sites)}
    if operator is not None:
        roster = replace(roster, serial=roster.serial + 1, operator=_public(operator))
        signed = {"version": _SIGNED, "serial": roster.serial, "operator": roster.operator}
        content |= {**signed, "signature": operator.sign(roster.signed_bytes).hex()}
    private_files.replace(path, private_files.to_json(content), private_files.SHARED)
    return roster


def _lines(sites: Sequence[Site]) -> list[dict[str, Any]]:
    return [
        {
            "client_id": site.client_id,
            "name": site.name,
            "revoked": site.revoked,
            "identity": site.keys.identity.hex(),
            "node": site.keys.node.decode(),
        }
        for site in sites
    ]


def _public(operator: Ed25519PrivateKey) -> str:
    return operator.public_key().public_bytes_raw().hex()

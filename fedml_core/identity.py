"""Who is who: a site's two keys, the public half it mails to an operator, and the operator's roster of sites.

An Ed25519 identity key signs what other sites must be able to believe even if the server lies. An ECDSA P-384 node key
opens the connection to the server. Both are made at the site and never leave it. The server side of TLS is in
`fedml_core.tls`.

Guarantees: a file with a secret is written with mode 0600, whole or not at all, and never over an existing file.
Guarantees: a public file proves that its sender holds both keys: each key signs both.
Guarantees: a key that was enrolled once cannot be enrolled again, under any name, not even after it was revoked.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedml_core import private_files
from fedml_core.errors import ConfigError

KEYS_FILE = "site-keys.json"
PUBLIC_FILE = "site-public.json"
_KEYS_FORMAT, _PUBLIC_FORMAT, _ROSTER_FORMAT = "fedveil-site-keys", "fedveil-site-public", "fedveil-roster"
_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_CLIENT_ID = 2**31 - 1


@dataclass(frozen=True)
class SiteKeys:
    """A site's secrets: what signs, and what opens the connection."""

    identity: Ed25519PrivateKey = field(repr=False)
    node: ec.EllipticCurvePrivateKey = field(repr=False)


@dataclass(frozen=True)
class PublicKeys:
    """What others may know of a site's keys: 32 raw bytes (Ed25519) and a PEM block (P-384)."""

    identity: bytes
    node: bytes

    @property
    def fingerprint(self) -> str:
        """Return 32 hex digits in groups of four, to be compared over the telephone before a site is enrolled."""
        digest = hashlib.sha256(_PUBLIC_FORMAT.encode() + self.identity + self.node).hexdigest()[:32]
        return " ".join(digest[start : start + 4] for start in range(0, 32, 4))


@dataclass(frozen=True)
class Site:
    """One line of a roster."""

    client_id: int
    name: str
    keys: PublicKeys
    revoked: bool = False


@dataclass(frozen=True)
class Roster:
    """Every site that was ever enrolled, in order of enrolment; client ids, names and keys are each unique."""

    sites: tuple[Site, ...] = ()

    @property
    def admitted(self) -> tuple[Site, ...]:
        """Return the sites that may take part now."""
        return tuple(site for site in self.sites if not site.revoked)

    def by_node_key(self) -> Mapping[bytes, Site]:
        """Return the admitted sites by the PEM bytes of their node key."""
        return {site.keys.node: site for site in self.admitted}


def new_site_keys(directory: Path) -> PublicKeys:
    """Make a site's keys in `directory`: `site-keys.json` stays there, `site-public.json` is for the operator.

    Guarantees: the secrets have mode 0600; nothing is overwritten.
    Raises: ConfigError: if one of the files exists, or cannot be written.
    """
    private_files.make_folder(directory)
    if (public_path := directory / PUBLIC_FILE).exists():
        raise ConfigError(f"{public_path} exists already and is not overwritten; move it away first")
    keys = SiteKeys(Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1()))
    secret = {
        "format": _KEYS_FORMAT,
        "version": _VERSION,
        "identity": _private_pem(keys.identity),
        "node": _private_pem(keys.node),
    }
    private_files.write_new(directory / KEYS_FILE, private_files.to_json(secret), private_files.SECRET)
    write_public_keys(keys, public_path)
    return public_half(keys)


def read_site_keys(path: Path) -> SiteKeys:
    """Return the keys in a site's `site-keys.json`, or in the folder that holds it.

    Raises: ConfigError: if the file is missing, damaged, or readable by others than its owner.
    """
    path = path / KEYS_FILE if path.is_dir() else path
    content = _read(path, "the site's keys", _KEYS_FORMAT, ("identity", "node"))
    if (mode := path.stat().st_mode & 0o777) & 0o077:
        raise ConfigError(f"{path} can be read by others (mode {mode:04o}); run chmod 600 on it")
    try:
        identity = serialization.load_pem_private_key(_text(content["identity"]), None)
        node = serialization.load_pem_private_key(_text(content["node"]), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(f"{path} does not hold readable keys; restore it or make new keys") from None
    if isinstance(identity, Ed25519PrivateKey) and isinstance(node, ec.EllipticCurvePrivateKey) and _is_p384(node):
        return SiteKeys(identity, node)
    raise ConfigError(f"{path} must hold an Ed25519 and a P-384 key; restore it or make new keys")


def public_half(keys: SiteKeys) -> PublicKeys:
    """Return what others may know of `keys`."""
    return PublicKeys(keys.identity.public_key().public_bytes_raw(), node_key_bytes(keys.node.public_key()))


def node_key_bytes(key: ec.EllipticCurvePublicKey) -> bytes:
    """Return a node's public key in the one form in which it is sent, compared and stored: PEM."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def write_public_keys(keys: SiteKeys, path: Path) -> None:
    """Write the file that a site mails to an operator; it holds no secret.

    Raises: ConfigError: if it exists or cannot be written.
    """
    public = public_half(keys)
    proof = _proof_text(public)
    content = {
        "format": _PUBLIC_FORMAT,
        "version": _VERSION,
        "identity": public.identity.hex(),
        "node": public.node.decode(),
        "identity_proof": keys.identity.sign(proof).hex(),
        "node_proof": keys.node.sign(proof, ec.ECDSA(hashes.SHA384())).hex(),
    }
    private_files.write_new(path, private_files.to_json(content), private_files.SHARED)


def read_public_keys(path: Path) -> PublicKeys:
    """Return the keys in a `site-public.json`.

    Guarantees: whoever made the file held both private keys.
    Raises: ConfigError: if the file is missing, damaged or altered.
    """
    names = ("identity", "node", "identity_proof", "node_proof")
    content = _read(path, "the public keys", _PUBLIC_FORMAT, names)
    public = _public_keys(content, f"{path}")
    node = serialization.load_pem_public_key(public.node)
    assert isinstance(node, ec.EllipticCurvePublicKey)
    try:
        proof = _proof_text(public)
        identity = Ed25519PublicKey.from_public_bytes(public.identity)
        identity.verify(bytes.fromhex(_text(content["identity_proof"]).decode()), proof)
        node.verify(bytes.fromhex(_text(content["node_proof"]).decode()), proof, ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError, TypeError):
        raise ConfigError(f"{path} is not signed by its own keys; ask the site to send it again") from None
    return public


def read_roster(path: Path) -> Roster:
    """Return the roster in a file.

    Raises: ConfigError: if the file is missing or damaged, or two sites share a client id, a name or a key.
    """
    content = _read(path, "the roster", _ROSTER_FORMAT, ("sites",))
    if not isinstance(content["sites"], list):
        raise ConfigError(f"the roster {path} must hold a list of sites, got {type(content['sites']).__name__}")
    roster = Roster()
    for index, entry in enumerate(content["sites"]):
        roster = _with(roster, _site(entry, f"site {index} of the roster {path}"), f"the roster {path}")
    return roster


def enrol(roster_path: Path, public_path: Path, *, name: str, client_id: int) -> Site:
    """Add the site that sent `public_path` to the roster file, which is made if there is none; return its line.

    Compare `site.keys.fingerprint` with the site over another channel: mail can be forged.
    Raises: ConfigError: if a file is damaged, or the client id, the name or a key is on the roster already.
    """
    keys = read_public_keys(public_path)
    roster = read_roster(roster_path) if roster_path.exists() else Roster()
    site = _checked(Site(client_id, name, keys), f"the site {name!r}")
    _write_roster(roster_path, _with(roster, site, f"the roster {roster_path}"))
    return site


def revoke(roster_path: Path, name: str) -> Site:
    """Mark a site as revoked in the roster file and return its line; its id and keys stay taken.

    Raises: ConfigError: if no admitted site has that name.
    """
    roster = read_roster(roster_path)
    found = [site for site in roster.admitted if site.name == name]
    if not found:
        known = ", ".join(site.name for site in roster.admitted) or "none"
        raise ConfigError(f"the roster {roster_path} admits no site {name!r}; admitted are: {known}")
    revoked = replace(found[0], revoked=True)
    _write_roster(roster_path, Roster(tuple(revoked if site is found[0] else site for site in roster.sites)))
    return revoked


def _with(roster: Roster, site: Site, where: str) -> Roster:
    for other in roster.sites:
        clashes = {
            f"client id {site.client_id}": other.client_id == site.client_id,
            f"name {site.name!r}": other.name == site.name,
            "identity key": hmac.compare_digest(other.keys.identity, site.keys.identity),
            "node key": hmac.compare_digest(other.keys.node, site.keys.node),
        }
        for what, same in clashes.items():
            if same:
                raise ConfigError(f"{where} has the {what} twice; {other.name!r} holds it already")
    return Roster((*roster.sites, site))


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
    return _checked(Site(entry["client_id"], entry["name"], _public_keys(entry, where), entry["revoked"]), where)


def _write_roster(path: Path, roster: Roster) -> None:
    sites = []
    for site in roster.sites:
        line = asdict(site)
        del line["keys"]
        sites.append({**line, "identity": site.keys.identity.hex(), "node": site.keys.node.decode()})
    content = {"format": _ROSTER_FORMAT, "version": _VERSION, "sites": sites}
    private_files.replace(path, private_files.to_json(content), private_files.SHARED)


def _public_keys(content: Mapping[str, Any], where: str) -> PublicKeys:
    try:
        identity = bytes.fromhex(_text(content["identity"]).decode())
        Ed25519PublicKey.from_public_bytes(identity)
        node = serialization.load_pem_public_key(_text(content["node"]))
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(f"{where} does not hold readable public keys; ask the site to send them again") from None
    if not isinstance(node, ec.EllipticCurvePublicKey) or not _is_p384(node):
        raise ConfigError(f"{where} must hold a P-384 node key; ask the site to send its keys again")
    return PublicKeys(identity, node_key_bytes(node))


def _read(path: Path, what: str, form: str, names: tuple[str, ...]) -> dict[str, Any]:
    content = private_files.read_json(path, what)
    if content.get("format") != form or content.get("version") != _VERSION:
        found = f"{content.get('format')!r} version {content.get('version')!r}"
        raise ConfigError(f"{what} {path} must be a {form!r} file of version {_VERSION}, got {found}")
    if set(content) != {"format", "version", *names}:
        raise ConfigError(f"{what} {path} must have exactly the entries format, version, {', '.join(names)}")
    return content


def _text(value: Any) -> bytes:
    if not isinstance(value, str):
        raise TypeError("a key must be text")
    return value.encode()


def _proof_text(public: PublicKeys) -> bytes:
    return f"{_PUBLIC_FORMAT} {_VERSION}\n".encode() + public.identity + public.node


def _is_p384(key: ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey) -> bool:
    return isinstance(key.curve, ec.SECP384R1)


def _private_pem(key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()

"""A site's two keys, and the public half that it mails to an operator.

An Ed25519 identity key signs what other sites must be able to believe even if the server lies. An ECDSA P-384 node key
opens the connection to the server. Both are made at the site and never leave it.

Guarantees: a file with a secret is written with mode 0600, whole or not at all, and never over an existing file.
Guarantees: a public file proves that its sender holds both keys: each key signs both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedml_core import private_files
from fedml_core.errors import ConfigError
from fedml_core.key_files import private_pem, read_form, require_private, text

__all__ = [
    "KEYS_FILE",
    "PUBLIC_FILE",
    "PublicKeys",
    "SiteKeys",
    "new_site_keys",
    "node_key_bytes",
    "public_half",
    "public_keys",
    "read_public_keys",
    "read_site_keys",
    "write_public_keys",
]

KEYS_FILE = "site-keys.json"
PUBLIC_FILE = "site-public.json"
_KEYS_FORMAT, _PUBLIC_FORMAT = "fedveil-site-keys", "fedveil-site-public"
_VERSION = 1


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
        "identity": private_pem(keys.identity),
        "node": private_pem(keys.node),
    }
    private_files.write_new(directory / KEYS_FILE, private_files.to_json(secret), private_files.SECRET)
    write_public_keys(keys, public_path)
    return public_half(keys)


def read_site_keys(path: Path) -> SiteKeys:
    """Return the keys in a site's `site-keys.json`, or in the folder that holds it.

    Raises: ConfigError: if the file is missing, damaged, or readable by others than its owner.
    """
    path = path / KEYS_FILE if path.is_dir() else path
    content = read_form(path, "the site's keys", _KEYS_FORMAT, {_VERSION: ("identity", "node")})
    require_private(path)
    try:
        identity = serialization.load_pem_private_key(text(content["identity"]), None)
        node = serialization.load_pem_private_key(text(content["node"]), None)
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
    content = read_form(path, "the public keys", _PUBLIC_FORMAT, {_VERSION: names})
    public = public_keys(content, f"{path}")
    node = serialization.load_pem_public_key(public.node)
    assert isinstance(node, ec.EllipticCurvePublicKey)
    try:
        proof = _proof_text(public)
        identity = Ed25519PublicKey.from_public_bytes(public.identity)
        identity.verify(bytes.fromhex(text(content["identity_proof"]).decode()), proof)
        node.verify(bytes.fromhex(text(content["node_proof"]).decode()), proof, ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError, TypeError):
        raise ConfigError(f"{path} is not signed by its own keys; ask the site to send it again") from None
    return public


def public_keys(content: Mapping[str, Any], where: str) -> PublicKeys:
    """Return the keys under `identity` (hex) and `node` (PEM); `where` begins the ConfigError if they are none."""
    try:
        identity = bytes.fromhex(text(content["identity"]).decode())
        Ed25519PublicKey.from_public_bytes(identity)
        node = serialization.load_pem_public_key(text(content["node"]))
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(f"{where} does not hold readable public keys; ask the site to send them again") from None
    if not isinstance(node, ec.EllipticCurvePublicKey) or not _is_p384(node):
        raise ConfigError(f"{where} must hold a P-384 node key; ask the site to send its keys again")
    return PublicKeys(identity, node_key_bytes(node))


def _proof_text(public: PublicKeys) -> bytes:
    return f"{_PUBLIC_FORMAT} {_VERSION}\n".encode() + public.identity + public.node


def _is_p384(key: ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey) -> bool:
    return isinstance(key.curve, ec.SECP384R1)

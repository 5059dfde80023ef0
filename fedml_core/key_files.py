"""What the files with keys have in common: a format, a version, exactly the entries of that version, private modes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedml_core import private_files
from fedml_core.errors import ConfigError

__all__ = ["private_pem", "read_form", "require_private", "text"]


def read_form(path: Path, what: str, form: str, entries: Mapping[int, tuple[str, ...]]) -> dict[str, Any]:
    """Return the JSON object in a file of the format `form`.

    Args: what: names the file in errors. entries: what must be in it beside format and version, by version.
    Raises: ConfigError: if it is missing, of another format or version, or has other entries.
    """
    content = private_files.read_json(path, what)
    version = content.get("version")
    if content.get("format") != form or type(version) is not int or version not in entries:
        found = f"{str(content.get('format'))[:40]!r} version {str(version)[:40]}"
        known = " or ".join(map(str, entries))
        raise ConfigError(f"{what} {path} must be a {form!r} file of version {known}, got {found}")
    if set(content) != {"format", "version", *entries[version]}:
        raise ConfigError(f"{what} {path} must have exactly the entries format, version, {', '.join(entries[version])}")
    return content


def require_private(path: Path) -> None:
    """Raise ConfigError if anybody but its owner may read the file."""
    if (mode := path.stat().st_mode & 0o777) & 0o077:
        raise ConfigError(f"{path} can be read by others (mode {mode:04o}); run chmod 600 on it")


def text(value: object) -> bytes:
    """Return the bytes of a text; TypeError for anything else."""
    if not isinstance(value, str):
        raise TypeError("a key must be text")
    return value.encode()


def private_pem(key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> str:
    """Return a private key as text; only ever for a file with mode 0600."""
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return key.private_bytes(*form).decode()

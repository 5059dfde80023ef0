"""The operator's key, which signs the roster: sites pin its public half, so nobody else can name who takes part.

Guarantees: the secret is written with mode 0600, whole or not at all, and never over an existing file.
"""

from __future__ import annotations

import re
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedml_core import private_files
from fedml_core.errors import ConfigError
from fedml_core.key_files import private_pem, read_form, require_private, text

__all__ = ["OPERATOR_FILE", "OPERATOR_PUBLIC_FILE", "is_operator", "new_operator_key", "read_operator_key"]

OPERATOR_FILE = "operator-key.json"
OPERATOR_PUBLIC_FILE = "operator-public.txt"
_FORMAT, _VERSION = "fedveil-operator-key", 1
_PUBLIC = re.compile(r"[0-9a-f]{64}")


def new_operator_key(directory: Path) -> bytes:
    """Make the operator's key in `directory` and return its public half, 32 bytes, which every site pins as hex.

    `operator-key.json` stays there; `operator-public.txt` holds the 64 digits for the sites.
    Raises: ConfigError: if one of the files exists, or cannot be written.
    """
    private_files.make_folder(directory)
    if (public_path := directory / OPERATOR_PUBLIC_FILE).exists():
        raise ConfigError(f"{public_path} exists already and is not overwritten; move it away first")
    key = Ed25519PrivateKey.generate()
    secret = {"format": _FORMAT, "version": _VERSION, "operator": private_pem(key)}
    private_files.write_new(directory / OPERATOR_FILE, private_files.to_json(secret), private_files.SECRET)
    public = key.public_key().public_bytes_raw()
    private_files.write_new(public_path, f"{public.hex()}\n".encode(), private_files.SHARED)
    return public


def read_operator_key(path: Path) -> Ed25519PrivateKey:
    """Return the key in an `operator-key.json`, or in the folder that holds it.

    Raises: ConfigError: if the file is missing, damaged, or readable by others than its owner.
    """
    path = path / OPERATOR_FILE if path.is_dir() else path
    content = read_form(path, "the operator's key", _FORMAT, {_VERSION: ("operator",)})
    require_private(path)
    try:
        key = serialization.load_pem_private_key(text(content["operator"]), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(f"{path} does not hold a readable key; restore it from a copy") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} must hold an Ed25519 key; restore it from a copy")
    return key


def is_operator(digits: str) -> bool:
    """Return whether a text has the form of an operator's public key: 64 hexadecimal digits, lower-case."""
    return _PUBLIC.fullmatch(digits) is not None

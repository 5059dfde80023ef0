"""Files that must never be half written, overwritten by accident, or readable by others."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

from fedml_core.errors import ConfigError

SECRET = 0o600
SHARED = 0o644


def make_folder(path: Path) -> None:
    """Create a folder that only its owner can enter; one that exists is left as it is.

    Raises: ConfigError: if it cannot be created.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the folder {path} cannot be made: {error.strerror}; choose another") from error


def write_new(path: Path, content: bytes, mode: int) -> None:
    """Write a file that does not exist yet, whole or not at all.

    Guarantees: the bytes are never readable with more than `mode`, not even while they are written; an existing file
    is never touched. Raises: ConfigError: if the file exists or cannot be written.
    """
    draft = _write_draft(path, content, mode)
    try:
        os.link(draft, path)  # unlike a rename, a link refuses to replace what is there
    except FileExistsError:
        raise ConfigError(f"{path} exists already and is not overwritten; move it away first") from None
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        draft.unlink()


def replace(path: Path, content: bytes, mode: int) -> None:
    """Write a file, or replace it: a reader sees the old bytes or the new ones, never a mixture.

    Raises: ConfigError: if the file cannot be written; the old one is then still there.
    """
    draft = _write_draft(path, content, mode)
    try:
        draft.replace(path)
    except OSError as error:
        draft.unlink()
        raise _unwritable(path, error) from error


def sync_folder(folder: Path) -> None:
    """Return once the folder's own list of files is on the disk; else a power cut could undo a rename.

    Windows cannot open folders, and does not need it. Raises: OSError: if the disk fails.
    """
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(path: Path, what: str, limit_bytes: int = 1 << 24) -> bytes:
    """Return a file's bytes; `what` names it in errors.

    Raises: ConfigError: if it is missing, unreadable or longer than `limit_bytes`.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(limit_bytes + 1)
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read: {error.strerror}") from error
    if len(content) > limit_bytes:
        raise ConfigError(f"{what} {path} is longer than {limit_bytes} bytes; is it the right file?")
    return content


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises: ConfigError: if it is missing, unreadable, or holds anything else.
    """
    content = read(path, what)
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{what} {path} is not JSON ({type(error).__name__}); is it the right file?") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{what} {path} must hold a JSON object, got {type(value).__name__}")
    return value


def to_json(value: dict[str, Any]) -> bytes:
    """Return a JSON object as people like to read it."""
    return (json.dumps(value, indent=2) + "\n").encode()


def _write_draft(path: Path, content: bytes, mode: int) -> Path:
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        draft.unlink()
        raise _unwritable(path, error) from error
    return draft


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{path} cannot be written: {error.strerror}; check the folder and its permissions")

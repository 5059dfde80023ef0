"""A tree in one file: written whole or not at all, and checked when read. Used for checkpoints and client memories."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save as _save_tensors

from fedml_core.errors import CheckpointError
from fedml_core.private_files import sync_folder
from fedml_core.strict_json import json_text
from fedml_core.wire import Frame, Tree, from_frame, to_frame

_FORMAT = "fedveil/1"


def save_tree(path: Path, kind: str, tree: Tree, mode: int = 0o644) -> None:
    """Write `tree` to `path` atomically, with its kind and checksum; `mode`: who may read the file.

    Guarantees: after a crash or power cut at any moment, `path` holds either the old file or the whole new one.
    """
    frame = to_frame(kind, tree)
    tensors = {name: torch.from_numpy(array) for name, array in frame.arrays.items()}
    metadata = {"format": _FORMAT, "kind": kind, "header": frame.header, "sha256": _checksum(frame)}
    write_atomically(path, _save_tensors(tensors, metadata), mode)


def load_tree(path: Path, kind: str) -> dict[str, Any]:
    """Return the tree that `save_tree` wrote.

    Raises: CheckpointError: if the file is missing, damaged, of another kind or of an unknown format.
    """
    try:
        with safetensors.safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} does not exist; start without --resume, or name the folder of the run"
        ) from error
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; restore it from a copy, or start a new run") from error
    if metadata.get("format") != _FORMAT or metadata.get("kind") != kind:
        found = f"{metadata.get('format')} {metadata.get('kind')}"
        raise CheckpointError(f"{path} holds {found!r}, expected {_FORMAT} {kind!r}")
    frame = Frame(kind, metadata.get("header", ""), arrays)
    if metadata.get("sha256") != _checksum(frame):
        raise CheckpointError(f"{path} is damaged: its checksum is wrong; restore it from a copy, or start a new run")
    return from_frame(frame)


def write_atomically(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write `data` to `path` through a temporary file, a flush to disk and a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically."""
    write_atomically(path, (json_text(value, indent=2) + "\n").encode())


def _checksum(frame: Frame) -> str:
    digest = hashlib.sha256(frame.header.encode())
    for name in sorted(frame.arrays):
        array = frame.arrays[name]
        digest.update(f"{name}{array.dtype.str}{array.shape}".encode())
        digest.update(array.reshape(-1).view("u1").data)
    return digest.hexdigest()

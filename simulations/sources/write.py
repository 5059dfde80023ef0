"""Writing clients into one packed file, without ever holding more than one of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fedml_core.data import ClientData, Data, batch_of
from fedml_core.errors import ConfigError, TaskError
from simulations.sources.columns import TEST, Array
from simulations.sources.safetensors_files import DTYPES, SUFFIX

if TYPE_CHECKING:  # populations are made of sources, too
    from simulations.population import Population

_NAMES = {np.dtype(code): name for name, code in DTYPES.items()}


def write_packed(path: str | Path, population: Population) -> None:
    """Write every client of `population` into one file that `SafetensorsClients` reads.

    Each client is loaded twice, first to measure, then to write, and must be the same both times. The file appears
    whole or not at all.

    Raises: ConfigError: if the path does not end in .safetensors. TaskError: if a client's data are not like client
        0's, or cannot be stored.
    Example:
        write_packed("clients.safetensors", partition(task, Dirichlet(0.3), 10_000, seed=1))
    """
    target = Path(path)
    if target.suffix != SUFFIX:
        raise ConfigError(f"a packed file's name must end in {SUFFIX}, got {target.name}")
    columns = _measured(population)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            _write(file, columns, population)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass
class _Column:
    """One array to write: rows of one kind and shape. `written`: bytes so far, from `start`."""

    dtype: np.dtype[np.generic]
    row: tuple[int, ...]
    rows: int = 0
    start: int = 0
    written: int = 0

    @property
    def size_bytes(self) -> int:
        return self.rows * self.dtype.itemsize * int(np.prod(self.row, dtype=np.int64))


@dataclass
class _Columns:
    by_name: dict[str, _Column] = field(default_factory=dict)
    counts: dict[str, Array] = field(default_factory=dict)


def _measured(population: Population) -> _Columns:
    found = _Columns(counts={prefix: np.zeros(len(population), dtype=np.int64) for prefix in ("", TEST)})
    for client in range(len(population)):
        for name, array in _arrays(client, population.load(client)):
            column = found.by_name.setdefault(name, _Column(array.dtype, array.shape[1:]))
            if (column.dtype, column.row) != (array.dtype, array.shape[1:]):
                raise TaskError(
                    f"client {client}'s {name} are {array.dtype} of shape {array.shape[1:]} an example, those before "
                    f"it {column.dtype} of {column.row}; make them alike"
                )
            column.rows += len(array)
            if name.endswith("targets"):
                found.counts[name.removesuffix("targets")][client] = len(array)
    for prefix, counts in found.counts.items():
        for name in (name for name in found.by_name if name.startswith(f"{prefix}inputs")):
            if found.by_name[name].rows != counts.sum():
                raise TaskError(f"some clients have no {name} and others have; give all the same inputs")
    return found


def _write(file: BinaryIO, columns: _Columns, population: Population) -> None:
    prefixes = [prefix for prefix in ("", TEST) if f"{prefix}targets" in columns.by_name]
    offsets = {f"{prefix}offsets": np.concatenate(([0], np.cumsum(columns.counts[prefix]))) for prefix in prefixes}
    # Weights are written for everybody or nobody: who has none counts 1 an example.
    for prefix in prefixes:
        if f"{prefix}weights" in columns.by_name:
            columns.by_name[f"{prefix}weights"].rows = int(offsets[f"{prefix}offsets"][-1])
    every = {name: _Column(array.dtype, (), len(array)) for name, array in offsets.items()} | columns.by_name
    _write_header(file, every)
    for name, array in offsets.items():
        _append(file, every[name], array)
    for client in range(len(population)):
        data = population.load(client)
        for name, array in _arrays(client, data):
            _append(file, every[name], array)
        for prefix, part in (("", data.train), (TEST, data.test)):
            weighted = every.get(f"{prefix}weights")
            if weighted is not None and part is not None and getattr(part, "weights", None) is None:
                _append(file, weighted, np.ones(len(part), dtype=np.float32))
    if any(column.written != column.size_bytes for column in every.values()):
        raise TaskError("the clients' data changed while they were written; make them the same each time")


def _write_header(file: BinaryIO, columns: dict[str, _Column]) -> None:
    """Write the header; the widest types come first, so that every array is aligned."""
    table, end = {}, 0
    for name, column in sorted(columns.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        column.start, end = end, end + column.size_bytes
        table[name] = {
            "dtype": _NAMES[column.dtype],
            "shape": [column.rows, *column.row],
            "data_offsets": [column.start, end],
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for column in columns.values():
        column.start += 8 + len(text)
    file.truncate(8 + len(text) + end)


def _append(file: BinaryIO, column: _Column, array: Array) -> None:
    file.seek(column.start + column.written)
    data = np.ascontiguousarray(array).tobytes()
    if column.written + len(data) > column.size_bytes:
        raise TaskError("the clients' data changed while they were written; make them the same each time")
    file.write(data)
    column.written += len(data)


def _arrays(client: int, data: ClientData) -> Iterator[tuple[str, Array]]:
    """Yield a client's arrays with their names; weights as float32."""
    yield from _named(client, "", data.train)
    if data.test is not None:
        yield from _named(client, TEST, data.test)


def _named(client: int, prefix: str, data: Data) -> Iterator[tuple[str, Array]]:
    if len(data) == 0:
        return
    examples = batch_of(data, torch.arange(len(data)))
    single = len(examples.inputs) == 1
    for place, tensor in enumerate(examples.inputs):
        name = f"{prefix}inputs" if single else f"{prefix}inputs_{place}"
        yield name, _stored(client, name, tensor)
    yield f"{prefix}targets", _stored(client, f"{prefix}targets", examples.targets)
    if examples.weights is not None:
        yield f"{prefix}weights", _stored(client, f"{prefix}weights", examples.weights.float())


def _stored(client: int, name: str, tensor: Tensor) -> Array:
    if tensor.dtype == torch.bfloat16 or tensor.is_complex():
        raise TaskError(f"client {client}'s {name} are {tensor.dtype}, which is not stored; convert them to float32")
    array: Array = tensor.numpy(force=True)
    if array.dtype not in _NAMES:
        raise TaskError(f"client {client}'s {name} are {array.dtype}, which is not stored; convert them")
    return array

"""Clients in a Parquet file: the rows of each are found through an index of its row groups, and read alone."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fedml_core.data import ClientData, Examples
from fedml_core.errors import ConfigError, TaskError
from fedml_core.named import nearest
from simulations.packing import Packed
from simulations.sources.columns import Array
from simulations.sources.source import Reader, Source

_ARROW, _PARQUET, _COMPUTE = "pyarrow", "pyarrow.parquet", "pyarrow.compute"  # of the extra fedveil[parquet]


@dataclass(frozen=True)
class ParquetClients(Source):
    """Clients in one Parquet file, told apart by a column and numbered in the order of its values.

    `input_columns`: numbers, side by side as float32 (n, columns); or one column of lists of equal length, whole
    numbers as int64 and others as float32. `target_column`: whole numbers as int64, others as float32.

    The file is read a row group at a time, so memory is bounded by one group and what was asked for; write it sorted by
    client, with small groups. The index takes 24 bytes for each run of rows of one client: for a sorted file, a client.
    """

    client_column: str
    input_columns: tuple[str, ...]
    target_column: str

    def __post_init__(self) -> None:
        """Check that there are inputs."""
        super().__post_init__()
        if isinstance(self.input_columns, str) or not self.input_columns:
            raise ConfigError(f"input_columns must be a list of at least one column, got {self.input_columns!r}")
        object.__setattr__(self, "input_columns", tuple(self.input_columns))

    def open(self) -> Reader:
        """Return a reader; the client column is read for the index, a row group at a time."""
        return ParquetReader(ArrowTable(Path(self.path)), self)


class Table(Protocol):
    """What is needed of a Parquet file."""

    @property
    def group_rows(self) -> Sequence[int]:
        """Return how many rows each row group has."""
        ...

    @property
    def columns(self) -> Sequence[str]:
        """Return the columns' names."""
        ...

    def read(self, group: int, columns: Sequence[str]) -> Mapping[str, Array]:
        """Return some columns of one row group, (n,) or, of lists, (n, length).

        Raises: ValueError: if a column holds nulls, or lists of different lengths. OSError: if it cannot be read.
        """
        ...


class ParquetReader(Reader):
    """The index of a table, and the row group that was decoded last."""

    def __init__(self, table: Table, source: ParquetClients) -> None:
        self._table, self._source = table, source
        self._wanted = (*source.input_columns, source.target_column)
        for name in (source.client_column, *self._wanted):
            if name not in table.columns:
                raise ConfigError(f"{source.path} has no column {name!r}; {nearest(name, table.columns)}")
        self._bounds = np.concatenate(([0], np.cumsum(table.group_rows))).astype(np.int64)
        self._first, self._starts, self._lengths = self._index()
        self._lock = threading.Lock()
        self._decoded: tuple[int, Array, Array] | None = None

    def __len__(self) -> int:
        """Return the number of clients."""
        return len(self._first) - 1

    def read(self, client: int) -> ClientData:
        """Return one client's rows."""
        return ClientData(self._gather(np.asarray([client]), str(client)))

    def counts(self, clients: Sequence[int]) -> NDArray[np.int64]:
        """Return how many examples each has."""
        places = np.asarray(clients, dtype=np.int64)
        sums = np.concatenate(([0], np.cumsum(self._lengths)))
        counts: NDArray[np.int64] = sums[self._first[places + 1]] - sums[self._first[places]]
        return counts

    def pack(self, clients: Sequence[int]) -> Packed | None:
        """Return the clients' examples as one; each row group is decoded once."""
        if not len(clients):
            return None
        shown = f"{min(clients)} to {max(clients)}"
        examples = self._gather(np.asarray(clients, dtype=np.int64), shown)
        return Packed(examples, np.concatenate(([0], np.cumsum(self.counts(clients)))))

    def _index(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return where each client's runs begin in the two that follow, the first row of each run, and its length."""
        name, keys, starts, lengths = self._source.client_column, [], [], []
        for group, begin in enumerate(self._bounds[:-1]):
            try:
                column = self._table.read(group, [name])[name]
            except (OSError, ValueError) as error:
                raise ConfigError(f"{self._source.path}: {error}") from error
            if column.ndim != 1 or column.dtype.kind == "f":
                raise ConfigError(f"{self._source.path}: {name!r} must be whole numbers or text, to tell clients apart")
            if len(column) == 0:
                continue
            edges = np.concatenate(([0], np.flatnonzero(column[1:] != column[:-1]) + 1, [len(column)]))
            keys.append(column[edges[:-1]])
            starts.append(begin + edges[:-1])
            lengths.append(np.diff(edges))
        if not keys:
            raise ConfigError(f"{self._source.path} has no rows; write some, or name another file")
        codes = np.unique(np.concatenate(keys), return_inverse=True)[1].reshape(-1)
        order = np.argsort(codes, kind="stable")
        first = np.concatenate(([0], np.cumsum(np.bincount(codes)))).astype(np.int64)
        return first, np.concatenate(starts)[order], np.concatenate(lengths)[order]

    def _gather(self, clients: NDArray[np.int64], shown: str) -> Examples:
        counts = self._first[clients + 1] - self._first[clients]
        ends = np.cumsum(counts)
        runs = np.arange(int(ends[-1])) + np.repeat(self._first[clients] - ends + counts, counts)
        starts, lengths = self._starts[runs], self._lengths[runs]
        groups = np.searchsorted(self._bounds, starts, side="right") - 1
        pieces: list[tuple[Array, Array]] = [(np.empty(0), np.empty(0))] * len(runs)
        for place in np.argsort(groups, kind="stable"):
            try:
                inputs, targets = self._group(int(groups[place]))
            except (OSError, ValueError) as error:
                raise TaskError(f"{self._source.path} cannot be read for client {shown}: {error}") from error
            begin = int(starts[place] - self._bounds[groups[place]])
            rows = slice(begin, begin + int(lengths[place]))
            pieces[place] = inputs[rows], targets[rows]
        inputs, targets = (np.concatenate(column) for column in zip(*pieces, strict=True))
        return Examples.of(torch.from_numpy(inputs), torch.from_numpy(targets))

    def _group(self, group: int) -> tuple[Array, Array]:
        with self._lock:
            if self._decoded is None or self._decoded[0] != group:
                self._decoded = None  # before the next one is read, so that there is only one
                found = self._table.read(group, self._wanted)
                inputs = _inputs([found[name] for name in self._source.input_columns], self._source.input_columns)
                self._decoded = group, inputs, _numbers(found[self._source.target_column], self._source.target_column)
            return self._decoded[1:]


def _inputs(columns: Sequence[Array], names: Sequence[str]) -> Array:
    if len(columns) == 1 and columns[0].ndim > 1:
        return _numbers(columns[0], names[0])
    for name, column in zip(names, columns, strict=True):
        _numbers(column, name)
        if column.ndim > 1:
            raise ValueError(f"column {name!r} holds lists, which stand alone; name it as the only input column")
    return np.stack(columns, axis=1, dtype=np.float32, casting="unsafe")


def _numbers(column: Array, name: str) -> Array:
    if column.dtype.kind not in "biuf":
        raise ValueError(f"column {name!r} holds {column.dtype} values; convert it to numbers")
    return column.astype(np.float32 if column.dtype.kind == "f" else np.int64)


class ArrowTable:
    """A Parquet file, read by pyarrow in the thread that asks."""

    def __init__(self, path: Path) -> None:
        try:
            parquet = importlib.import_module(_PARQUET)
            self._types: Any = importlib.import_module(_ARROW).types
            self._compute: Any = importlib.import_module(_COMPUTE)
        except ImportError as error:
            raise ConfigError(
                "ParquetClients needs pyarrow, which is not installed; pip install 'fedveil[parquet]'"
            ) from error
        if not path.is_file():
            raise ConfigError(f"{path} does not exist; name a Parquet file")
        try:
            self._file: Any = parquet.ParquetFile(str(path), memory_map=True, pre_buffer=False)
        except (OSError, ValueError) as error:  # pyarrow's own errors are of these kinds
            raise ConfigError(f"{path} cannot be read: {error}; name a Parquet file") from error
        metadata = self._file.metadata
        self.group_rows: Sequence[int] = [
            metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)
        ]
        self.columns: Sequence[str] = list(self._file.schema_arrow.names)

    def read(self, group: int, columns: Sequence[str]) -> Mapping[str, Array]:
        """Return some columns of one row group."""
        table = self._file.read_row_group(group, columns=list(columns), use_threads=False)
        return {name: self._array(name, table.column(name).combine_chunks()) for name in columns}

    def _array(self, name: str, column: Any) -> Array:
        if column.null_count:
            raise ValueError(f"column {name!r} holds {column.null_count} nulls; fill them in or drop their rows")
        kind, types = column.type, self._types
        if not (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)):
            return np.asarray(column.to_numpy(zero_copy_only=False))
        lengths = np.unique(self._compute.list_value_length(column).to_numpy(zero_copy_only=False))
        if len(lengths) > 1:
            raise ValueError(f"column {name!r} holds lists of {lengths[0]} to {lengths[-1]} values; pad them")
        flat = self._array(name, column.flatten())
        return flat.reshape(len(column), -1)


__all__ = ["ArrowTable", "ParquetClients", "ParquetReader", "Table"]

"""Clients in a Parquet file: the index, one client's rows alone, and what cannot be read."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedml_core import ClientData, Examples
from fedml_core.errors import ConfigError, TaskError
from simulations.packing import Packed
from simulations.sources import Generated, ParquetClients, Source
from simulations.sources.parquet import ParquetReader
from tests.simulations.sources.source_cases import agree, same

SOURCE = ParquetClients("x.parquet", "who", ("a", "b"), "y")


@dataclass
class Groups:
    """A table in memory that writes down which row groups are read."""

    groups: list[dict[str, Any]]
    read_groups: list[int] = field(default_factory=list)
    fails: Exception | None = None

    @property
    def group_rows(self) -> list[int]:
        return [len(group["who"]) for group in self.groups]

    @property
    def columns(self) -> list[str]:
        return list(self.groups[0])

    def read(self, group: int, columns: Sequence[str]) -> Mapping[str, Any]:
        if self.fails is not None:
            raise self.fails
        if list(columns) != ["who"]:
            self.read_groups.append(group)
        return {name: np.asarray(self.groups[group][name]) for name in columns}


def table(keys: Sequence[Any], rows_a_group: int) -> Groups:
    """Return rows whose inputs are their own numbers, cut into groups."""
    count = len(keys)
    rows = {"who": np.asarray(keys), "a": np.arange(count), "b": np.arange(count) + 0.5, "y": np.arange(count) % 3}
    cuts = range(0, count, rows_a_group)
    return Groups([{name: column[cut : cut + rows_a_group] for name, column in rows.items()} for cut in cuts])


def expected(keys: Sequence[Any]) -> Generated:
    """Return the clients that a plain look at every row finds."""
    numbers, names = np.arange(len(keys)), sorted(set(keys))

    def make(client: int) -> ClientData:
        at = torch.from_numpy(numbers[[key == names[client] for key in keys]])
        return ClientData(Examples.of(torch.stack([at.float(), at.float() + 0.5], dim=1), at % 3))

    return Generated(len(names), make)


@pytest.mark.parametrize("rows_a_group", [1, 3, 100])
@pytest.mark.parametrize(
    "keys",
    [
        [5, 5, 5, 7, 7, 9, 11, 11, 11, 11, 12, 14],
        [7, 5, 7, 5, 9, 9, 11, 7, 12, 14, 5, 9],
        ["anna", "anna", "bob", "carl", "anna", "dora", "eve", "eve", "bob", "fay", "fay", "fay"],
    ],
)
def test_every_client_has_its_rows_sorted_or_not(keys: list[Any], rows_a_group: int) -> None:
    reader = ParquetReader(table(keys, rows_a_group), SOURCE)
    population = expected(keys)
    assert len(reader) == len(population) == 6
    for client in range(6):
        assert same(reader.read(client).train, population.load(client).train)
    packed, wanted = reader.pack([5, 0, 3]), population.pack([5, 0, 3])
    assert isinstance(packed, Packed)
    assert isinstance(wanted, Packed)
    assert same(packed.examples, wanted.examples)
    assert packed.offsets.tolist() == wanted.offsets.tolist()
    assert reader.counts([5, 0, 3]).tolist() == wanted.counts.tolist()


def test_one_client_costs_the_groups_that_its_rows_lie_in() -> None:
    groups = table([1, 1, 1, 2, 2, 2, 3, 3, 3, 1], 3)
    reader = ParquetReader(groups, SOURCE)
    assert groups.read_groups == []
    reader.read(1)
    assert groups.read_groups == [1]
    reader.read(1)
    assert groups.read_groups == [1]  # the group that was decoded last is at hand
    reader.read(0)
    assert groups.read_groups == [1, 0, 3]
    reader.pack([2, 0, 1])
    assert groups.read_groups == [1, 0, 3, 0, 1, 2, 3]  # each once, though the clients come in another order


def test_a_column_of_lists_stands_alone_and_keeps_its_kind() -> None:
    groups = Groups([{"who": [1, 1, 2], "a": np.arange(6).reshape(3, 2), "b": [1.0, 2, 3], "y": [0.5, 1, 2]}])
    train = ParquetReader(groups, ParquetClients("x", "who", ("a",), "y")).read(0).train
    assert isinstance(train, Examples)
    assert train.inputs[0].tolist() == [[0, 1], [2, 3]]
    assert train.inputs[0].dtype == torch.int64
    assert train.targets.dtype == torch.float32
    with pytest.raises(TaskError, match="column 'a' holds lists, which stand alone"):
        ParquetReader(groups, SOURCE).read(0)


def test_what_cannot_be_an_index_is_refused() -> None:
    groups = table([1, 2], 2)
    with pytest.raises(ConfigError, match="x.parquet has no column 'yy'; did you mean 'y'"):
        ParquetReader(groups, ParquetClients("x.parquet", "who", ("a",), "yy"))
    with pytest.raises(ConfigError, match="'b' must be whole numbers or text, to tell clients apart"):
        ParquetReader(groups, ParquetClients("x", "b", ("a",), "y"))
    with pytest.raises(ConfigError, match="x.parquet has no rows"):
        ParquetReader(Groups([_no_rows()]), SOURCE)
    with pytest.raises(ConfigError, match=r"input_columns must be a list of at least one column, got \(\)"):
        ParquetClients("x", "who", (), "y")
    with pytest.raises(ConfigError, match="input_columns must be a list of at least one column, got 'ab'"):
        ParquetClients("x", "who", "ab", "y")  # type: ignore[arg-type]  # a string is a sequence of strings too


def test_what_cannot_be_read_is_the_clients_error() -> None:
    groups = table([1, 2], 2)
    reader = ParquetReader(groups, SOURCE)
    groups.fails = ValueError("column 'a' holds 3 nulls; fill them in or drop their rows")
    with pytest.raises(TaskError, match=r"x.parquet cannot be read for client 1: column 'a' holds 3 nulls"):
        reader.read(1)
    with pytest.raises(TaskError, match=r"cannot be read for client 0 to 1: column 'a' holds 3 nulls"):
        reader.pack([1, 0])
    with pytest.raises(ConfigError, match=r"x.parquet: column 'a' holds 3 nulls"):
        ParquetReader(groups, SOURCE)
    words = Groups([{"who": [1], "a": [1], "b": [1], "y": ["cat"]}])
    with pytest.raises(TaskError, match="column 'y' holds <U3 values; convert it to numbers"):
        ParquetReader(words, SOURCE).read(0)


def test_without_pyarrow_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"needs pyarrow, which is not installed; pip install 'fedveil\[parquet\]'"):
        len(SOURCE)


def test_a_parquet_source_travels_as_a_name_and_columns() -> None:
    assert Source.from_config(SOURCE.to_config()) == SOURCE
    table_of = {
        "name": "ParquetClients",
        "path": "x",
        "client_column": "w",
        "input_columns": ["a"],
        "target_column": "y",
    }
    assert Source.from_config(table_of) == ParquetClients("x", "w", ("a",), "y")


@pytest.mark.parametrize("rows_a_group", [2, 100])
def test_a_real_file_gives_its_clients(tmp_path: Path, rows_a_group: int) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra fedveil[parquet] is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    keys = ["anna", "anna", "bob", "carl", "anna", "dora", "eve", "eve", "bob", "fay", "fay", "fay"]
    count = len(keys)
    columns: dict[str, Any] = {"who": keys, "a": list(range(count)), "b": [i + 0.5 for i in range(count)]}
    columns |= {
        "y": [i % 3 for i in range(count)],
        "c": [[i, i] for i in range(count)],
        "n": [None] + [1] * (count - 1),
    }
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table(columns), path, row_group_size=rows_a_group)
    assert agree(ParquetClients(path, "who", ("a", "b"), "y"), expected(keys))
    lists = ParquetClients(path, "who", ("c",), "y").load(1).train
    assert isinstance(lists, Examples)
    assert lists.inputs[0].tolist() == [[2, 2], [8, 8]]
    with pytest.raises(TaskError, match="for client 0: column 'n' holds 1 nulls"):
        ParquetClients(path, "who", ("n",), "y").load(0)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ConfigError, match="x.parquet cannot be read"):
        len(ParquetClients(path, "who", ("a", "b"), "y"))


def _no_rows() -> dict[str, Any]:
    return {"who": np.zeros(0, dtype=np.int64), "a": np.zeros(0), "b": np.zeros(0), "y": np.zeros(0)}

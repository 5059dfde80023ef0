"""Clients in .npz and safetensors files: packed or one each, read alone, in any process."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from fedml_core import ClientData, Examples
from fedml_core.errors import ConfigError, TaskError
from simulations.population import Partitioned
from simulations.sources import Generated, NpzClients, SafetensorsClients, Source, write_packed
from simulations.sources.mapped import MappedFile
from tests.simulations.sources.source_cases import agree, arrays_of, packed, packed_npz, people, rows, same


def npz_folder(folder: Path) -> Source:
    for client in range(7):
        save = np.savez_compressed if client % 3 == 0 else np.savez
        save(folder / f"client-{client:03}.npz", **arrays_of(people().load(client)))
    (folder / "README").write_text("not a client")
    return NpzClients(folder)


def safetensors_folder(folder: Path) -> Source:
    for client in range(7):
        safetensors.numpy.save_file(arrays_of(people().load(client)), folder / f"{client:03}.safetensors")
    return SafetensorsClients(folder)


def safetensors_file(folder: Path) -> Source:
    return SafetensorsClients(packed(folder / "packed.safetensors", people()))


MAKERS: list[Callable[[Path], Source]] = [npz_folder, safetensors_folder, safetensors_file]


@pytest.mark.parametrize("make", MAKERS)
def test_clients_come_back_as_they_were_written(tmp_path: Path, make: Callable[[Path], Source]) -> None:
    assert agree(make(tmp_path), people())


def test_clients_of_a_packed_npz_come_back_as_they_were_written(tmp_path: Path) -> None:
    alone = Generated(7, lambda client: ClientData(rows(client, client + 1)))
    packed_npz(tmp_path / "packed.npz", alone)
    assert agree(NpzClients(tmp_path / "packed.npz"), alone)


def test_a_partition_of_a_pool_can_be_written_and_read_again(tmp_path: Path) -> None:
    parts = [np.array([0, 5, 9]), np.array([1, 2]), np.array([3, 4, 6, 7, 8])]
    pool = Partitioned(rows(0, 10), parts, holdout=0.5, seed=3)
    assert agree(SafetensorsClients(packed(tmp_path / "p.safetensors", pool)), pool)


def test_several_inputs_weights_and_every_kind_of_number_survive(tmp_path: Path) -> None:
    def make(client: int) -> ClientData:
        count = client + 2
        inputs = (torch.arange(count, dtype=torch.uint8), torch.ones(count, 2, 2, dtype=torch.float16))
        targets = torch.full((count, 2), client, dtype=torch.float64)
        return ClientData(Examples(inputs, targets, torch.full((count,), 0.5) if client == 1 else None))

    found = SafetensorsClients(packed(tmp_path / "p.safetensors", Generated(3, make)))
    assert same(found.load(1).train, make(1).train)
    # Who has no weights counts 1 an example where others have some.
    train, plain = found.load(2).train, make(2).train
    assert isinstance(train, Examples)
    assert isinstance(plain, Examples)
    assert same(train, Examples(plain.inputs, plain.targets, torch.ones(4)))
    safetensors.numpy.load_file(tmp_path / "p.safetensors")  # a reader of somebody else's


def test_what_is_loaded_is_a_copy(tmp_path: Path) -> None:
    source = safetensors_file(tmp_path)
    train = source.load(2).train
    assert isinstance(train, Examples)
    train.inputs[0].zero_()
    assert same(source.load(2).train, people().load(2).train)


@pytest.mark.parametrize("make", MAKERS)
def test_nothing_is_read_until_it_is_asked_for(tmp_path: Path, make: Callable[[Path], Source]) -> None:
    source = make(tmp_path)
    missing = type(source)(tmp_path / "missing")  # naming what is not there is no error yet
    assert "_opened" not in source.__dict__
    with pytest.raises(ConfigError, match=r"missing does not exist; name an? \.(npz|safetensors) file, or a folder"):
        len(missing)
    assert not missing.__dict__.get("_opened")


def test_a_packed_file_costs_the_rows_of_those_who_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    of = Examples.__init__

    def counted(self: Examples, inputs: tuple[torch.Tensor, ...], *rest: torch.Tensor) -> None:
        read.append(len(inputs[0]))
        of(self, inputs, *rest)

    source = SafetensorsClients(packed(tmp_path / "p.safetensors", people(40)))
    monkeypatch.setattr(Examples, "__init__", counted)
    source.load(3)
    source.pack([1, 2])
    assert read == [4, 2, 5]  # its own and those aside; both in one gather


def test_pages_that_were_read_are_let_go_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulations.sources.mapped._RESIDENT_BYTES", 10 << 16)
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 16)
    file = MappedFile(path)
    first = file.array(0, "u1", (256,))
    for _ in range(100):
        file.touch(3, 0)
        assert file._touched <= 10 << 16
    assert bytes(first) == bytes(range(256))  # they come back from the file


@pytest.mark.parametrize("make", MAKERS)
def test_another_process_gets_the_path_alone(tmp_path: Path, make: Callable[[Path], Source]) -> None:
    source = make(tmp_path)
    assert len(source) == 7
    sent = pickle.dumps(source)
    assert len(sent) < 300
    assert pickle.loads(sent) == source


def test_a_spawned_process_reads_the_same_clients(tmp_path: Path) -> None:
    source = safetensors_file(tmp_path)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(agree, (source, people())) is True
        pool.close()
        pool.join()


def test_a_forked_process_opens_the_files_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = safetensors_file(tmp_path)
    first = source._reader
    assert source._reader is first
    monkeypatch.setattr("os.getpid", lambda: -1)
    assert source._reader is not first


def test_a_source_travels_as_a_name_and_a_path(tmp_path: Path) -> None:
    source = NpzClients(tmp_path / "x.npz")
    assert source.to_config() == {"name": "NpzClients", "path": str(tmp_path / "x.npz")}
    assert Source.from_config(source.to_config()) == source
    assert Source.from_config({"name": "npz-clients", "path": "data"}).beside(tmp_path).path == str(tmp_path / "data")
    assert NpzClients("/abs").beside(tmp_path).path == "/abs"
    with pytest.raises(ConfigError, match="unknown source 'npz-client'; did you mean 'npz-clients'"):
        Source.from_config("npz-client")


def test_a_client_that_does_not_exist_is_named(tmp_path: Path) -> None:
    source = safetensors_file(tmp_path)
    for client in (7, -1):
        with pytest.raises(ConfigError, match=f"has no client {client}; its clients are 0 to 6"):
            source.load(client)
    with pytest.raises(ConfigError, match="has no client 9"):
        source.pack([1, 9])


def save(path: Path, **arrays: object) -> Source:
    held: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items()}
    np.savez(path, **held)
    return NpzClients(path)


ONE = {"inputs": np.zeros((4, 2), dtype=np.float32), "targets": [0, 1, 0, 1], "offsets": [0, 1, 4]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"inputs": None}, "has no array 'inputs', it holds offsets, targets; name the arrays inputs"),
        ({"targets": None}, "has no array 'targets', it holds inputs, offsets"),
        ({"offsets": None}, "has no array 'offsets'; it says where each client's rows begin"),
        ({"input": [1]}, "has an array 'input', which nobody reads; did you mean .*'inputs'"),
        ({"targets": [0, 1]}, "inputs has 4 rows and the targets have 2; they must agree"),
        ({"targets": 3}, r"targets must be numbers of shape \(n, ...\), got a single value"),
        ({"targets": ["a", "b", "c", "d"]}, "targets must be numbers of shape .*, got <U1; convert it first"),
        ({"offsets": [0, 1, 5]}, "offsets must begin with 0 and end with the 4 rows, got 0 and 5"),
        ({"offsets": [0.0, 4.0]}, r"offsets must be whole numbers of shape \(clients \+ 1,\), got float64 \(2,\)"),
        ({"test_inputs": [[1.0]], "test_targets": [1]}, "has no array 'test_offsets'"),
        (
            {"test_inputs": [[1.0]], "test_targets": [1], "test_offsets": [0, 1]},
            "offsets are of 2 clients, test_offsets of 1",
        ),
    ],
)
def test_a_packed_file_that_cannot_be_is_refused_with_what_it_lacks(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    held = {name: value for name, value in {**ONE, **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=said):
        len(save(tmp_path / "x.npz", **held))


def test_clients_whose_offsets_cross_are_named_when_they_are_sampled(tmp_path: Path) -> None:
    source = save(tmp_path / "x.npz", **{**ONE, "offsets": [0, 3, 1, 4]})
    assert len(source.load(0).train) == 3
    for ask in (source.load, lambda client: source.pack([0, client]), lambda client: source.counts([client])):
        with pytest.raises(TaskError, match="client 1's rows go from 3 to 1; mend the offsets"):
            ask(1)


def test_a_compressed_or_foreign_npz_is_refused(tmp_path: Path) -> None:
    held: dict[str, Any] = {name: np.asarray(value) for name, value in ONE.items()}
    np.savez_compressed(tmp_path / "x.npz", **held)
    with pytest.raises(ConfigError, match="it is compressed, .*use numpy.savez; name a file"):
        len(NpzClients(tmp_path / "x.npz"))
    columns = np.asfortranarray(np.ones((4, 2)))
    with pytest.raises(ConfigError, match="inputs is in Fortran order; write numpy.ascontiguousarray of it"):
        len(save(tmp_path / "y.npz", **{**ONE, "inputs": columns}))
    with pytest.raises(ConfigError, match="targets holds Python objects; write numbers"):
        len(save(tmp_path / "z.npz", **{**ONE, "targets": np.array([1, None, 2, 3], dtype=object)}))
    (tmp_path / "w.npz").write_bytes(b"")
    with pytest.raises(ConfigError, match="w.npz cannot be read"):
        len(NpzClients(tmp_path / "w.npz"))


@pytest.mark.parametrize("kept", [0, 7, 40, 300, 700])
@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_a_file_that_was_cut_short_is_refused(tmp_path: Path, kept: int, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    if suffix == "npz":
        packed_npz(path, people())
    else:
        write_packed(path, people())
    whole = path.read_bytes()
    assert kept < len(whole)
    path.write_bytes(whole[:kept])
    source = NpzClients(path) if suffix == "npz" else SafetensorsClients(path)
    with pytest.raises(ConfigError, match=rf"x\.{suffix} cannot be read: .*; name a file"):
        len(source)


def test_a_bad_file_of_one_client_is_that_clients_error(tmp_path: Path) -> None:
    source = npz_folder(tmp_path)
    (tmp_path / "client-002.npz").write_bytes(b"PK\x03\x04 cut short")
    np.savez(tmp_path / "client-003.npz", inputs=np.zeros(3), targets=np.zeros(2))
    np.save(tmp_path / "client-004", np.zeros(3))
    (tmp_path / "client-004.npy").replace(tmp_path / "client-004.npz")
    assert same(source.load(1).train, people().load(1).train)
    with pytest.raises(TaskError, match=r"client 2's file .*client-002.npz cannot be read: .*; write it again"):
        source.load(2)
    with pytest.raises(TaskError, match=r"client 3's file .*: inputs has 3 rows and the targets have 2"):
        source.load(3)
    with pytest.raises(TaskError, match=r"client 4's file .*it is no .npz archive"):
        source.load(4)
    (tmp_path / "client-005.npz").unlink()
    with pytest.raises(TaskError, match=r"client 5's file .*No such file"):
        source.load(5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no file that ends in .npz; put one there for each client"):
        len(NpzClients(tmp_path / "empty"))


def test_a_type_that_numpy_lacks_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"inputs": torch.zeros(2, 2, dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match="inputs is BF16; store one of BOOL, U8"):
        len(SafetensorsClients(tmp_path / "x.safetensors"))


def test_what_cannot_be_written_is_said_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must end in .safetensors, got x.npz"):
        write_packed(tmp_path / "x.npz", people())
    target = tmp_path / "x.safetensors"
    wider = Generated(3, lambda client: ClientData(Examples.of(torch.zeros(2, 2 + client // 2), torch.zeros(2))))
    with pytest.raises(TaskError, match=r"client 2's inputs are float32 of shape \(3,\) an example, those before it"):
        write_packed(target, wider)
    half = Generated(2, lambda client: ClientData(Examples.of(torch.zeros(2, 2).bfloat16(), torch.zeros(2))))
    with pytest.raises(TaskError, match=r"client 0's inputs are torch.bfloat16, which is not stored"):
        write_packed(target, half)
    more = Generated(2, lambda client: ClientData(Examples((torch.zeros(2),) * (client + 1), torch.zeros(2))))
    with pytest.raises(TaskError, match="some clients have no inputs"):
        write_packed(target, more)
    calls: list[int] = []

    def growing(client: int) -> ClientData:
        calls.append(client)
        return ClientData(rows(client, len(calls)))

    with pytest.raises(TaskError, match="changed while they were written"):
        write_packed(target, Generated(2, growing))
    assert list(tmp_path.iterdir()) == []


def test_a_client_without_examples_keeps_its_place(tmp_path: Path) -> None:
    some = Generated(3, lambda client: ClientData(rows(client, client % 2)))
    source = SafetensorsClients(packed(tmp_path / "p.safetensors", some))
    assert [len(source.load(client).train) for client in range(3)] == [0, 1, 0]
    counts = source.counts([0, 1, 2])
    assert counts is not None
    assert counts.tolist() == [0, 1, 0]

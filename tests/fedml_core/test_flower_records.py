"""Frames as Flower's records: exact both ways, and untrusting on the way back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from fedml_core.errors import StrategyError
from fedml_core.flower_records import MAX_HEADER_CHARACTERS, pack, unpack
from fedml_core.wire import Frame

# isort: split
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

NAMES = ("bool", "int8", "int64", "uint8", "uint32", "uint64", "float16", "float32", "float64")
SALT = b"0123456789abcdef"


def frames() -> st.SearchStrategy[Frame]:
    arrays = st.sampled_from(NAMES).flatmap(
        lambda name: st_numpy.arrays(name, st_numpy.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    )
    return st.builds(Frame, st.text(), st.text(), st.dictionaries(st.text(), arrays, max_size=4))


def parts_of(records: RecordDict) -> set[str]:
    return {records.object_id, *(part for one in records.values() for part in all_parts(one))}


def all_parts(record: Any) -> set[str]:
    return {record.object_id, *(part for child in (record.children or {}).values() for part in all_parts(child))}


@given(frame=frames(), salt=st.sampled_from([b"", SALT]))
def test_a_frame_comes_back_exactly(frame: Frame, salt: bytes) -> None:
    back = unpack(pack(frame, salt=salt))
    assert (back.kind, back.header, list(back.arrays)) == (frame.kind, frame.header, list(frame.arrays))
    for name, array in frame.arrays.items():
        assert (back.arrays[name].dtype, back.arrays[name].shape) == (array.dtype, array.shape)
        assert back.arrays[name].tobytes() == array.tobytes()


def test_memory_order_and_byte_order_of_the_sender_do_not_matter() -> None:
    array = np.arange(6, dtype=">f4").reshape(2, 3).T
    back = unpack(pack(Frame("k", "{}", {"x": array}))).arrays["x"]
    assert back.dtype == np.float32
    assert back.tolist() == array.tolist()


def test_what_arrives_cannot_be_changed_by_accident() -> None:
    back = unpack(pack(Frame("k", "{}", {"x": np.zeros(3)}))).arrays["x"]
    with pytest.raises(ValueError, match="read-only"):
        back[0] = 1.0


def test_the_same_array_in_two_frames_is_packed_once() -> None:
    array = np.arange(4.0)
    shared: dict[int, Array] = {}
    first, second = (pack(Frame("k", text, {"x": array}), shared=shared) for text in ("1", "2"))
    assert first["arrays"]["x"] is second["arrays"]["x"]
    assert len(shared) == 1


def test_with_a_salt_equal_replies_share_no_part_so_nobody_can_test_a_guess() -> None:
    frame = Frame("update", '{"examples":3}', {"x": np.zeros(2, dtype=np.float32), "e": np.zeros(0)})
    assert parts_of(pack(frame)) == parts_of(pack(frame))
    assert not parts_of(pack(frame, salt=SALT)) & parts_of(pack(frame, salt=SALT[::-1]))
    assert not parts_of(pack(frame, salt=SALT)) & parts_of(pack(frame))


@pytest.mark.parametrize(
    "array", [np.array(["text"]), np.array([{}], dtype=object), np.zeros(2, dtype=complex), np.zeros(2, dtype="M8[s]")]
)
def test_what_is_not_plain_numbers_is_refused(array: np.ndarray[Any, Any]) -> None:
    with pytest.raises(StrategyError, match="array 'x' of type .* cannot be sent; use one of bool, int8, "):
        pack(Frame("k", "{}", {"x": array}))


def test_a_header_that_should_have_been_arrays_is_refused() -> None:
    pack(Frame("k", "x" * MAX_HEADER_CHARACTERS))
    with pytest.raises(StrategyError, match="a frame's header must have at most 8388608 characters, got 8388609"):
        pack(Frame("k", "x" * (MAX_HEADER_CHARACTERS + 1)))


def head(**changes: Any) -> ConfigRecord:
    return ConfigRecord({"kind": "k", "header": "{}", "salt": b"", **changes})


def array(**changes: Any) -> ArrayRecord:
    made = Array(dtype="float32", shape=(2,), stype="fedveil.raw", data=bytes(8))
    for name, value in changes.items():
        setattr(made, name, value)
    records = ArrayRecord()
    records["x"] = made
    return records


@pytest.mark.parametrize(
    "records",
    [
        {},
        {"frame": head()},
        {"frame": head(), "arrays": array(), "more": head()},
        {"frame": array(), "arrays": head()},
        {"frame": head(), "arrays": MetricRecord({"x": 1})},
        {"frame": head(kind=5), "arrays": array()},
        {"frame": head(header=b"{}"), "arrays": array()},
        {"frame": head(salt="text"), "arrays": array()},
        {"frame": head(more=1), "arrays": array()},
        {"frame": head(salt=b"1"), "arrays": array()},
        {"frame": head(salt=b"1"), "arrays": array(data=b"12345678" + b"2")},
        {"frame": head(), "arrays": array(dtype="object")},
        {"frame": head(), "arrays": array(dtype="<f4")},
        {"frame": head(), "arrays": array(stype="numpy.ndarray")},
        {"frame": head(), "arrays": array(data=bytes(7))},
        {"frame": head(), "arrays": array(shape=(3,))},
        {"frame": head(), "arrays": array(shape=(-1, -2))},
        {"frame": head(), "arrays": array(shape=(True, 2))},
        {"frame": head(), "arrays": array(shape=(2.0,))},
        {"frame": head(), "arrays": array(shape=(1,) * 100 + (2,))},
        {"frame": head(), "arrays": array(shape=(2**70, 0), data=b"")},
    ],
)
def test_records_that_are_not_a_frame_are_refused(records: dict[str, Any]) -> None:
    with pytest.raises(ValueError):  # ours, or NumPy's own for too many dimensions
        unpack(RecordDict(records))

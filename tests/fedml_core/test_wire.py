"""What is sent arrives; what cannot be sent, or was never sent, is refused in one sentence."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedml_core import Frame, StrategyError, from_frame, to_frame

ONE = np.zeros(1, dtype=np.float32)
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
INTEGERS = (torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, *SIGNED)
COMPLEX = (torch.complex64, torch.complex128)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    st.text(max_size=6),
    st.lists(st.integers(-5, 5), max_size=3).map(lambda values: torch.tensor(values, dtype=torch.int64)),
)
KEYS = st.one_of(st.text(max_size=3), st.sampled_from(["a/b", "a", "b", "~1", "~", "/", "0"]))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=12,
)
TREES = st.dictionaries(KEYS, VALUES, max_size=4)
JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["$array", "x", "y"]), st.one_of(inner, st.just("/x")), max_size=3),
    ),
    max_leaves=8,
)


def through(tree: dict[str, Any]) -> dict[str, Any]:
    return from_frame(to_frame("test", tree))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        tensors = isinstance(one, Tensor) and isinstance(other, Tensor)
        return tensors and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and bool(one == other)


@given(TREES)
def test_every_tree_arrives_as_it_was_sent(tree: dict[str, Any]) -> None:
    assert same(through(tree), tree)


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.float16, torch.float32, torch.float64, *COMPLEX])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3)])
def test_dtype_and_shape_of_a_tensor_survive(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    sent = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    arrived = through({"x": sent})["x"]
    assert arrived.dtype == dtype
    assert arrived.shape == shape
    assert torch.equal(arrived, sent)


def test_the_bits_of_special_floats_survive() -> None:
    sent = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45, 3.4e38])
    assert torch.equal(through({"x": sent})["x"].view(torch.int32), sent.view(torch.int32))
    numbers = through({"x": [math.inf, -math.inf, -0.0, 0.1 + 0.2]})["x"]
    assert numbers == [math.inf, -math.inf, -0.0, 0.30000000000000004]
    assert math.copysign(1, numbers[2]) == -1
    assert math.isnan(through({"x": math.nan})["x"])


def test_tuples_arrive_as_lists_and_numpy_values_as_numbers_and_tensors() -> None:
    tree = {"t": (1, (2.5,)), "i": np.int64(7), "f": np.float32(0.5), "b": np.bool_(True), "a": np.arange(3)}
    arrived = through(tree)
    assert same(arrived, {"t": [1, [2.5]], "i": 7, "f": 0.5, "b": True, "a": torch.arange(3)})


def test_a_frame_is_a_json_header_and_arrays_named_by_their_place() -> None:
    frame = to_frame("update", {"round": 3, "state": [{"momentum": torch.ones(2)}], "x": torch.zeros(1)})
    assert frame.kind == "update"
    assert json.loads(frame.header) == {
        "round": 3,
        "state": [{"momentum": {"$array": "/state/0/momentum"}}],
        "x": {"$array": "/x"},
    }
    assert sorted(frame.arrays) == ["/state/0/momentum", "/x"]


def test_keys_with_slashes_do_not_share_an_array() -> None:
    tree = {"a/b": torch.tensor([1]), "a": {"b": torch.tensor([2])}, "a~1b": torch.tensor([3])}
    assert same(through(tree), tree)
    assert sorted(to_frame("test", tree).arrays) == ["/a/b", "/a~01b", "/a~1b"]


def test_size_bytes_counts_header_and_arrays() -> None:
    frame = to_frame("update", {"x": torch.zeros(10), "name": "é"})
    assert frame.size_bytes == 40 + len(frame.header)
    assert frame.header == '{"x":{"$array":"/x"},"name":"\\u00e9"}'


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6).reshape(2, 3).T,
        np.arange(6)[::-2],
        np.arange(3, dtype=">i4"),
        np.asfortranarray(np.ones((2, 3), dtype=">f8")),
        np.array(2.5, dtype=">f4"),
    ],
)
def test_memory_layout_and_byte_order_do_not_matter(array: np.ndarray[Any, Any]) -> None:
    frame = to_frame("test", {"x": array})
    assert frame.arrays["/x"].flags.c_contiguous
    assert frame.arrays["/x"].dtype.isnative
    assert from_frame(frame)["x"].tolist() == array.tolist()
    assert from_frame(Frame("test", frame.header, {"/x": array}))["x"].tolist() == array.tolist()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(3, requires_grad=True),
        torch.arange(6).reshape(2, 3).t(),
        torch.tensor([1 + 2j]).conj(),
        torch.tensor([1 + 2j]).conj().imag,
        torch.arange(3).expand(2, 3),
    ],
)
def test_views_of_a_tensor_arrive_as_their_values(tensor: Tensor) -> None:
    arrived = through({"x": tensor})["x"]
    assert arrived.tolist() == tensor.tolist()
    assert not arrived.requires_grad


def test_what_arrives_owns_its_memory() -> None:
    sent = torch.zeros(3)
    frame = to_frame("test", {"x": sent})
    arrived = from_frame(frame)["x"]
    arrived += 1
    assert sent.tolist() == [0, 0, 0]
    assert frame.arrays["/x"].tolist() == [0, 0, 0]


def test_read_only_arrays_arrive_writable() -> None:
    array = np.frombuffer(np.ones(2, dtype=np.float32).tobytes(), dtype=np.float32)
    arrived = from_frame(Frame("test", '{"x":{"$array":"/x"}}', {"/x": array}))["x"]
    arrived += 1
    assert arrived.tolist() == [2, 2]


def test_sending_does_not_change_the_tree() -> None:
    tensor, items = torch.ones(2), [1, (2, 3)]
    tree = {"inner": {"x": tensor, "list": items}}
    to_frame("test", tree)
    assert tree["inner"]["x"] is tensor
    assert tensor.tolist() == [1, 1]
    assert tree["inner"]["list"] is items
    assert items == [1, (2, 3)]


def test_a_frame_prints_neither_header_nor_arrays() -> None:
    frame = to_frame("update", {"norm": 123.456, "x": torch.full((2,), 9.25)})
    assert repr(frame) == "Frame(kind='update')"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (object(), "a object at /a/0 cannot be sent"),
        (b"key", "a bytes at /a/0 cannot be sent"),
        (memoryview(b"key"), "a memoryview at /a/0 cannot be sent"),
        ({1, 2}, "a set at /a/0 cannot be sent"),
        (1j, "a complex at /a/0 cannot be sent"),
        (np.complex64(1j), "a complex64 at /a/0 cannot be sent"),
        (np.datetime64("2026-01-01"), "a datetime64 at /a/0 cannot be sent"),
        (np.longdouble(1), "at /a/0 cannot be sent"),
        (np.array([object()]), "an array of object at /a/0 cannot be sent"),
        (np.array(["text"]), "an array of <U4 at /a/0 cannot be sent"),
        (np.zeros(1, dtype=np.longdouble), "cannot be sent; use numbers of at most 64 bits"),
        (np.zeros(1, dtype=[("field", "f4")]), "cannot be sent; use numbers of at most 64 bits"),
        (torch.ones(2, dtype=torch.bfloat16), "a bfloat16 strided tensor at /a/0 cannot be sent; make it a dense"),
        (torch.ones(2, 2).to_sparse(), "a float32 sparse_coo tensor at /a/0 cannot be sent"),
        (torch.ones(2, device="meta"), "a float32 strided tensor at /a/0 cannot be sent"),
        ({1: "x"}, "keys must be text other than '[$]array', got 1 at /a/0"),
        ({"$array": "/x"}, "keys must be text other than '[$]array', got '[$]array' at /a/0"),
    ],
)
def test_what_cannot_be_sent_is_refused_with_its_place(value: object, said: str) -> None:
    with pytest.raises(StrategyError, match=said):
        to_frame("test", {"a": [value]})


def test_an_integer_too_long_for_json_is_refused() -> None:
    with pytest.raises(StrategyError, match="an integer too long for JSON"):
        to_frame("test", {"x": 10**5000})
    with pytest.raises(ValueError, match="Exceeds the limit"):
        from_frame(Frame("test", '{"x":' + "1" * 5000 + "}"))


def test_a_tree_that_contains_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(StrategyError, match="nests deeper than 100 levels at /x/0/0"):
        to_frame("test", {"x": loop})


def test_the_root_must_be_a_dict() -> None:
    with pytest.raises(StrategyError, match="a dict at its root, got list"):
        to_frame("test", [1])  # type: ignore[arg-type]  # the point of the test


def test_the_deepest_tree_that_can_be_sent_can_be_read() -> None:
    tree: dict[str, Any] = {"x": 1}
    for _ in range(99):
        tree = {"x": tree}
    assert through(tree) == tree
    with pytest.raises(StrategyError, match="nests deeper"):
        to_frame("test", {"x": tree})


@pytest.mark.parametrize(
    ("header", "arrays", "said"),
    [
        ("", {}, "Expecting value"),
        ("{", {}, "Expecting property name"),
        ("[]", {}, "must be a JSON object, got list"),
        ("3", {}, "must be a JSON object, got int"),
        ('{"$array":"/x"}', {"/x": ONE}, "must be a JSON object, got Tensor"),
        ('{"x":{"$array":"/x"}}', {}, "not in the frame"),
        ('{"x":{"$array":["/x"]}}', {"/x": ONE}, "not in the frame"),
        ('{"x":{"$array":"/x","y":1}}', {"/x": ONE}, "not in the frame"),
        ('{"x":[{"$array":"/x"},{"$array":"/x"}]}', {"/x": ONE}, "or names it twice"),
        ('{"x":1}', {"/x": ONE}, "holds 1 arrays that its header does not name"),
        ('{"x":{"$array":"/x"}}', {"/x": np.array([None])}, "holds an array of object"),
        ('{"x":{"$array":"/x"}}', {"/x": np.array(["a"])}, "holds an array of <U1"),
    ],
)
def test_a_frame_that_nobody_could_have_sent_is_refused(header: str, arrays: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        from_frame(Frame("test", header, arrays))


@pytest.mark.parametrize("depth", [100, 200_000])
def test_a_header_that_nests_too_deep_is_refused(depth: int) -> None:
    header = '{"x":' + "[" * depth + "1" + "]" * depth + "}"
    with pytest.raises(ValueError, match="nests deeper than 100 levels"):
        from_frame(Frame("test", header))
    shallow = '{"x":' + "[" * 99 + "1" + "]" * 99 + "}"
    assert list(from_frame(Frame("test", shallow))) == ["x"]


@given(JSON_VALUES, st.booleans())
def test_any_json_header_gives_a_tree_or_a_value_error(header: Any, with_array: bool) -> None:
    arrays = {"/x": ONE} if with_array else {}
    try:
        tree = from_frame(Frame("test", json.dumps(header), arrays))
    except ValueError:
        return
    assert set(tree) == set(header)


def test_frames_compare_by_identity_because_arrays_do_not_compare() -> None:
    frame, other = to_frame("test", {"x": torch.ones(2)}), to_frame("test", {"x": torch.ones(2)})
    same_frame = frame
    assert frame == same_frame
    assert frame != other
    assert len({frame, other}) == 2

"""What `fedml_core.secagg.encoding` promises: acceptance test A7, exact sums of scalars, honest errors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedml_core.errors import ConfigError, SecureAggregationError
from fedml_core.secagg.encoding import RingEncoding
from fedml_core.secagg.masks import add_masks, ring_type
from fedml_core.secagg.scalars import Count, Measure
from fedml_core.secagg.secrets import Secret

BITS = pytest.mark.parametrize("bits", [16, 32, 64])
SCALARS = (Count("examples"), Measure("loss", 1e6))
WEIGHTED = RingEncoding(0.5, 100, max_weight=50.0, scalars=SCALARS)
GOOD: dict[str, Any] = {"weight": 3.0, "scalars": {"examples": 12, "loss": 0.25}}


def key_of(*numbers: int) -> bytes:
    return hashlib.sha256(repr(numbers).encode()).digest()


def sum_of(encoding: RingEncoding, rows: NDArray[Any], **kwargs: Any) -> NDArray[Any]:
    keys = [key_of(row) for row in range(len(rows))]
    total: NDArray[Any] = encoding.encode_rows(rows, keys, **kwargs).sum(axis=0, dtype=ring_type(encoding.bits))
    return total


@BITS
@pytest.mark.parametrize("clients", [1, 2, 3, 100, 511])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_legal_inputs_decode_exactly(bits: int, clients: int, sign: int) -> None:
    """the sum of up to `clients` encoded vectors never overflows the ring; a range that could is not configurable."""
    encoding = RingEncoding(0.5, clients, bits=bits, max_weight=8.0, scalars=(Count("n"), Measure("loss", 3.0)))
    rows = np.full((clients, 3), sign * 0.5, np.float32)
    facts = {"n": [1 << 40] * clients, "loss": [sign * 3.0] * clients}
    total = sum_of(encoding, rows, weights=[8.0] * clients, scalars=facts)
    centred = total.view(np.dtype(f"<i{bits // 8}"))
    assert centred[:3].tolist() == [sign * clients * encoding.steps] * 3
    found = encoding.decode(total, clients)
    assert found.values.tolist() == [sign * clients * 4.0] * 3
    assert (found.weight, found.clipped, found.count) == (8.0 * clients, 0, clients)
    assert found.scalars == {"n": clients << 40, "loss": sign * 3.0 * clients}


@BITS
def test_the_ring_has_no_room_for_one_client_more(bits: int) -> None:
    most = (2**bits - 1) // 128
    encoding = RingEncoding(1.0, most, bits=bits)
    assert encoding.steps == 64
    assert most * encoding.steps < 2 ** (bits - 1)
    with pytest.raises(ConfigError) as caught:
        RingEncoding(1.0, 2**bits // 126, bits=bits)
    assert str(caught.value).startswith(f"a ring of {bits} bits leaves 6")
    assert str(caught.value).endswith(f"use more bits, or at most {most} clients")


@given(st.integers(1, 2**33), st.sampled_from([16, 32, 64]))
def test_every_configurable_sum_stays_within_half_the_ring(clients: int, bits: int) -> None:
    try:
        encoding = RingEncoding(1.0, clients, bits=bits)
    except ConfigError:
        assert clients > (2**bits - 1) // 128
        return
    assert encoding.steps == min((2**bits - 1) // (2 * clients), 2**52)
    assert encoding.steps * clients <= 2 ** (bits - 1) - 1


@BITS
def test_more_vectors_than_configured_are_refused(bits: int) -> None:
    encoding = RingEncoding(1.0, 3, bits=bits)
    total = sum_of(encoding, np.ones((4, 2)))
    for count in (4, 0, -1):
        with pytest.raises(SecureAggregationError, match=f"must be of 1 to 3 vectors, got {count}"):
            encoding.decode(total, count)


@BITS
@pytest.mark.parametrize("size", [0, 1, 1000])
def test_an_update_of_zeros_is_exactly_zero(bits: int, size: int) -> None:
    encoding = RingEncoding(1.0, 10, bits=bits)
    total = sum_of(encoding, np.zeros((10, size), np.float32))
    assert not total.any()
    assert total.shape == (encoding.length(size),)
    assert encoding.decode(total, 10).values.tolist() == [0.0] * size


def test_a_weight_of_zero_adds_nothing() -> None:
    vector = WEIGHTED.encode(np.ones(5), key_of(1), weight=0.0, scalars={"examples": 0, "loss": 0.0})
    found = WEIGHTED.decode(vector, 1)
    assert (found.values.tolist(), found.weight, found.clipped) == ([0.0] * 5, 0.0, 5)


@settings(max_examples=25)
@given(
    st.sampled_from([16, 32, 64]),
    st.lists(st.tuples(st.floats(0, 50), st.integers(0, 2**40), st.floats(-1e6, 1e6)), min_size=1, max_size=12),
)
def test_scalars_come_out_of_every_ring(bits: int, facts: list[tuple[float, int, float]]) -> None:
    encoding = RingEncoding(0.5, 100, bits=bits, max_weight=50.0, scalars=SCALARS)
    weights, counts, losses = ([row[column] for row in facts] for column in range(3))
    rows = np.full((len(facts), 2), 0.75)
    total = sum_of(encoding, rows, weights=weights, scalars={"examples": counts, "loss": losses})
    found = encoding.decode(total, len(facts))
    assert found.scalars["examples"] == sum(counts)
    assert abs(found.scalars["loss"] - math.fsum(losses)) <= 1e6 * 2**-39
    assert abs(found.weight - math.fsum(weights)) <= 50 * 2**-39
    assert found.clipped == 2 * len(facts)


def test_only_the_number_of_clipped_coordinates_of_all_members_comes_out() -> None:
    """encoding runs at the client and hides nothing; masks do. What was clipped is only known as a sum over clients."""
    # What was clipped is only known as a sum over clients.
    rows = np.array([[0.5, 0.6, -7.0], [0.1, -0.2, -0.51]], np.float32)
    found = RingEncoding(0.5, 10).decode(sum_of(RingEncoding(0.5, 10), rows), 2)
    assert found.clipped == 3
    assert found.values == pytest.approx([0.6, 0.3, -1.0], abs=1e-7)
    assert "values" not in repr(found)


def test_without_weights_each_member_counts_one() -> None:
    encoding = RingEncoding(0.5, 10)
    found = encoding.decode(sum_of(encoding, np.full((7, 2), 0.25, np.float32)), 7)
    assert (found.weight, found.count, dict(found.scalars)) == (7.0, 7, {})
    assert found.values == pytest.approx([1.75] * 2, abs=1e-7)
    with pytest.raises(SecureAggregationError, match="needs max_weight to be configured"):
        encoding.encode(np.zeros(2), key_of(1), weight=2.0)


@BITS
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_batch_is_its_rows(bits: int, dtype: type[np.floating[Any]]) -> None:
    encoding = RingEncoding(0.5, 100, bits=bits, max_weight=50.0, scalars=SCALARS)
    rows = np.cos(np.arange(4 * 33)).astype(dtype).reshape(4, 33)
    before = rows.copy()
    weights, counts, losses = [1.0, 2.5, 50.0, 0.0], [1, 2, 3, 4], [0.5, -2.0, 0.0, 1e6]
    keys = [Secret(key_of(row)) for row in range(4)]
    batch = encoding.encode_rows(rows, keys, weights=weights, scalars={"examples": counts, "loss": losses})
    for row in range(4):
        facts = {"examples": counts[row], "loss": losses[row]}
        single = encoding.encode(rows[row], keys[row], weight=weights[row], scalars=facts)
        assert np.array_equal(single, batch[row])
    assert np.array_equal(rows, before)
    assert batch.dtype == ring_type(bits)


def test_the_key_decides_how_it_is_rounded() -> None:
    encoding, values = RingEncoding(1.0, 100), np.full(64, 0.3)
    one = encoding.encode(values, key_of(1))
    assert np.array_equal(one, encoding.encode(values, key_of(1)))
    assert not np.array_equal(one, encoding.encode(values, key_of(2)))


def bad(**changes: Any) -> Callable[[], NDArray[Any]]:
    arguments: dict[str, Any] = {"values": np.zeros(3, np.float32), "key": key_of(1)} | GOOD | changes
    return lambda: WEIGHTED.encode(arguments.pop("values"), arguments.pop("key"), **arguments)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_aborts(value: float) -> None:
    """an update that holds NaN or infinity, or whose weight is out of range, raises, and nothing is returned."""
    with pytest.raises(SecureAggregationError, match="NaN or infinite coordinates; nothing was sent"):
        bad(values=np.array([0.0, value, 0.0]))()


@pytest.mark.parametrize("weight", [50.000001, -0.5, math.nan, math.inf, "3", None])
def test_a_weight_out_of_range_aborts_and_is_not_shown(weight: Any) -> None:
    with pytest.raises(SecureAggregationError) as caught:
        bad(weight=weight)()
    assert str(caught.value) == "a weight is not between 0 and max_weight, which is 50; nothing was sent"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"values": np.zeros(3, np.float16)}, "got float16"),
        ({"values": np.zeros(3, np.int64)}, "got int64"),
        ({"values": np.zeros((1, 3))}, r"shape \(d,\), got \(1, 3\)"),
        ({"key": bytes(31)}, "32 bytes, got 31"),
        ({"scalars": {"examples": 1}}, "scalars must be examples, loss, got examples"),
        ({"scalars": None}, "scalars must be examples, loss, got none"),
        ({"scalars": {"examples": 1, "loss": 0, "more": 0}}, "got examples, loss, more"),
        ({"scalars": {"examples": -1, "loss": 0}}, "'examples' must be a whole number from 0"),
        ({"scalars": {"examples": 1, "loss": 2e6}}, "'loss' must be between -1e"),
    ],
)
def test_what_cannot_be_encoded_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SecureAggregationError, match=said):
        bad(**changes)()


def test_a_batch_needs_everything_of_everybody() -> None:
    rows, keys = np.zeros((2, 3)), [key_of(1), key_of(2)]
    facts: dict[str, list[Any]] = {"examples": [1, 2], "loss": [0.0, 0.0]}
    with pytest.raises(SecureAggregationError, match="2 updates need as many keys and weights, got 1 and 2"):
        WEIGHTED.encode_rows(rows, keys[:1], scalars=facts)
    with pytest.raises(SecureAggregationError, match="2 updates need as many keys and weights, got 2 and 1"):
        WEIGHTED.encode_rows(rows, keys, weights=[1.0], scalars=facts)
    with pytest.raises(SecureAggregationError, match="each scalar must have 2 values"):
        WEIGHTED.encode_rows(rows, keys, scalars=facts | {"loss": [0.0]})


@BITS
def test_a_sum_with_a_mask_still_on_it_is_refused(bits: int) -> None:
    """a sum that `count` honest vectors cannot have is refused, never returned."""
    encoding = RingEncoding(1.0, 10, bits=bits)
    total = sum_of(encoding, np.full((5, 1000), 0.5))
    add_masks(total, [(key_of(9), 1)])
    with pytest.raises(SecureAggregationError, match="5 vectors cannot add up to: a mask is still on it"):
        encoding.decode(total, 5)
    add_masks(total, [(key_of(9), -1)])
    assert encoding.decode(total, 5).values[0] == pytest.approx(2.5, rel=1e-2)


def test_a_single_element_out_of_range_is_refused() -> None:
    encoding = RingEncoding(1.0, 10)
    for size in (5 * encoding.steps, -5 * encoding.steps):
        total = np.array([size % 2**32] + [0] * (encoding.length(1) - 1), ring_type(32))
        assert abs(encoding.decode(total, 5).values[0]) == 5.0
        total[0] = (size + (1 if size > 0 else -1)) % 2**32
        with pytest.raises(SecureAggregationError, match="cannot add up to"):
            encoding.decode(total, 5)


@pytest.mark.parametrize(
    "total", [np.zeros(9, np.uint16), np.zeros(9, np.int32), np.zeros((3, 9), np.uint32), np.zeros(1, np.uint32)]
)
def test_what_is_no_sum_is_refused(total: NDArray[Any]) -> None:
    with pytest.raises(SecureAggregationError, match="a sum must be uint32 with at least"):
        WEIGHTED.decode(total, 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"clip": 0.0}, "clip must be"),
        ({"clip": math.nan}, "clip must be"),
        ({"clients": 0}, "clients must be"),
        ({"clients": 2.0}, "clients must be a whole number"),
        ({"bits": 8}, "bits must be 16, 32 or 64, got 8"),
        ({"max_weight": 0.0}, "max_weight must be"),
        ({"max_weight": math.inf}, "max_weight must be"),
        ({"scalars": (Count("clipped"),)}, "distinct names"),
        ({"scalars": (Measure("weight", 1.0),)}, "distinct names"),
        ({"scalars": (Count("a"), Count("a"))}, "distinct names"),
    ],
)
def test_an_encoding_that_cannot_work_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RingEncoding(**({"clip": 1.0, "clients": 10} | changes))


def test_an_encoding_is_a_value() -> None:
    assert RingEncoding(0.5, 100, max_weight=50.0, scalars=SCALARS) == WEIGHTED
    assert hash(WEIGHTED) == hash(RingEncoding(0.5, 100, max_weight=50.0, scalars=SCALARS))
    assert RingEncoding(0.5, 101, max_weight=50.0, scalars=SCALARS) != WEIGHTED
    assert "scalars=" in repr(WEIGHTED)

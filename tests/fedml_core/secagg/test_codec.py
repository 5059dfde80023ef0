"""The bytes of messages: what was written is read, and nothing else is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml_core.errors import SecureAggregationError
from fedml_core.secagg.codec import VERSION, Kind, Reader, Writer, packed

NUMBERS = st.lists(st.integers(0, 2**32 - 1), max_size=20)


@given(st.sampled_from(Kind), NUMBERS, st.binary(min_size=5, max_size=5), st.integers(0, 2**32 - 1))
def test_what_was_written_is_read(kind: Kind, numbers: list[int], data: bytes, number: int) -> None:
    message = Writer(kind).numbers(numbers).fixed(data, 5).number(number).bytes()
    reader = Reader(message, kind)
    assert (reader.numbers(), reader.fixed(5), reader.number()) == (numbers, data, number)
    reader.finish()


@given(st.binary(max_size=64), st.sampled_from(Kind))
def test_random_bytes_are_fields_or_one_of_our_errors(data: bytes, kind: Kind) -> None:
    # "whatever bytes are read, the outcome is the message's fields or a SecureAggregationError."
    for start in (b"", b"fvsa", b"fvsa" + bytes([VERSION, kind])):
        try:
            reader = Reader(start + data, kind)
            reader.numbers()
            reader.fixed(3)
            reader.finish()
        except SecureAggregationError:
            continue


def test_a_message_is_tag_version_kind_and_big_endian_numbers() -> None:
    assert Writer(Kind.SURVIVORS).numbers([1, 258]).bytes() == b"fvsa\x01\x06" + bytes.fromhex(
        "000000020000000100000102"
    )


@pytest.mark.parametrize("value", [-1, 2**32, 2**70])
def test_a_number_that_does_not_fit_is_one_clear_error(value: int) -> None:
    for write in (
        Writer(Kind.ADVERT).number,
        lambda one: Writer(Kind.ADVERT).numbers([one]),
        lambda one: packed([one]),
    ):
        with pytest.raises(SecureAggregationError, match="from 0 to below 2\\^32"):
            write(value)


def test_a_field_of_another_size_is_not_written() -> None:
    with pytest.raises(SecureAggregationError, match="field of 4 bytes was given 3"):
        Writer(Kind.ADVERT).fixed(b"abc", 4)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "too early"),
        (b"fvs", "too early"),
        (b"abcd\x01\x06", "not one of secure aggregation"),
        (b"fvsa\x02\x06", "version 2 and this side speaks 1; install"),
        (b"fvsa\x01\x07", "of kind survivors was expected, got kind 7"),
        (b"fvsa\x01\x06\0\0\0\2\0\0\0\1", "announces 2 entries"),
        (b"fvsa\x01\x06\xff\xff\xff\xff", "announces 4294967295 entries"),
        (b"fvsa\x01\x06\0\0\0\0x", "1 bytes too many"),
    ],
)
def test_what_is_wrong_with_a_message_is_said(data: bytes, complaint: str) -> None:
    with pytest.raises(SecureAggregationError, match=complaint):
        reader = Reader(data, Kind.SURVIVORS)
        reader.numbers()
        reader.finish()

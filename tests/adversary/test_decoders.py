"""Mutated messages and random bytes at everything that reads: an error of ours or a valid parse, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedml_core.errors import SecureAggregationError
from fedml_core.secagg import transcript
from fedml_core.secagg.codec import Kind
from fedml_core.secagg.parameters import Parameters
from tests.adversary.decoders import due

KINDS = pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name.lower())


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Return what changes, cuts, repeats or inserts a piece of a message."""
    at, size = draw(st.integers(0, 1000)), draw(st.integers(0, 9))
    piece = draw(st.binary(max_size=9) | st.sampled_from([b"\0\0\0\0", b"\xff" * 4, b"\0\0\0\1"]))
    times = draw(st.sampled_from([1, 1, 1, 2, 50]))

    def mutate(data: bytes) -> bytes:
        place = at % (len(data) + 1)
        return data[:place] + piece * times + data[place + size :]

    return mutate


@KINDS
def test_the_message_that_is_due_is_read(kind: Kind) -> None:
    one = due(kind)
    assert one.message[5] == kind
    one.read(one.message)
    assert len(one.message) == len(due(kind).message)


@KINDS
@settings(max_examples=50)
@given(changes=st.lists(mutations(), min_size=1, max_size=2))
def test_a_mutated_message_is_read_or_refused(kind: Kind, changes: list[Callable[[bytes], bytes]]) -> None:
    one = due(kind)
    data = one.message
    for change in changes:
        data = change(data)
    try:
        one.read(data)
    except SecureAggregationError as error:
        assert str(error)


@KINDS
@settings(max_examples=30)
@given(data=st.binary(max_size=400), headed=st.booleans())
def test_random_bytes_are_read_or_refused(kind: Kind, data: bytes, headed: bool) -> None:
    try:
        due(kind).read(b"fvsa\x01" + bytes([kind]) + data if headed else data)
    except SecureAggregationError as error:
        assert str(error)


@given(st.text(max_size=200))
def test_random_text_is_no_parameters(text: str) -> None:
    with pytest.raises(SecureAggregationError):
        Parameters.from_text(text)


@settings(max_examples=100)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.just("secagg+"),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
        max_leaves=9,
    )
)
def test_whatever_json_is_given_as_a_transcript_has_findings(value: Any) -> None:
    findings = transcript.check(json.loads(json.dumps(value)))
    assert findings and any(finding.verdict == "failed" for finding in findings)

"""What is fixed before a secure sum: one canonical form, one context, and no way to smuggle anything in."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml_core.errors import SecureAggregationError
from fedml_core.secagg.parameters import Parameters, digest_of
from tests.adversary.players import parameters_of

OTHER: dict[str, Any] = {
    "run": "s",
    "round": 2,
    "attempt": 1,
    "length": 9,
    "bits": 64,
    "encoding": {"clip": 1.0},
    "minimum": 3,
    "corrupt_share": 0.1,
    "dropout_share": 0.1,
    "active": False,
    "security_bits": 40,
    "roster": "cd",
}


def test_every_field_changes_the_context() -> None:
    # "two parties with different parameters have different contexts, so no key, signature or share of one is of any use
    # to the other."
    # "A4 binding: change one byte of round, attempt, roster or any parameter: the result is an abort, never a sum."
    assert OTHER.keys() == {field.name for field in dataclasses.fields(Parameters)}
    contexts = {parameters_of(**{name: value}).context for name, value in OTHER.items()}
    assert len(contexts | {parameters_of().context}) == len(OTHER) + 1


def test_parameters_are_read_as_they_were_written() -> None:
    made = parameters_of(encoding={"clip": 0.5, "scalars": [["examples", 3]]}, corrupt_share=0.1)
    again = Parameters.from_text(made.to_text())
    assert again == made and again.context == made.context


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run", 3),
        ("run", "x" * 129),
        ("round", -1),
        ("round", True),
        ("round", 1.0),
        ("attempt", -1),
        ("length", 0),
        ("bits", 8),
        ("bits", "32"),
        ("minimum", 1),
        ("corrupt_share", 1),
        ("corrupt_share", -0.1),
        ("corrupt_share", float("nan")),
        ("dropout_share", True),
        ("dropout_share", "0.1"),
        ("active", 1),
        ("security_bits", 19),
        ("security_bits", 129),
        ("roster", None),
        ("encoding", []),
        ("encoding", {"clip": float("nan")}),
        ("encoding", {"clip": object()}),
    ],
)
def test_a_field_of_another_type_or_range_is_refused(field: str, value: Any) -> None:
    with pytest.raises(SecureAggregationError):
        parameters_of(**{field: value})


def without(name: str) -> str:
    table = json.loads(parameters_of().to_text())
    del table[name]
    return json.dumps(table, sort_keys=True, separators=(",", ":"))


def with_value(name: str, value: str) -> str:
    return parameters_of().to_text().replace(f'"{name}":', f'"{name}":{value},"{name}":', 1)


NESTED = parameters_of().to_text().replace("{}", '{"x":' + "[" * 3000 + "]" * 3000 + "}")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        "{" * 10_000,
        " " * 70_000,
        without("roster"),
        parameters_of().to_text() + " ",
        parameters_of().to_text().replace("{", '{"more":1,', 1),
        parameters_of().to_text().replace('"round":1', '"round":1.0'),
        parameters_of().to_text().replace('"encoding":{}', '"encoding":{"x":NaN}'),
        parameters_of().to_text().replace('"encoding":{}', '"encoding":{"x":1e999}'),
        parameters_of().to_text().replace('"round":1', '"round":' + "9" * 5000),
        with_value("round", "1"),
        NESTED,
    ],
    ids=range(15),
)
def test_text_that_is_not_canonical_parameters_is_one_clear_error(text: str) -> None:
    with pytest.raises(SecureAggregationError, match="the parameters|must be"):
        Parameters.from_text(text)


@given(st.text(max_size=50), st.integers(0, 400), st.integers(0, 3))
def test_altered_text_is_parameters_or_one_of_our_errors(piece: str, at: int, cut: int) -> None:
    text = parameters_of(encoding={"clip": 0.5, "deep": [1, {"a": None}]}).to_text()
    try:
        made = Parameters.from_text(text[:at] + piece + text[at + cut :])
    except SecureAggregationError:
        return
    assert made.to_text() == text[:at] + piece + text[at + cut :]


def test_whoever_keeps_the_encoding_cannot_change_what_was_agreed_on() -> None:
    # "whoever proposes them chooses them; what is too weak for a site, its own floor refuses."
    # "That must cover `active`, `minimum`, `corrupt_share` and `security_bits`: a server that draws many
    # graphs loses their logarithm of the bits."
    table: dict[str, Any] = {"clip": [1.0]}
    made = parameters_of(encoding=table)
    context = made.context
    table["clip"].append(2.0)
    assert made.encoding == {"clip": [1.0]}
    assert dataclasses.replace(made).context == context


@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.binary(max_size=4), max_size=4))
def test_no_two_lists_of_parts_have_one_digest(first: list[bytes], second: list[bytes]) -> None:
    assert (digest_of("a", *first) == digest_of("a", *second)) == (first == second)
    assert digest_of("a", *first) != digest_of("b", *first)

from __future__ import annotations

import json
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from fedml_core.errors import PrivacyError
from fedml_core.privacy.events import canonical, checked, fold, sampling_of
from tests.fedml_core.privacy.accounting_cases import (
    composed,
    fixed_size,
    gaussian,
    integer_sum,
    laplace,
    local,
    matrix,
    poisson,
    repeated,
    shuffled,
    tree,
)

EVERY = [
    gaussian(1.0),
    laplace(1.0),
    integer_sum("discrete-gaussian-sum"),
    integer_sum("skellam-sum"),
    poisson(0.1, gaussian(1.0)),
    fixed_size(10, 100, gaussian(1.0)),
    shuffled(gaussian(1.0)),
    tree(1.0, 8),
    matrix(1.0, 2.0),
    local(1.0),
    composed(gaussian(1.0), laplace(2.0)),
    repeated(3, gaussian(1.0)),
]


def named(event: dict[str, Any]) -> str:
    return str(event["name"])


# an event with an unknown name, a missing field, an extra field or a value out of range raises PrivacyError.
@pytest.mark.parametrize("event", EVERY, ids=named)
def test_every_event_of_the_vocabulary_is_read_and_written_as_json(event: dict[str, Any]) -> None:
    assert checked(event) == event
    assert json.loads(canonical(event)) == event
    assert canonical(dict(reversed(event.items()))) == canonical(event)


@pytest.mark.parametrize("event", EVERY, ids=named)
def test_an_event_with_a_field_missing_is_refused(event: dict[str, Any]) -> None:
    for field in event.keys() - {"name"}:
        with pytest.raises(PrivacyError, match=f"needs {field}"):
            checked({key: value for key, value in event.items() if key != field})


@pytest.mark.parametrize("event", EVERY, ids=named)
def test_an_event_with_a_field_too_many_is_refused(event: dict[str, Any]) -> None:
    with pytest.raises(PrivacyError, match="has no field clipping"):
        checked({**event, "clipping": 1.0})


@pytest.mark.parametrize("name", ["gauss", "noop", "", 7, None, ["gaussian"]])
def test_an_unknown_event_is_refused(name: object) -> None:
    with pytest.raises(PrivacyError, match="nothing can account for an event named"):
        checked({"name": name})


@pytest.mark.parametrize("value", [0, 0.0, -1.0, float("nan"), float("inf"), True, "1", None, 1e-12, 1e20, [1.0]])
def test_a_noise_that_is_no_number_above_zero_is_refused(value: object) -> None:
    with pytest.raises(PrivacyError, match="noise_multiplier must be"):
        checked({"name": "gaussian", "noise_multiplier": value})


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (poisson(0.0, gaussian(1.0)), "sampling_probability must be > 0 and <= 1"),
        (poisson(1.5, gaussian(1.0)), "sampling_probability must be > 0 and <= 1"),
        (fixed_size(101, 100, gaussian(1.0)), "sample must be <= population, got 101 of 100"),
        (repeated(0, gaussian(1.0)), "count must be >= 1"),
        (composed(), "events must be a list of at least one event"),
        (tree(1.0, 0), "steps must be >= 1"),
        (tree(1.0, 4, -1), "restarts must be >= 0"),
        (integer_sum("skellam-sum", beta=1.0), "beta must be > 0 and < 1"),
        (integer_sum("skellam-sum", clients=2.5), "clients must be a whole number"),
        (integer_sum("skellam-sum", ring_bits=65), "ring_bits must be"),
    ],
)
def test_a_value_out_of_range_is_refused(event: dict[str, Any], said: str) -> None:
    with pytest.raises(PrivacyError, match=said):
        checked(event)


@pytest.mark.parametrize("inner", [tree(1.0, 4), matrix(1.0, 1.0), local(1.0), poisson(0.5, gaussian(1.0))])
@pytest.mark.parametrize("scheme", ["poisson", "fixed-size", "shuffled"])
def test_a_sample_of_what_no_theorem_amplifies_is_refused(scheme: str, inner: dict[str, Any]) -> None:
    around = {"poisson": poisson(0.1, inner), "fixed-size": fixed_size(1, 10, inner), "shuffled": shuffled(inner)}
    for event in (around[scheme], repeated(2, around[scheme])):
        with pytest.raises(PrivacyError, match=f"no theorem says what {scheme} sampling"):
            checked(event)


def test_what_is_no_plain_json_is_refused() -> None:
    deep = gaussian(1.0)
    for _ in range(2000):
        deep = repeated(1, deep)
    endless: dict[str, Any] = {"name": "composed"}
    endless["events"] = [endless]
    narrow: dict[str, Any] = {"name": "gaussian", "noise_multiplier": np.float32(1.0)}
    wrong: list[Any] = [deep, endless, narrow, 7, "gaussian", {"name": {1, 2}}]
    for event in wrong:
        with pytest.raises(PrivacyError):
            fold([event])
    with pytest.raises(PrivacyError, match="put it into a list"):
        fold(gaussian(1.0))  # type: ignore[arg-type]
    with pytest.raises(PrivacyError, match="at most 16 deep"):
        checked(deep)


# Equal multisets of events fold to equal terms, whatever their order and grouping.
def test_equal_events_fold_into_one_term_however_they_are_grouped() -> None:
    once, other = poisson(0.1, gaussian(1.0)), gaussian(2.0)
    flat = fold([once, other, once, once])
    assert list(flat.values()) == [1, 3]
    assert fold([composed(once, other), repeated(2, once)]) == flat
    assert fold([repeated(3, composed(once)), composed(composed(other))]) == flat
    assert fold([MappingProxyType(once), other, repeated(1, repeated(2, once))]) == flat


def test_a_composition_inside_a_sample_stays_together() -> None:
    (term,) = fold([poisson(0.1, composed(gaussian(1.0), repeated(2, gaussian(1.0)), laplace(1.0)))])
    assert [(part.name, count) for part, count in term.parts] == [("gaussian", 3), ("laplace", 1)]


def test_the_scheme_of_a_list_is_what_its_events_say() -> None:
    assert sampling_of(fold([])) == sampling_of(fold([gaussian(1.0)])) == "none"
    assert sampling_of(fold([poisson(0.1, gaussian(1.0))] * 3)) == "poisson"
    assert sampling_of(fold([poisson(0.1, gaussian(1.0)), gaussian(1.0)])) == "none+poisson"
    assert sampling_of(fold([shuffled(gaussian(1.0))])) == "shuffled"


def test_reading_an_event_changes_nothing() -> None:
    event = composed(gaussian(1.0), poisson(0.1, gaussian(1.0)))
    before = json.dumps(event)
    read = checked(event)
    read["events"].clear()
    assert json.dumps(event) == before

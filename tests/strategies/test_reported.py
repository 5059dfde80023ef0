from __future__ import annotations

from typing import Any

import pytest

from fedml_core.errors import ReplyError
from strategies.reported import mean_metrics, read_metrics


def test_the_number_of_examples_comes_apart_from_the_other_metrics() -> None:
    record = {"num-examples": 4, "loss": 0.5, "steps": 3, "per-class": [1, 2.5]}
    assert read_metrics(record, "num-examples", 1e9) == (4.0, {"loss": 0.5, "steps": 3.0, "per-class": [1.0, 2.5]})


@pytest.mark.parametrize(
    ("record", "rule", "message"),
    [
        ({}, "weight", "it must report 'n' as one number"),
        ({"n": [1, 2]}, "weight", "it must report 'n' as one number"),
        ({"n": 0}, "weight", "'n' must be > 0 and <= 100, got 0"),
        ({"n": -3}, "weight", "'n' must be > 0 and <= 100, got -3"),
        ({"n": 101}, "weight", "'n' must be > 0 and <= 100, got 101"),
        ({"n": float("nan")}, "weight", "'n' must be > 0 and <= 100, got nan"),
        ({"n": float("inf")}, "weight", "'n' must be > 0 and <= 100, got inf"),
        ({"n": 10**400}, "weight", "'n' must be > 0 and <= 100, got nan"),
        ({"n": "7 examples"}, "weight", "'n' must be > 0 and <= 100, got nan"),
        ({"n": 1, "loss": float("nan")}, "non-finite", "the metric 'loss' is NaN or infinite"),
        ({"n": 1, "loss": [0.0, float("inf")]}, "non-finite", "the metric 'loss' is NaN or infinite"),
        ({"n": 1, "loss": 10**400}, "non-finite", "the metric 'loss' is NaN or infinite"),
    ],
    ids=repr,
)
def test_a_record_that_cannot_be_averaged_is_refused(record: Any, rule: str, message: str) -> None:
    with pytest.raises(ReplyError, match=message) as refused:
        read_metrics(record, "n", 100)
    assert refused.value.rule == rule


def test_means_are_by_examples_over_those_who_report_the_metric() -> None:
    rows: Any = [(1.0, {"a": 1.0, "l": [0.0, 2.0]}), (3.0, {"a": 5.0, "b": 7.0, "l": [4.0, 6.0]})]
    assert mean_metrics(rows) == {"a": 4.0, "b": 7.0, "l": [3.0, 5.0]}


def test_lists_of_different_lengths_and_lists_beside_numbers_have_no_mean() -> None:
    assert mean_metrics([(1.0, {"l": [1.0], "m": 1.0}), (1.0, {"l": [1.0, 2.0], "m": [1.0]})]) == {}
    assert mean_metrics([]) == {}
    assert mean_metrics([(2.0, {"l": []})]) == {"l": []}

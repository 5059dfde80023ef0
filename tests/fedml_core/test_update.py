"""Only a well-formed update passes the check before the sum, and a client's report has few names, all harmless."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedml_core.errors import ReplyError, TaskError
from fedml_core.evaluation import Evaluator
from fedml_core.task import Task, accuracy
from fedml_core.update import MAX_SUMS, Total, Update, all_finite, check_sums, check_update, flaw_in_name

SIZE = 3
GOOD_NAMES = ["a", "loss", "top-5", "f1.macro", "A_b-c.9", "-", ".", "Values", "weights", "cls", "self", "x" * 64]
BAD_NAMES = ["", "x" * 65, "a b", "a/b", "a\n", "é", "٣", "<b>", "\x1b[2J", "a\ud800", "values", "weight"]


def update(**changes: Any) -> Update:
    return Update.of(torch.ones(SIZE), 2.0, examples=2.0).replace(**changes)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def several(count: int, **changes: Any) -> Update:
    numbers = torch.ones(count, dtype=torch.float64)
    return Update(torch.ones(count, SIZE), numbers, {"examples": numbers}).replace(**changes)


def test_an_update_of_plain_numbers_holds_them_in_full_precision() -> None:
    made = Update.of(torch.ones(SIZE), 0.1, examples=1 / 3, cls=2.0, values=4.0)
    assert made.weight.dtype == torch.float64
    assert made.weight.item() == 0.1
    assert {name: value.item() for name, value in made.sums.items()} == {"examples": 1 / 3, "cls": 2.0, "values": 4.0}
    assert made.lead == torch.Size([])
    assert several(4).lead == torch.Size([4])


def test_facts_stay_behind_and_nothing_else_does() -> None:
    made = update(facts={"steps": scalar(5.0)})
    sent = made.outgoing()
    assert sent.facts == {}
    assert sent.values is made.values
    assert sent.weight is made.weight
    assert sent.sums is made.sums
    assert list(made.facts) == ["steps"]


def test_neither_an_update_nor_a_total_prints_its_values() -> None:
    assert repr(update()) == "Update()"
    assert repr(Total(torch.full((SIZE,), 9.25), 2.0, 1)) == "Total(weight=2.0, count=1, sums={})"


@pytest.mark.parametrize("good", [update(), several(4), several(0), update(sums={}), update(weight=scalar(9.0))])
def test_a_good_update_passes(good: Update) -> None:
    check_update(good, SIZE, max_weight=9.0)


@pytest.mark.parametrize(
    ("bad", "rule", "said"),
    [
        (update(values=torch.ones(4)), "shape", "values must have shape (..., 3), got (4,)"),
        (update(values=torch.tensor(1.0)), "shape", "values must have shape (..., 3), got ()"),
        (update(values=torch.ones(2, SIZE)), "shape", "weight and sums must have the leading shape (2,) of the values"),
        (update(weight=torch.ones(1)), "shape", "weight and sums must have the leading shape () of the values"),
        (several(4, sums={"examples": torch.ones(3)}), "shape", "weight and sums must have the leading shape (4,)"),
        (update(values=torch.ones(SIZE).double()), "dtype", "values must be float32, got float64"),
        (update(values=torch.tensor([1.0, math.nan, 1.0])), "non-finite", "values or sums hold NaN or infinity"),
        (update(values=torch.tensor([math.inf, -math.inf, 1.0])), "non-finite", "values or sums hold NaN or infinity"),
        (update(sums={"loss": scalar(math.inf)}), "non-finite", "values or sums hold NaN or infinity"),
        (update(weight=scalar(0.0)), "weight", "a weight must be > 0 and <= 9, got 0.0"),
        (update(weight=scalar(9.5)), "weight", "a weight must be > 0 and <= 9, got 9.5"),
        (update(weight=scalar(math.nan)), "weight", "a weight must be > 0 and <= 9, got nan"),
        (several(2, weight=torch.tensor([1.0, -1.0])), "weight", "a weight must be > 0 and <= 9, got one"),
        (update(sums={"a b": scalar(1.0)}), "metrics", "a sum may not be called 'a b': a name is 1 to 64 letters"),
        (update(sums={"weight": scalar(1.0)}), "metrics", "a sum may not be called 'weight': the name is taken"),
        (update(sums={"x" * 999: scalar(1.0)}), "metrics", "a sum may not be called 'xxxxxxxx"),
        (
            update(sums={f"m{number}": scalar(1.0) for number in range(65)}),
            "metrics",
            "a reply may report at most 64 sums, got 65",
        ),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)
def test_a_bad_update_is_refused_with_its_rule(bad: Update, rule: str, said: str) -> None:
    with pytest.raises(ReplyError) as error:
        check_update(bad, SIZE, max_weight=9.0)
    assert error.value.rule == rule
    assert str(error.value).startswith(said)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_a_harmless_name_passes(name: str) -> None:
    assert flaw_in_name(name) is None
    check_sums([name])


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_name_that_could_do_harm_is_refused(name: str) -> None:
    with pytest.raises(ReplyError, match="^a sum may not be called ") as error:
        check_sums(["examples", name])
    assert error.value.rule == "metrics"
    assert str(error.value).isprintable()


def test_as_many_sums_as_allowed_pass() -> None:
    check_sums(f"m{number}" for number in range(MAX_SUMS))


@given(st.text(max_size=70))
def test_what_passes_is_printable_ascii_without_blanks_and_slashes(name: str) -> None:
    if flaw_in_name(name) is None:
        assert name.isascii() and name.isprintable() and 1 <= len(name) <= 64
        assert not set(name) & set(" /\\<>\"'`$|[](){}#*&;:")


def test_a_finite_sum_that_overflows_is_still_finite() -> None:
    assert all_finite(torch.full((4,), 3e38))
    assert not all_finite(torch.tensor([3e38, 3e38, math.inf]))


def evaluator_of(names: list[Any]) -> Evaluator:
    task = Task.classification(model=lambda: nn.Linear(2, 2), classes=2, metrics=dict.fromkeys(names, accuracy))
    return Evaluator(task, device="cpu")


@pytest.mark.parametrize("name", [*BAD_NAMES, "examples", "loss", 3], ids=ascii)
def test_a_task_may_not_call_a_metric_what_no_reply_may_report(name: Any) -> None:
    with pytest.raises(TaskError, match="^a metric may not be called .*; rename it$"):
        evaluator_of([name])


def test_a_task_may_have_as_many_metrics_as_a_reply_can_hold() -> None:
    # Beside them a reply reports examples and loss; "accuracy" is one of them.
    names = [f"m{number}" for number in range(61)]
    check_sums(["examples", "loss", *evaluator_of(names).task.metrics])
    with pytest.raises(TaskError, match="^a task may have at most 62 metrics, got 63; leave some out"):
        evaluator_of([*names, "m61"])

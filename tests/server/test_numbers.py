"""Client numbers in reports: the same numbers in little memory, whatever the cohort."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from collections.abc import Sequence

import pytest

from server.numbers import LISTED, ClientNumbers
from server.round import RoundReport
from server.validation import Exclusion


def report(number: int, participants: Sequence[int], missing: Sequence[int] = ()) -> RoundReport:
    return RoundReport(
        round=number,
        status="ok",
        why="",
        cohort=len(participants) + len(missing),
        replies=len(participants),
        participants=participants,
        missing=missing,
        excluded=(Exclusion(1, "task", "no data"),),
        metrics={"train": {"loss": 0.5}},
        bytes_up=1,
        bytes_down=1,
        seconds=0.1,
        protection="none",
    )


@pytest.mark.parametrize(
    ("numbers", "size_bytes"),
    [
        ([], 0),
        ([0, 255], 2),
        ([0, 256], 4),
        ([7, 65_536, 3], 12),
        ([1 << 32], 8),
        ([-1, 5], 16),
        ([-(1 << 63), (1 << 63) - 1], 16),
    ],
)
def test_numbers_of_any_size_come_out_as_they_went_in(numbers: list[int], size_bytes: int) -> None:
    held = ClientNumbers(numbers)
    assert held == numbers and held == tuple(numbers) and list(held) == numbers and repr(held) == repr(numbers)
    assert held.size_bytes == size_bytes and len(held) == len(numbers)
    assert pickle.loads(pickle.dumps(held)) == held == ClientNumbers(held)
    assert hash(held) == hash(ClientNumbers(numbers))


def test_they_are_a_sequence_as_any_other() -> None:
    held = ClientNumbers([4, 9, 300])
    assert (held[0], held[-1], held[:2], held[::-1]) == (4, 300, [4, 9], [300, 9, 4])
    assert 300 in held and 5 not in held and held.index(9) == 1
    assert held != [4, 9] and held != [4, 9, 301] and held != "abc" and held != 3
    with pytest.raises(IndexError):
        held[3]


@pytest.mark.parametrize("wrong", [["a"], [1.5], "abc", None, [1 << 63]])
def test_what_is_no_client_number_is_refused(wrong: object) -> None:
    with pytest.raises((TypeError, OverflowError)):
        ClientNumbers(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("cohort", [10, 1_000, 100_000])
def test_a_report_keeps_the_first_thousand_in_memory_as_in_its_line(cohort: int) -> None:
    made = report(3, range(cohort), list(range(cohort, 2 * cohort)))
    assert made.participants == list(range(min(cohort, LISTED))) and made.replies == cohort
    line = json.loads(json.dumps(made.to_json()))
    assert line["participants"] == list(made.participants) and line["missing"] == list(made.missing)
    again = RoundReport.from_json(line)
    assert (again.participants, again.missing) == (made.participants, made.missing)


def test_what_a_run_retains_of_a_round_does_not_grow_with_the_cohort() -> None:
    def retained(cohort: int) -> float:
        rounds = 40
        tracemalloc.start()
        kept = [report(number, [client * 97 for client in range(cohort)]) for number in range(rounds)]
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return size / len(kept)

    few, many = retained(10), retained(20_000)
    # Packed 4 bytes each, and never more than the first thousand; as a list they would be 700 kB.
    assert many - few < 4 * LISTED + 500

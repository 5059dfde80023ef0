"""The benchmark of private training measures what it says it does; how fast anything is, no test says."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.private_training import OPACUS_MODES, contenders, line, measure
from benchmarks.workloads import WORKLOADS

SMALL = dataclasses.replace(WORKLOADS["logreg"], pool=200)


def test_all_contenders_take_turns_at_the_same_workload() -> None:
    found = contenders(SMALL, 20)
    assert found.keys() == {"plain", "private", *(f"opacus-{mode}" for mode in OPACUS_MODES)}
    seconds = measure(found, 2, 3)
    assert all(len(each) == 3 and min(each) > 0 for each in seconds.values())
    row = line("small", 20, seconds)
    assert row["private_to"].keys() == found.keys() - {"private"} and row["fastest_opacus"] in found


def test_ratios_are_taken_turn_by_turn() -> None:
    seconds = {"plain": [1.0, 10.0, 2.0], "private": [2.0, 10.0, 6.0], "opacus-ghost": [4.0, 5.0, 6.0]}
    row = line("w", 10, seconds)
    assert row["private_to"] == {"plain": 2.0, "opacus-ghost": pytest.approx(1.0)}
    assert row["step_s"]["private"] == 6.0 and row["fastest_opacus"] == "opacus-ghost"
    assert line("w", 10, {name: seconds[name] for name in ("plain", "private")})["fastest_opacus"] is None

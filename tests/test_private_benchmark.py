"""The benchmark of private training measures what it says it does; how fast anything is, no test says."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from benchmarks.private_training import OPACUS_MODES, Turn, contenders, measure, noise_seconds, result
from benchmarks.workloads import WORKLOADS

SMALL = dataclasses.replace(WORKLOADS["logreg"], pool=200)
SECONDS = {"plain": [1.0, 10.0, 2.0], "private": [2.0, 10.0, 6.0], "opacus-ghost": [4.0, 5.0, 6.0]}


def row_of(*names: str) -> dict[str, Any]:
    return result("w", 10, {name: [Turn(clock, clock**2) for clock in SECONDS[name]] for name in names})


def test_all_contenders_take_turns_at_the_same_workload() -> None:
    found = contenders(SMALL, 20)
    assert found.keys() == {"plain", "private", *(f"opacus-{mode}" for mode in OPACUS_MODES)}
    turns = measure(found, 2, 3)
    assert all(len(each) == 3 and min(min(turn) for turn in each) > 0 for each in turns.values())
    row = result("small", 20, turns)
    assert row["private_to"].keys() == found.keys() - {"private"} and row["fastest_opacus"] in found


def test_ratios_are_taken_turn_by_turn() -> None:
    row = row_of(*SECONDS)
    assert row["private_to"] == {"plain": 2.0, "opacus-ghost": pytest.approx(1.0)}
    assert row["spread"] == {"plain": [1.0, 3.0], "opacus-ghost": [0.5, 2.0]}
    assert row["private_to_in_processor_time"] == {"plain": 4.0, "opacus-ghost": pytest.approx(1.0)}
    assert row["step_s"]["private"] == 6.0 and row["fastest_opacus"] == "opacus-ghost"
    assert row_of("plain", "private")["fastest_opacus"] is None


@pytest.mark.parametrize("parameters", [1000, 700_000])
def test_noise_and_its_keystream_are_measured_for_small_and_large_models(parameters: int) -> None:
    found = noise_seconds(parameters, draws=5)
    assert found.keys() == {"noise_s", "keystream_s"} and min(found.values()) > 0

"""`fedveil plan` says what the run would have cost, before it is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.simulations.project_cases import fedveil, nothing_stays, project

PRIVATE = (
    "--set",
    'strategy={name="CentralDP",strategy={name="FedAvg",weighting="Uniform"},clip_norm=0.5,'
    "noise_multiplier=1.0,expected_cohort=2.0,delta=1e-5}",
)
SAMPLED = ("--set", 'sampling={name="PoissonSampling",rate=0.5}')


def answer(path: Path, *words: str | Path) -> dict[str, Any]:
    with nothing_stays():
        result = fedveil("plan", path, "--json", *words)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_the_outlook_of_the_last_round_is_what_the_run_then_reports(tmp_path: Path) -> None:
    run = project(tmp_path)
    outlook = answer(run, *PRIVATE, *SAMPLED, "--set", "rounds=4")["privacy"]
    with nothing_stays():
        result = fedveil(
            "simulate", run, "--json", "--no-plots", "--out", tmp_path / "out", *PRIVATE, *SAMPLED, "--rounds", "4"
        )
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout.splitlines()[-1])
    last = outlook["rounds"][-1]
    assert last["round"] == 4
    # The run's own accountant takes a coarser grid: never below, and at most 0.2 % above.
    assert last["epsilon"] <= summary["epsilon"] * (1 + 1e-9) <= last["epsilon"] * 1.002
    assert summary["privacy"]["delta"] == last["delta"] == 1e-5
    assert (last["unit"], last["adjacency"], last["sampling"]) == ("client", "add-or-remove-one", "poisson")
    assert outlook["noise_per_coordinate"] == pytest.approx(0.25)


def test_a_run_without_differential_privacy_is_said_to_have_no_bound(tmp_path: Path) -> None:
    run = project(tmp_path)
    assert answer(run)["privacy"] is None
    with nothing_stays():
        assert "epsilon has no bound" in fedveil("plan", run).stdout


def test_a_budget_that_is_too_small_is_answered_with_what_fits(tmp_path: Path) -> None:
    advice = answer(project(tmp_path), *PRIVATE, *SAMPLED, "--set", "rounds=9", "--budget", "6")["privacy"]["advice"]
    assert any("more than the budget of 6" in line and "times the noise" in line for line in advice)


def test_a_picture_is_drawn_where_one_is_asked_for(tmp_path: Path) -> None:
    answer(project(tmp_path), *PRIVATE, "--set", "rounds=3", "--plot", tmp_path / "new" / "epsilon.png")
    assert (tmp_path / "new" / "epsilon.png").stat().st_size > 1000

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


APART = ("--set", 'sampling={name="MinimumSeparation",rounds_apart=4}')
EXAMPLES = ("--set", "clients.examples={noise_multiplier=1.0,clip_norm=1.0,sampling_rate=0.1}")


def test_examples_that_simulated_clients_protect_are_planned_for(tmp_path: Path) -> None:
    run = project(tmp_path)
    found = answer(run, *EXAMPLES, "--set", "budget.delta=1e-6", "--set", "rounds=4")
    assert found["privacy"] == found["example_privacy"]
    assert found["server_sees"].startswith("example-level DP (DP-SGD at every client, FlatClipping to 1")
    last = found["privacy"]["rounds"][-1]
    told = (last["round"], last["unit"], last["adjacency"], last["sampling"], last["delta"])
    assert told == (4, "example", "add-or-remove-one", "poisson", 1e-6)
    with nothing_stays():
        words = ("--json", "--no-plots", "--out", tmp_path / "out", *EXAMPLES, "--set", "budget.delta=1e-6")
        result = fedveil("simulate", run, *words, "--rounds", "4")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout.splitlines()[-1])
    assert last["epsilon"] <= summary["epsilon"] * (1 + 1e-9) <= last["epsilon"] * 1.003
    assert summary["privacy"] == summary["example_privacy"]


def test_signal_and_noise_are_told_for_every_kind_of_noise_that_rounds_do_not_share(tmp_path: Path) -> None:
    run, plain = project(tmp_path), '{name="FedAvg",weighting="Uniform"}'
    step = answer(run, *EXAMPLES, "--set", "training.batch_size=8")["example_privacy"]
    assert step["noise_per_coordinate"] == pytest.approx(1.0 / 8)
    local = f'strategy={{name="LocalDP",strategy={plain},clip_norm=2.0,epsilon=8.0,delta=1e-5}}'
    everybody = answer(run, "--set", local, "--set", 'sampling="EveryClient"', "--set", "clients.count=4")["privacy"]
    one = answer(run, "--set", local, "--set", 'sampling={name="FixedSampling",size=1}')["privacy"]
    assert everybody["noise_per_coordinate"] == pytest.approx(one["noise_per_coordinate"] / 2)
    adaptive = PRIVATE[1].replace("clip_norm=0.5", 'clip_norm={name="AdaptiveClip",initial=0.5,counter_noise=9.0}')
    assert answer(run, "--set", adaptive)["privacy"]["noise_per_coordinate"] == pytest.approx(0.25)
    shared = PRIVATE[1].replace("delta=", 'noise={name="TreeNoise",rounds=4},delta=')
    assert "noise_per_coordinate" not in answer(run, "--set", shared, "--set", "rounds=4", *APART)["privacy"]


def test_clients_and_examples_are_planned_for_together_and_a_budget_for_examples_says_what_fits(tmp_path: Path) -> None:
    budget = ("--set", 'budget={epsilon=3.0,unit="example"}')
    found = answer(project(tmp_path), *PRIVATE, *EXAMPLES, *budget, "--plot", tmp_path / "epsilon.png")
    assert found["privacy"]["rounds"][-1]["unit"] == "client"
    assert found["example_privacy"]["rounds"][-1]["unit"] == "example"
    assert any("more than the budget of 3" in line for line in found["example_privacy"]["advice"])
    assert (tmp_path / "epsilon.png").stat().st_size > 1000


def test_the_runs_own_budget_is_for_the_unit_that_it_names_and_the_least_of_its_limits(tmp_path: Path) -> None:
    budget = ("--set", "budget={epsilon=50.0,epsilon_per_run=6.0}", "--set", "rounds=9")
    found = answer(project(tmp_path), *PRIVATE, *SAMPLED, *EXAMPLES, *budget)
    assert any("more than the budget of 6" in line for line in found["privacy"]["advice"])
    assert not any("budget" in line for line in found["example_privacy"]["advice"])


def test_an_engine_or_a_budget_that_does_not_fit_is_named_with_its_table(tmp_path: Path) -> None:
    run = project(tmp_path)
    for change, said in (
        ("simulation.engine=fused", "clients.examples: the fused engine cannot protect examples"),
        ("budget={epsilon=3.0}", "budget: the budget counts the unit client, and this run protects example"),
    ):
        with nothing_stays():
            result = fedveil("plan", run, *EXAMPLES, "--set", change)
        assert result.exit_code == 2 and said in result.output


def test_a_budget_that_is_no_number_and_a_plot_that_is_a_folder_are_refused(tmp_path: Path) -> None:
    run = project(tmp_path)
    for words, said in (
        (("--budget", "nan"), "--budget"),
        (("--plot", tmp_path), "is a folder; name a file in it"),
        (("--plot", tmp_path / "epsilon.xyz"), "--plot must name a file that ends in .png"),
    ):
        with nothing_stays():
            result = fedveil("plan", run, *PRIVATE, *words)
        assert result.exit_code == 2 and said in result.output.replace("\n", " ")

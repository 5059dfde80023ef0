"""`fedveil plan` says what the run would have cost, before it is run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedml_core.privacy.correlated import BandedNoise, Noise, TreeNoise
from fedml_core.task import Task
from fedml_core.transform import Draws
from fedml_core.update import Total
from fedml_core.weighting import Uniform
from server import MinimumSeparation
from simulations.releases import release_of_clients
from simulations.simulate import Simulation
from strategies import CentralDP, FedAvg
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


def test_signal_and_noise_are_told_for_every_kind_of_noise(tmp_path: Path) -> None:
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
    told = answer(run, "--set", shared, "--set", "rounds=4", *APART)["privacy"]
    # After four rounds of a tree one node stands: the noise of a quarter of four independent rounds.
    assert told["noise_per_coordinate"] == pytest.approx(0.25 / 2) and told["noise_shared_by_rounds"] == 4
    assert told["aligned_signal_to_noise"] == pytest.approx(0.5 / told["noise_norm"])
    with nothing_stays():
        said = fedveil("plan", run, "--set", shared, "--set", "rounds=4", *APART).stdout
    assert "0.125 on each coordinate of a round's mean, an even share of what 4 rounds leave" in said


@pytest.mark.parametrize(
    ("noise", "rounds"),
    [
        (None, 6),
        (TreeNoise(rounds=12), 12),
        (TreeNoise(rounds=12), 7),
        (TreeNoise(rounds=9, restart_every=3), 8),
        (BandedNoise(rounds=9, bands=1), 6),
        (BandedNoise(rounds=9, bands=4), 9),
        (BandedNoise(rounds=9, bands=3), 2),
    ],
    ids=repr,
)
def test_the_noise_that_is_told_is_what_rounds_of_it_leave_on_the_model(noise: Noise | None, rounds: int) -> None:
    """Of noise that rounds partly take back, they are an even share of what is left in the sum of all rounds."""
    strategy = CentralDP(FedAvg(weighting=Uniform()), 0.5, 3.0, 20.0, 1e-5, noise=noise)
    task = Task.classification(model=lambda: nn.Linear(200, 100), classes=100)
    simulation = Simulation(task, strategy, clients=40, rounds=rounds, sampling=MinimumSeparation(12))
    release, spec = release_of_clients(simulation), simulation.trainer.spec
    assert release is not None and release.parameters == spec.size == 20_100
    state, model = strategy.init(spec), torch.zeros(spec.size)
    for number in range(rounds):
        model, state = strategy.step(model, Total(torch.zeros(spec.size), 0.0, 0), state, Draws.of(number))
    # The deviation of 20,100 draws is off by 0.5 %, and grids add up to 2 %; another node would be 6 % at least.
    left = float(model.double().std()) / math.sqrt(rounds)
    assert 0.98 < left / release.noise_per_coordinate < 1.04
    independent = 3.0 * 0.5 / 20.0
    alike = noise is None or noise.apart == 1
    assert alike == (release.noise_per_coordinate == pytest.approx(independent, rel=0.1))


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

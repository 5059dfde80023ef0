"""Simulated clients that protect their examples: who trains so, what their accounts are charged, what is said of it."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clients.per_example import AdaptiveClipping, FlatClipping
from clients.private_training import PrivateTraining
from fedml_core import ClientData, Examples, Task, Training
from fedml_core.errors import CheckpointError, ConfigError, PrivacyError, RunError, TaskError
from fedml_core.policy_tables import BudgetTable
from fedml_core.privacy.accounting import epsilon_of
from fedml_core.privacy.terms import epsilon_text
from fedml_core.weighting import Uniform
from server import EvaluationPlan, EveryClient, FixedSampling, PoissonSampling
from server.report import read_run, write_report
from server.round import RoundReport
from simulations import Auto, Engine, Faults, Fused, Processes, Ray, Sequential, Suited, Tuned, Vectorised, simulate
from simulations.private_accounts import ACCOUNTS_FILE, Accounts
from simulations.private_clients import PrivateClients
from strategies import CentralDP, FedAvg, SecureAggregation
from tests.simulations.engines.test_ray import needs_ray
from tests.simulations.test_simulate import TASK
from tests.sources import ROOT

PRIVATE = PrivateTraining(noise_multiplier=1.0, clipping=FlatClipping(1.0), sampling_rate=0.2)
TRAINING = Training(batch_size=10)
EVENLY = FedAvg(weighting=Uniform())
ENGINES: list[Engine] = [
    Sequential(),
    Tuned(threads=1, keep_freed_memory=True),
    Vectorised(),
    Processes(workers=2),
    Processes(workers=2, inner=Vectorised()),
    Suited(),
    Auto(workers=1),
]
ABOUT: Any = {"delta": 1e-5, "unit": "example", "adjacency": "add-or-remove-one"}
_named = [f"{engine.name}{'-vectorised' * (n == 4)}" for n, engine in enumerate(ENGINES)]


def run(**changes: Any) -> Any:
    settings: dict[str, Any] = {"clients": 6, "rounds": 3, "training": TRAINING, "private": PRIVATE, **changes}
    strategy, task = settings.pop("strategy", EVENLY), settings.pop("task", TASK)
    return simulate(task, strategy, **settings)


def trainings(folder: Path) -> dict[int, int]:
    connection = sqlite3.connect(folder / ACCOUNTS_FILE)
    try:
        return dict(connection.execute("SELECT client, trainings FROM account"))
    finally:
        connection.close()


def wide() -> nn.Module:
    return nn.Linear(5, 3 * 4000)


def first_three(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs[:, :3], targets, reduction="none")


def few(client: int) -> ClientData:
    return ClientData(Examples.of(torch.ones(12, 5), torch.arange(12) % 3))


NOISY = Task(model=wide, loss=first_three, client_data=few)


def noise_of(engine: Engine) -> Tensor:
    """Return what the model moves by if no example is ever in a batch: noise of four clients, two steps each."""
    history = run(
        task=NOISY,
        clients=4,
        rounds=1,
        training=Training(steps=2, batch_size=5, learning_rate=1.0),
        private=PrivateTraining(noise_multiplier=1.5, clipping=FlatClipping(2.0), sampling_rate=1e-12),
        engine=engine,
        evaluation=EvaluationPlan(every=0, server=False),
    )
    moved: Tensor = history.parameters - torch.cat([p.detach().reshape(-1) for p in NOISY.build(0).parameters()])
    return moved


EXPECTED = 1.5 * 2.0 / 5 * (2 / 4) ** 0.5
# 72,000 draws: their deviation is known to 0.26 %, and this is more than five times that; half the noise, or the same
# for all clients or both steps, is 40 % off or more.
ROUGHLY = 0.015


@pytest.mark.parametrize("engine", ENGINES, ids=_named)
def test_every_engine_adds_each_clients_own_noise(engine: Engine) -> None:
    moved = [noise_of(engine) for _ in range(2)]
    for values in moved:
        assert float(values.std()) == pytest.approx(EXPECTED, rel=ROUGHLY)
    assert abs(float((moved[0] * moved[1]).mean())) < 5 * EXPECTED**2 / 72_000**0.5


@needs_ray
def test_clients_on_a_ray_cluster_add_their_own_noise() -> None:
    assert float(noise_of(Ray(workers=2)).std()) == pytest.approx(EXPECTED, rel=ROUGHLY)


@pytest.mark.parametrize("engine", ENGINES, ids=_named)
def test_every_engine_learns_and_reports_what_the_worst_clients_examples_have_cost(engine: Engine) -> None:
    history = run(engine=engine, rounds=4, training=Training(batch_size=10, learning_rate=0.5))
    assert history.metric("server.accuracy")[-1] > 0.8
    for number, report in enumerate(history.reports, start=1):
        exact = epsilon_of([PRIVATE.event(TRAINING)] * number, **ABOUT)
        assert exact.epsilon * (1 - 1e-6) <= report.epsilon <= exact.epsilon * 1.003
        assert report.privacy == report.example_privacy
        told = {name: report.privacy[name] for name in ("delta", "unit", "adjacency", "sampling")}
        assert told == {**ABOUT, "sampling": "poisson"}
        assert report.protection.startswith("example-level DP (DP-SGD")
        assert RoundReport.from_json(json.loads(json.dumps(report.to_json()))).privacy == report.privacy
    assert history.summary["epsilon"] == history.reports[-1].epsilon
    assert history.summary["example_privacy"] == history.reports[-1].privacy


def test_no_exact_number_of_a_client_is_reported() -> None:
    history = run()
    assert [dict(report.metrics["train"]) for report in history.reports] == [{"examples": 6 * 10 / 0.2}] * 3


@pytest.mark.parametrize(
    "engine", [Fused(), Tuned(threads=1, inner=Fused()), Processes(inner=Fused())], ids=["fused", "tuned", "processes"]
)
def test_an_engine_that_cannot_is_refused_with_those_that_can(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="the fused engine cannot protect examples; use sequential, tuned, vectori"):
        run(engine=engine)


def test_a_deterministic_engine_is_refused_since_noise_is_fresh() -> None:
    with pytest.raises(ConfigError, match="deterministic = true cannot be kept"):
        run(engine=Sequential(deterministic=True))


def test_a_model_that_cannot_be_private_is_refused_before_there_is_a_folder(tmp_path: Path) -> None:
    task = Task.classification(
        model=lambda: nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)),
        classes=3,
        train_data=TASK.train_data,
    )
    with pytest.raises(TaskError, match=r"use torch\.nn\.GroupNorm"):
        run(task=task, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_clients_are_charged_for_being_asked_whatever_becomes_of_their_replies(tmp_path: Path) -> None:
    faults = Faults(drop=0.3, late=0.2, nan=0.2)
    history = run(faults=faults, rounds=4, clients=20, out=tmp_path / "run")
    assert any(report.missing for report in history.reports)
    assert trainings(tmp_path / "run") == dict.fromkeys(range(20), 4)


def test_the_claim_is_that_of_the_client_that_trained_most_often(tmp_path: Path) -> None:
    history = run(sampling=FixedSampling(2), rounds=5, out=tmp_path / "run")
    counted = trainings(tmp_path / "run")
    took_part = [client for report in history.reports for client in report.participants]
    assert counted == {client: took_part.count(client) for client in set(took_part)}
    worst = max(counted.values())
    assert 1 < worst < 5
    exact = epsilon_of([PRIVATE.event(TRAINING)] * worst, **ABOUT)
    assert history.reports[-1].epsilon == pytest.approx(exact.epsilon, rel=0.003)


def test_a_round_that_fails_is_charged_and_charged_again_when_it_is_done_again(tmp_path: Path) -> None:
    broken = [True]

    def load(client: int) -> ClientData:
        if client == 3 and broken[0]:
            raise RuntimeError("the disk is gone")
        return few(client)

    def task() -> Task:
        return Task(model=lambda: nn.Linear(5, 3), loss=first_three, client_data=load)

    broken[0] = False
    never = EvaluationPlan(every=0, server=False)
    run(task=task(), clients=4, rounds=1, out=tmp_path / "run", evaluation=never)
    broken[0] = True
    with pytest.raises(TaskError, match="client 3"):
        run(task=task(), clients=4, rounds=2, out=tmp_path / "run", resume=True, evaluation=never)
    assert trainings(tmp_path / "run") == dict.fromkeys(range(4), 2)
    broken[0] = False
    history = run(task=task(), clients=4, rounds=2, out=tmp_path / "run", resume=True, evaluation=never)
    assert trainings(tmp_path / "run") == dict.fromkeys(range(4), 3)
    assert [report.round for report in history.reports] == [1, 2]
    exact = epsilon_of([PRIVATE.event(TRAINING)] * 3, **ABOUT)
    assert history.reports[-1].epsilon == pytest.approx(exact.epsilon, rel=0.003)


def test_a_process_that_is_killed_while_clients_train_has_charged_them(tmp_path: Path) -> None:
    script = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.simulations import test_private_clients as cases
def load(client):
    if client == 2:
        os.kill(os.getpid(), 9)
    return cases.few(client)
task = cases.Task(model=cases.wide, loss=cases.first_three, client_data=load)
cases.run(task=task, clients=4, rounds=1, out=Path({str(tmp_path)!r}), engine=cases.Sequential())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, timeout=120)
    assert done.returncode == -9, done.stderr.decode()
    assert trainings(tmp_path) == dict.fromkeys(range(4), 1)
    # The charge is not forgotten by beginning anew, but on demand.
    with pytest.raises(ConfigError, match="holds a run; go on with --resume, replace it with --overwrite"):
        run(task=NOISY, clients=4, rounds=1, out=tmp_path)
    run(task=NOISY, clients=4, rounds=1, out=tmp_path, resume=True)
    assert trainings(tmp_path) == dict.fromkeys(range(4), 2)


def test_clients_of_a_worker_that_died_are_charged_for_training_again(tmp_path: Path) -> None:
    died = tmp_path / "died"

    def load(client: int) -> ClientData:
        if client == 3 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return few(client)

    task = Task(model=lambda: nn.Linear(5, 3), loss=first_three, client_data=load)
    never = EvaluationPlan(every=0, server=False)
    history = run(task=task, clients=8, rounds=1, out=tmp_path / "run", evaluation=never, engine=Processes(workers=2))
    assert died.exists() and history.reports[0].replies == 8
    counted = trainings(tmp_path / "run")
    assert set(counted) == set(range(8)) and set(counted.values()) == {1, 2} and counted[3] == 2
    exact = epsilon_of([PRIVATE.event(TRAINING)] * 2, **ABOUT)
    assert history.reports[0].epsilon == pytest.approx(exact.epsilon, rel=0.003)


def test_the_budget_refuses_the_next_round_before_it_runs_and_charges_nobody(tmp_path: Path) -> None:
    costs = [epsilon_of([PRIVATE.event(TRAINING)] * number, **ABOUT).epsilon for number in (1, 2, 3)]
    budget = BudgetTable(epsilon=(costs[1] + costs[2]) / 2, delta=1e-5)
    with pytest.raises(
        RunError, match=r"round 3 is not begun, by the clients' own budget: .* of the epsilon .* is spent"
    ):
        run(rounds=5, out=tmp_path / "run", budget=budget)
    recorded = read_run(tmp_path / "run")
    assert [report.round for report in recorded.reports] == [1, 2]
    assert trainings(tmp_path / "run") == dict.fromkeys(range(6), 2)
    with pytest.raises(RunError, match="round 1 is not begun, by the clients' own budget: .* of the epsilon_per_round"):
        run(budget=BudgetTable(epsilon_per_round=costs[0] / 2, delta=1e-5))


def test_a_client_that_has_spent_its_budget_stops_no_round_without_it(tmp_path: Path) -> None:
    clients = PrivateClients.of(PRIVATE, TRAINING)
    cost = epsilon_of([clients.event] * 2, **ABOUT).epsilon
    accounts = Accounts(clients, BudgetTable(epsilon=cost * 1.01, delta=1e-5), folder=tmp_path, run="a")
    accounts.charge([0, 1], 1)
    accounts.charge([0, 2], 2)
    with pytest.raises(RunError, match="round 3"):
        accounts.charge([3, 0], 3)
    accounts.charge([1, 2, 3], 3)
    assert accounts.trainings() == {0: 2, 1: 2, 2: 2, 3: 1}
    accounts.close()


def test_a_budget_of_another_unit_is_refused() -> None:
    with pytest.raises(ConfigError, match="the budget counts the unit client, and this run protects example; name"):
        run(budget=BudgetTable(epsilon=3.0, unit="client"))
    with pytest.raises(ConfigError, match="the budget counts the unit example, and this run protects nothing"):
        run(budget=BudgetTable(epsilon=3.0), private=None)


def test_a_budget_for_clients_refuses_the_round_that_would_exceed_it_over_restarts_too(tmp_path: Path) -> None:
    strategy = CentralDP(EVENLY, 2.0, 1.0, 6.0, 1e-5)
    once = {"name": "gaussian", "noise_multiplier": 1.0}
    costs = [
        epsilon_of([once] * number, delta=1e-5, unit="client", adjacency="add-or-remove-one").epsilon
        for number in (2, 3)
    ]
    settings: dict[str, Any] = {
        "strategy": strategy,
        "private": None,
        "out": tmp_path / "run",
        "budget": BudgetTable(epsilon=sum(costs) / 2, delta=1e-5, unit="client"),
    }
    run(rounds=1, **settings)
    with pytest.raises(RunError, match=r"round 3 is not begun, by the run's own budget: .* unit client"):
        run(rounds=5, resume=True, **settings)
    recorded = read_run(tmp_path / "run")
    assert [report.round for report in recorded.reports] == [1, 2]


def test_both_claims_are_shown_where_clients_are_protected_too(tmp_path: Path) -> None:
    strategy = CentralDP(EVENLY, 2.0, 0.5, 3.0, 1e-6)
    history = run(strategy=strategy, sampling=PoissonSampling(0.5), out=tmp_path / "run")
    last = history.reports[-1]
    assert last.epsilon == last.privacy["epsilon"] and last.privacy["unit"] == "client"
    assert last.example_privacy["unit"] == "example" and last.example_privacy["delta"] == 1e-5
    assert last.protection.startswith("central DP (client level") and " + example-level DP (DP-SGD" in last.protection
    text = write_report(read_run(tmp_path / "run"), plots=False).read_text()
    row = next(line for line in text.splitlines() if line.startswith("| privacy |"))
    assert f"epsilon {epsilon_text(last.epsilon)} so far at delta 1e-06 (unit client" in row
    assert f"and epsilon {epsilon_text(last.example_privacy['epsilon'])} so far at delta 1e-05 (unit example" in row
    assert "of the client that trained most often" in row


def test_secure_sums_of_clients_that_protect_their_examples_add_up_no_metric() -> None:
    strategy = SecureAggregation(EVENLY, clip=8.0)
    history = run(strategy=strategy, rounds=2, training=Training(batch_size=10, learning_rate=0.5))
    assert [dict(report.metrics["train"]) for report in history.reports] == [{"examples": 300.0}] * 2
    assert history.metric("server.accuracy")[-1] > 0.6
    assert " + example-level DP" in history.reports[-1].protection
    assert history.reports[-1].example_privacy["epsilon"] > 0


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"private": None}, "now they would not"),
        ({"private": PrivateTraining(2.0, FlatClipping(1.0), 0.2)}, r"another \[clients\.examples\]"),
        ({"private": PrivateTraining(1.0, AdaptiveClipping(1.0), 0.2)}, r"another \[clients\.examples\]"),
    ],
)
def test_a_run_is_resumed_under_its_own_protection_only(tmp_path: Path, changes: Any, why: str) -> None:
    run(rounds=1, out=tmp_path / "run")
    with pytest.raises(CheckpointError, match=why):
        run(rounds=2, out=tmp_path / "run", resume=True, **changes)
    assert trainings(tmp_path / "run") == dict.fromkeys(range(6), 1)


def test_a_run_whose_accounts_are_gone_or_damaged_is_not_resumed(tmp_path: Path) -> None:
    run(rounds=1, out=tmp_path / "run")
    kept = (tmp_path / "run" / ACCOUNTS_FILE).read_bytes()
    (tmp_path / "run" / ACCOUNTS_FILE).unlink()
    with pytest.raises(CheckpointError, match="it says what this run's clients have spent"):
        run(rounds=2, out=tmp_path / "run", resume=True)
    (tmp_path / "run" / ACCOUNTS_FILE).touch()
    with pytest.raises(CheckpointError, match="is empty, and it should say what this run's clients have spent"):
        run(rounds=2, out=tmp_path / "run", resume=True)
    (tmp_path / "run" / ACCOUNTS_FILE).write_bytes(b"no database" + kept[11:])
    with pytest.raises(CheckpointError, match="cannot be used"):
        run(rounds=2, out=tmp_path / "run", resume=True)
    (tmp_path / "run" / ACCOUNTS_FILE).write_bytes(kept)
    run(rounds=3, out=tmp_path / "run", resume=True)
    (tmp_path / "run" / ACCOUNTS_FILE).write_bytes(kept)
    with pytest.raises(CheckpointError, match=r"accounts for epsilon \d+\.\d\d, and \d+\.\d\d was reported already"):
        run(rounds=4, out=tmp_path / "run", resume=True)


def test_a_run_that_began_without_protection_is_not_resumed_with_it(tmp_path: Path) -> None:
    run(rounds=1, out=tmp_path / "run", private=None)
    with pytest.raises(CheckpointError, match="does not exist"):
        run(rounds=2, out=tmp_path / "run", resume=True)


def test_a_run_that_replaces_another_begins_with_accounts_of_its_own(tmp_path: Path) -> None:
    run(rounds=2, out=tmp_path / "run")
    run(rounds=1, out=tmp_path / "run", overwrite=True)
    assert trainings(tmp_path / "run") == dict.fromkeys(range(6), 1)
    run(rounds=1, out=tmp_path / "run", overwrite=True, private=None)
    assert not (tmp_path / "run" / ACCOUNTS_FILE).exists()


def test_a_hundred_thousand_accounts_are_a_small_file(tmp_path: Path) -> None:
    accounts = Accounts(PrivateClients.of(PRIVATE, TRAINING), BudgetTable(), folder=tmp_path, run="a")
    accounts.charge(range(100_000), 1)
    accounts.charge(range(0, 100_000, 2), 2)
    assert accounts.worst == 2 and len(accounts.trainings()) == 100_000
    accounts.close()
    assert (tmp_path / ACCOUNTS_FILE).stat().st_size < 2_000_000


def test_a_training_that_accounts_were_not_charged_for_is_refused() -> None:
    clients = PrivateClients.of(PRIVATE, TRAINING)
    trainer = clients.trainer(TASK, 0, device="cpu")
    data = few(0).train
    assert isinstance(data, Examples)
    with pytest.raises(PrivacyError, match="train as the run's plan says"):
        trainer.train(trainer.initial(), data, Training(epochs=2), round_number=1, key=(0, "client", 1, 0))


def test_sampling_many_or_none_is_charged_as_it_comes(tmp_path: Path) -> None:
    accounts = Accounts(PrivateClients.of(PRIVATE, TRAINING), BudgetTable(), folder=tmp_path, run="a")
    nobody: Sequence[int] = []
    accounts.charge(nobody, 1)
    assert (accounts.worst, accounts.claim().epsilon) == (0, 0.0)
    accounts.charge(EveryClient().cohort(range(3), 1, 0), 1)
    assert accounts.trainings() == {0: 1, 1: 1, 2: 1}
    accounts.close()

"""The server's own books: a round is in them before anybody is asked, and the budget ends a run in time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedml_core.config import RunConfig, load_run
from fedml_core.errors import RunError
from fedml_core.model import ModelSpec
from fedml_core.privacy.accounting import epsilon_of
from fedml_core.privacy.ledger import Account, Ledger
from fedml_core.weighting import Uniform
from server.checkpoint import RunState
from server.coordinator import Coordinator
from server.ledger import RoundBooks, ledger_path, round_books
from server.plan import EvaluationPlan, Plan
from server.sampling import EveryClient, PoissonSampling
from strategies import FedAvg
from strategies.private import CentralDP, LocalDP
from tests.doubles import PullChannel

SIZE, COUNT = 3, 8
SPEC = ModelSpec.of_size(SIZE)
CLIENTS = Account("clients", "client", "add-or-remove-one")


def plan_of(rate: float | None = None) -> Plan:
    strategy = CentralDP(
        FedAvg(weighting=Uniform()), clip_norm=1.0, noise_multiplier=2.0, expected_cohort=4.0, delta=1e-5
    )
    sampling = EveryClient() if rate is None else PoissonSampling(rate)
    return Plan(strategy=strategy, evaluation=EvaluationPlan(every=0), sampling=sampling)


def config_of(folder: Path, text: str = "") -> RunConfig:
    (folder / "run.toml").write_text(f'task = "task.py"\n{text}\n')
    return load_run(folder)


def coordinator(plan: Plan, state: RunState, books: RoundBooks | None) -> Coordinator:
    return Coordinator(plan, SPEC, state, reserve=books)


def begun(plan: Plan) -> RunState:
    return Coordinator.begin(plan, SPEC, torch.zeros(SIZE), "run-1")


def test_each_round_is_written_down_with_its_sampling_and_costs_what_the_report_says(tmp_path: Path) -> None:
    plan, config = plan_of(0.5), config_of(tmp_path)
    state = begun(plan)
    run = coordinator(plan, state, round_books(config, tmp_path / "out", plan, state))
    reports = list(run.rounds(PullChannel(COUNT, SIZE), 3))
    ledger = Ledger(tmp_path / "out" / "ledger.sqlite")
    event = {
        "name": "poisson",
        "sampling_probability": 0.5,
        "event": {"name": "composed", "events": [{"name": "gaussian", "noise_multiplier": 2.0}]},
    }
    assert [(entry.round, entry.run, entry.event) for entry in ledger.entries()] == [
        (number, "run-1", event) for number in (1, 2, 3)
    ]
    expected = epsilon_of([event] * 3, delta=1e-5, unit="client", adjacency="add-or-remove-one")
    assert ledger.spent(CLIENTS, 1e-5).epsilon == expected.epsilon
    assert reports[-1].epsilon == pytest.approx(expected.epsilon, rel=2e-3)


def test_a_round_is_in_the_ledger_before_anybody_is_asked_and_again_if_it_is_begun_again(tmp_path: Path) -> None:
    # "a round is in the ledger before its cohort is drawn, and stays there if the round is void, or the server dies and
    # begins it again; a resumed run's epsilon counts it, too."
    plan, config = plan_of(), config_of(tmp_path)
    state = begun(plan)
    ledger, seen = Ledger(tmp_path / "ledger.sqlite"), list[int]()

    class Dying(PullChannel):
        def exchange(self, *values: Any, **named: Any) -> Any:
            seen.append(len(ledger.entries()))
            raise KeyboardInterrupt

    for _ in range(2):
        books = round_books(config, tmp_path, plan, state)
        with pytest.raises(KeyboardInterrupt):
            list(coordinator(plan, state, books).rounds(Dying(COUNT, SIZE), 5))
    assert seen == [1, 2]
    assert [entry.round for entry in ledger.entries()] == [1, 1]


def test_a_resumed_run_says_no_less_than_its_ledger(tmp_path: Path) -> None:
    plan, config = plan_of(), config_of(tmp_path)
    state = begun(plan)

    class Dying(PullChannel):
        def exchange(self, assignment: Any, *values: Any, **named: Any) -> Any:
            if assignment.round == 3:
                raise KeyboardInterrupt
            return super().exchange(assignment, *values, **named)

    run = coordinator(plan, state, round_books(config, tmp_path, plan, state))
    rounds = run.rounds(Dying(COUNT, SIZE), 5)
    next(rounds), next(rounds)
    saved = run.state  # as the checkpoint after round 2 has it
    for _ in range(3):  # each process that takes it up is killed in round 3
        books = round_books(config, tmp_path, plan, saved)
        assert books is not None
        again = coordinator(plan, books.resumed(saved), books)
        with pytest.raises(KeyboardInterrupt):
            next(again.rounds(Dying(COUNT, SIZE), 5))
    ledger = Ledger(tmp_path / "ledger.sqlite")
    assert [entry.round for entry in ledger.entries()] == [1, 2, 3, 3, 3]
    books = round_books(config, tmp_path, plan, saved)
    assert books is not None
    report = next(coordinator(plan, books.resumed(saved), books).rounds(PullChannel(COUNT, SIZE), 5))
    spent = ledger.spent(CLIENTS, 1e-5, run="run-1").epsilon
    assert report.epsilon is not None and report.epsilon >= spent * (1 - 1e-9)
    assert report.epsilon == pytest.approx(spent, rel=2e-3) and len(ledger.entries()) == 6


def test_a_checkpoint_that_knows_more_than_a_ledger_keeps_what_it_knows(tmp_path: Path) -> None:
    plan, state = plan_of(), begun(plan_of())
    run = coordinator(plan, state, None)
    next(run.rounds(PullChannel(COUNT, SIZE), 2))
    books = round_books(config_of(tmp_path), tmp_path, plan, run.state)
    assert books is not None and books.resumed(run.state) is run.state
    assert run.state.events[0]["count"] == 1


def test_a_budget_ends_the_run_before_the_round_that_would_exceed_it(tmp_path: Path) -> None:
    # "a round that would exceed the budget is not begun; the run ends with the numbers."
    plan, config = plan_of(), config_of(tmp_path, "[budget]\nepsilon = 4.0\n[ledger]\npath = 'books/all.sqlite'")
    state = begun(plan)
    channel = PullChannel(COUNT, SIZE)
    done = []
    with pytest.raises(RunError, match=r"round 4 is not begun, by the run's own budget: 3\.\d+ of the epsilon 4 is sp"):
        for report in coordinator(plan, state, round_books(config, tmp_path / "out", plan, state)).rounds(channel, 9):
            done.append(report.round)
    assert (done, len(channel.asked)) == ([1, 2, 3], 3)
    assert ledger_path(config, tmp_path / "out") == tmp_path / "books" / "all.sqlite"
    another = begun(plan)
    books = round_books(config, tmp_path / "out", plan, another)
    with pytest.raises(RunError, match="round 1 is not begun"):
        list(coordinator(plan, another, books).rounds(channel, 9))


def test_a_run_that_claims_no_privacy_has_no_books(tmp_path: Path) -> None:
    plan = Plan(strategy=FedAvg())
    state = RunState("run", SPEC.fingerprint, torch.zeros(SIZE), {})
    assert round_books(config_of(tmp_path), tmp_path, plan, state) is None


def test_clients_are_told_what_noise_the_server_promises_and_of_nothing_that_is_their_own(tmp_path: Path) -> None:
    class Listening(PullChannel):
        def exchange(self, assignment: Any, *values: Any, **named: Any) -> Any:
            told.append(assignment.work.promised)
            return super().exchange(assignment, *values, **named)

    told: list[Any] = []
    plan = plan_of()
    list(coordinator(plan, begun(plan), None).rounds(Listening(COUNT, SIZE), 1))
    assert told == [{"name": "composed", "events": [{"name": "gaussian", "noise_multiplier": 2.0}]}]
    told.clear()
    local = LocalDP(FedAvg(weighting=Uniform()), clip_norm=1.0, epsilon=4.0, delta=1e-5)
    for strategy in (local, FedAvg()):
        quiet = Plan(strategy=strategy, evaluation=EvaluationPlan(every=0))
        list(coordinator(quiet, begun(quiet), None).rounds(Listening(COUNT, SIZE), 1))
    assert told == [None, None]

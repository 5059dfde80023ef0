"""The books in the audit: every round counted, nothing printed below its cost, a ledger that says the same."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fedml_core.config import RunConfig, load_run
from fedml_core.model import ModelSpec
from fedml_core.policy_tables import RunBudgetTable
from fedml_core.privacy.correlated import TreeNoise
from fedml_core.privacy.ledger import Account, Ledger, Purpose
from fedml_core.weighting import Uniform
from server.coordinator import Coordinator
from server.history import RunFolder
from server.ledger import round_books
from server.plan import EvaluationPlan, Plan
from server.record import record_rounds
from server.round import RoundReport
from server.sampling import EveryClient, MinimumSeparation, PoissonSampling, Sampling
from simulations.audit.books import Record, check_books, check_ledger
from simulations.audit.findings import Finding, Verdict
from strategies import CentralDP, FedAvg
from tests.doubles import PullChannel

SIZE, COUNT, ROUNDS = 3, 8, 4
SPEC = ModelSpec.of_size(SIZE)
Event = Mapping[str, Any]


def strategy(noise: TreeNoise | None = None, multiplier: float = 2.0) -> CentralDP:
    inner = FedAvg(weighting=Uniform())
    return CentralDP(inner, clip_norm=1.0, noise_multiplier=multiplier, expected_cohort=4.0, delta=1e-5, noise=noise)


def config_of(folder: Path) -> RunConfig:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.toml").write_text(f'task = "task.py"\nout = "{folder / "out"}"\n')
    return load_run(folder)


def recorded(
    folder: Path, private: CentralDP | None = None, sampling: Sampling | None = None
) -> tuple[Record, list[RoundReport], Coordinator]:
    """Do a run that keeps a ledger and a history, as a server's does."""
    config = config_of(folder)
    plan = Plan(
        strategy=private or strategy(), evaluation=EvaluationPlan(every=0), sampling=sampling or PoissonSampling(0.5)
    )
    out = RunFolder(folder / "out", plan)
    state = out.begin(
        lambda: Coordinator.begin(plan, SPEC, torch.zeros(SIZE), "run-1"), SPEC, resume=False, overwrite=False
    )
    run = Coordinator(plan, SPEC, state, reserve=round_books(config, folder / "out", plan, state))
    reports = record_rounds(run, PullChannel(COUNT, SIZE), ROUNDS, folder=out)
    return Record.of(config), reports, run


def judged(
    reports: list[RoundReport], events: Any, private: CentralDP | None = None, sampling: Sampling | None = None
) -> Finding:
    return check_books(private or strategy(), sampling or PoissonSampling(0.5), COUNT, reports, events)


def test_a_run_that_counts_every_round_passes(tmp_path: Path) -> None:
    record, reports, run = recorded(tmp_path)
    found = judged(reports, run.state.events)
    assert found.verdict is Verdict.PASS, found.said
    assert found.numbers["printed"] == pytest.approx(found.numbers["owed"], rel=2e-3)
    ledger = check_ledger(record)
    assert ledger.verdict is Verdict.PASS, ledger.said
    assert ledger.numbers["entries"] == ledger.numbers["rounds"] == ROUNDS
    assert ledger.numbers["spent"] == pytest.approx(found.numbers["printed"], rel=2e-3)


def test_noise_for_a_whole_run_is_one_entry(tmp_path: Path) -> None:
    tree, apart = strategy(TreeNoise(rounds=ROUNDS, restart_every=2)), MinimumSeparation(2)
    record, reports, run = recorded(tmp_path, tree, apart)
    assert judged(reports, run.state.events, tree, apart).verdict is Verdict.PASS
    found = check_ledger(record)
    assert found.verdict is Verdict.PASS, found.said
    assert found.numbers["entries"] == 1


def test_an_accountant_that_is_made_anew_in_each_round_fails(tmp_path: Path) -> None:
    _, reports, run = recorded(tmp_path)
    forgetful = [dataclasses.replace(report, privacy=reports[0].privacy) for report in reports]
    found = judged(forgetful, run.state.events)
    assert found.verdict is Verdict.FAIL
    assert "its rounds cost" in found.said
    one = [{**dict(run.state.events[0]), "count": 1}]
    assert "not all of them were counted" in judged(reports, one).said
    assert judged(reports, []).verdict is Verdict.FAIL


def test_events_of_less_noise_or_of_a_rarer_sample_than_the_run_s_fail(tmp_path: Path) -> None:
    _, reports, run = recorded(tmp_path)
    assert judged(reports, run.state.events, strategy(multiplier=1.0)).verdict is Verdict.FAIL
    assert judged(reports, run.state.events, sampling=EveryClient()).verdict is Verdict.FAIL


def test_an_epsilon_that_falls_or_is_not_printed_fails(tmp_path: Path) -> None:
    _, reports, run = recorded(tmp_path)
    exchanged = [reports[1], reports[0], *reports[2:]]
    assert "fell from round 1 to round 2" in judged(exchanged, run.state.events).said
    silent = [dataclasses.replace(reports[0], privacy=None), *reports[1:]]
    assert judged(silent, run.state.events).verdict is Verdict.FAIL


def test_nothing_is_counted_where_nothing_is_claimed() -> None:
    assert check_books(FedAvg(), EveryClient(), COUNT, [], []).verdict is Verdict.INFO


def refunded(record: Record, keep: int, event: Event | None = None) -> None:
    """Replace the ledger and its head by new ones with some of the entries, all in order."""
    entries = Ledger(record.ledger).entries()
    for path in (record.ledger, record.ledger.with_name(f"{record.ledger.name}.head")):
        path.unlink()
    anew = Ledger(record.ledger)
    for entry in entries[:keep]:
        account = Account(entry.dataset, entry.unit, entry.adjacency)
        anew.reserve(event or entry.event, account, Purpose(entry.run, "", entry.round, entry.protection))


def test_a_ledger_that_was_rebuilt_with_fewer_rounds_fails(tmp_path: Path) -> None:
    record, _, _ = recorded(tmp_path)
    refunded(record, keep=3)
    Ledger(record.ledger).verify()  # its chain holds
    found = check_ledger(record)
    assert found.verdict is Verdict.FAIL
    assert f"it lacks round {ROUNDS} of the recorded run" in found.said


def test_a_ledger_that_was_rebuilt_with_cheaper_rounds_fails(tmp_path: Path) -> None:
    record, _, _ = recorded(tmp_path)
    cheap = {"name": "poisson", "sampling_probability": 0.5, "event": {"name": "gaussian", "noise_multiplier": 9.0}}
    refunded(record, keep=ROUNDS, event=cheap)
    found = check_ledger(record)
    assert found.verdict is Verdict.FAIL
    assert "and the run printed" in found.said


def test_a_ledger_of_another_run_fails(tmp_path: Path) -> None:
    record, _, _ = recorded(tmp_path / "one")
    for path in record.folder.glob("ledger.sqlite*"):
        path.unlink()
    Ledger(record.ledger).reserve(
        {"name": "gaussian", "noise_multiplier": 1.0},
        Account("clients", "client", "add-or-remove-one"),
        Purpose("run-2", "", 1),
    )
    assert "lacks round 1" in check_ledger(record).said


def test_a_ledger_put_back_to_an_older_copy_fails_by_its_head(tmp_path: Path) -> None:
    record, _, _ = recorded(tmp_path)
    early = tmp_path / "early.sqlite"
    ledger = Ledger(early)
    ledger.reserve(
        {"name": "gaussian", "noise_multiplier": 2.0},
        Account("clients", "client", "add-or-remove-one"),
        Purpose("run-1", "", 1),
    )
    shutil.copy(early, record.ledger)
    found = check_ledger(record)
    assert found.verdict is Verdict.FAIL
    assert "cannot be believed" in found.said
    record.ledger.unlink()
    assert "was removed" in check_ledger(record).said


def test_a_ledger_beyond_the_run_s_own_budget_fails(tmp_path: Path) -> None:
    record, reports, _ = recorded(tmp_path)
    spent = float(reports[-1].epsilon or 0)
    within, beyond = (RunBudgetTable(epsilon_per_run=spent * share, delta=1e-5) for share in (1.1, 0.9))
    assert check_ledger(dataclasses.replace(record, budget=within)).verdict is Verdict.PASS
    found = check_ledger(dataclasses.replace(record, budget=beyond))
    assert found.verdict is Verdict.FAIL
    assert "the budget allows" in found.said


def test_rounds_that_were_begun_again_are_told(tmp_path: Path) -> None:
    record, _, _ = recorded(tmp_path)
    entry = Ledger(record.ledger).entries()[-1]
    account = Account(entry.dataset, entry.unit, entry.adjacency)
    Ledger(record.ledger).reserve(entry.event, account, Purpose(entry.run, "", entry.round))
    found = check_ledger(record)
    assert found.verdict is Verdict.WARN
    assert "count again" in found.said


def test_a_ledger_without_a_recorded_run_is_verified_alone(tmp_path: Path) -> None:
    record = Record.of(config_of(tmp_path))
    assert check_ledger(record).verdict is Verdict.INFO
    Ledger(record.ledger).reserve(
        {"name": "gaussian", "noise_multiplier": 1.0}, Account("clients", "client", "replace-one"), Purpose("r", "", 1)
    )
    found = check_ledger(record)
    assert found.verdict is Verdict.PASS
    assert "no recorded run" in found.said

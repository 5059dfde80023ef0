"""The table of accuracy against epsilon in docs/privacy.md is what its benchmark runs; nothing long is run again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import pytest

from benchmarks.accuracy_against_epsilon import ROWS, Row, markdown, prepared, rows
from fedml_core.privacy.accounting import epsilon_of
from tests.sources import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "2026-11-21-privacy-two-cores.jsonl"


def recorded() -> list[Mapping[str, Any]]:
    """Return the rows of the last run of the benchmark that was written down."""
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    found: list[Mapping[str, Any]] = [line for line in lines if line.get("benchmark") == "accuracy_against_epsilon"]
    return list(found[-1]["rows"])


def epsilon(row: Row) -> float:
    """Return what the row's whole run costs one unit, by its objects' own events."""
    run = prepared(row, 0, private=True)
    if run.private is not None:
        event, count = run.private.event(run.training), run.rounds
        return epsilon_of(
            [{"name": "repeated", "count": count, "event": event}],
            delta=run.budget.delta,
            unit="example",
            adjacency="add-or-remove-one",
        ).epsilon
    terms, event_of_round = run.strategy.privacy(), run.strategy.pipeline().event()
    assert terms is not None and event_of_round is not None
    event = run.sampling.event(len(run.population), event_of_round) if terms.secret_cohort else event_of_round
    spent = [{"name": "repeated", "count": run.rounds if terms.rounds is None else 1, "event": event}]
    adjacency = terms.adjacency or run.sampling.adjacency
    return epsilon_of(spent, delta=terms.delta, unit=terms.unit, adjacency=adjacency).epsilon


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.file} {row.epsilon:g} {len(row.settings)}")
def test_a_row_costs_the_epsilon_that_it_names_and_hardly_less(row: Row) -> None:
    assert 0.995 * row.epsilon < epsilon(row) <= row.epsilon


def test_the_table_in_the_docs_is_the_last_that_was_written_down() -> None:
    assert markdown(recorded()) in (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")


def test_what_was_written_down_are_the_rows_that_would_be_run_now() -> None:
    found = recorded()
    assert [{name: row[name] for name in ("name", "file", "epsilon", "settings")} for row in found] == [
        {**dataclasses.asdict(row), "settings": list(row.settings)} for row in ROWS
    ]
    for row in found:
        assert 0.99 * row["epsilon"] < row["privacy"]["epsilon"] <= row["epsilon"]
        assert len(row["accuracy"]) == len(row["without"]) >= 3


def test_the_rows_cover_client_and_example_level_with_a_trusted_server_and_without() -> None:
    assert {(row["file"], row["privacy"]["unit"], row["epsilon"]) for row in recorded()} >= {
        *(("private.toml", "client", epsilon) for epsilon in (4, 8)),
        *(("distributed.toml", "client", epsilon) for epsilon in (4, 8)),
        *(("hospitals.toml", "example", epsilon) for epsilon in (1, 4, 8)),
        ("correlated.toml", "client", 8),
    }


@pytest.mark.parametrize("row", [ROWS[0], ROWS[4], ROWS[7]], ids=lambda row: str(row.file))
def test_a_twin_is_the_same_run_without_clipping_and_noise(row: Row) -> None:
    run, twin = prepared(row, 3, private=True), prepared(row, 3, private=False)
    assert run.private is not None or run.strategy.privacy() is not None
    assert twin.private is None and twin.strategy.privacy() is None
    assert twin.strategy.protection() == "none"
    for name in ("clients", "rounds", "sampling", "partition", "seed", "evaluation"):
        assert getattr(run, name) == getattr(twin, name)
    assert run.seed == 3


def test_a_row_has_the_accuracies_and_the_epsilon_of_its_runs() -> None:
    short = Row("short", "private.toml", 8, ("rounds=8", "clients.count=200", "strategy.expected_cohort=40"))
    (found,) = rows([short], [0, 1])
    assert found["privacy"]["epsilon"] < 3 and found["privacy"]["unit"] == "client"
    assert len(found["accuracy"]) == len(found["without"]) == 2
    assert min(found["without"]) > 0.8
    assert markdown([found]).splitlines()[2].startswith("| short | client | 2.")

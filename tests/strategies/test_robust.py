from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedml_core.errors import ConfigError, StrategyError
from strategies import FedMedian, FedTrimmedMean, Krum, MultiKrum, Strategy
from tests.strategies.flower_cases import Reply, assert_same, ours, prepared, theirs

from flwr.serverapp import strategy as flower  # isort: skip

ROUNDS = prepared(rounds=5, clients=7)


def counting_alike(rounds: list[list[Reply]]) -> list[list[Reply]]:
    return [[(vector, 10) for vector, _ in replies] for replies in rounds]


def step(strategy: Strategy, deltas: list[list[float]]) -> list[float]:
    stepped, _ = strategy.aggregate(np.zeros(len(deltas[0])), [(np.array(delta), 1) for delta in deltas])
    return [float(x) for x in stepped]


@pytest.mark.parametrize("clients", [6, 7], ids=["even", "odd"])
def test_five_rounds_of_the_median_equal_flowers(clients: int) -> None:
    rounds = prepared(rounds=5, clients=clients)
    assert_same(ours(FedMedian(), rounds), theirs(flower.FedMedian(), rounds))


@pytest.mark.parametrize("beta", [0.0, 0.2, 0.3, 0.49])
def test_five_rounds_of_the_trimmed_mean_equal_flowers(beta: float) -> None:
    assert_same(ours(FedTrimmedMean(beta=beta), ROUNDS), theirs(flower.FedTrimmedAvg(beta=beta), ROUNDS))


@pytest.mark.parametrize("malicious", [0, 2])
def test_five_rounds_of_krum_equal_flowers(malicious: int) -> None:
    assert_same(ours(Krum(malicious=malicious), ROUNDS), theirs(flower.Krum(num_malicious_nodes=malicious), ROUNDS))


def test_five_rounds_of_multi_krum_equal_flowers_where_clients_count_alike() -> None:
    rounds = counting_alike(ROUNDS)
    other = flower.MultiKrum(num_malicious_nodes=2, num_nodes_to_select=4)
    assert_same(ours(MultiKrum(malicious=2, selected=4), rounds), theirs(other, rounds))


def test_claiming_many_examples_changes_nothing() -> None:
    for strategy in (FedMedian(), FedTrimmedMean(), Krum(), MultiKrum(selected=3)):
        assert_same(ours(strategy, ROUNDS), ours(strategy, counting_alike(ROUNDS)))


def test_the_median_is_exact_for_odd_and_even_cohorts() -> None:
    assert step(FedMedian(), [[1.0, -9.0], [100.0, 0.0], [3.0, 1.0]]) == [3.0, 0.0]
    assert step(FedMedian(), [[1.0], [100.0], [3.0], [2.0]]) == [2.5]
    assert step(FedMedian(), [[7.0]]) == [7.0]


def test_the_trimmed_mean_is_exact_and_cuts_nothing_from_a_small_cohort() -> None:
    assert step(FedTrimmedMean(beta=0.2), [[1.0], [2.0], [3.0], [6.0], [1000.0]]) == [pytest.approx(11 / 3)]
    assert step(FedTrimmedMean(beta=0.2), [[1.0], [2.0], [6.0]]) == [3.0]


HONEST = [[1.0, 1.0], [1.1, 1.0], [1.0, 1.1], [0.9, 1.0], [1.0, 0.9]]


@pytest.mark.parametrize(
    "strategy",
    [FedMedian(), FedTrimmedMean(beta=0.3), Krum(malicious=2), MultiKrum(malicious=2, selected=3)],
    ids=repr,
)
@pytest.mark.parametrize("attack", [1e3, -1e6, 1e30], ids=repr)
def test_two_liars_of_seven_cannot_leave_the_range_of_the_honest(strategy: Strategy, attack: float) -> None:
    moved = step(strategy, [*HONEST, [attack, attack], [attack, -attack]])
    assert all(0.9 <= value <= 1.1 for value in moved)


def test_a_rule_over_more_columns_than_one_block_is_that_over_each_column() -> None:
    rows = torch.randn(5, 70_000, generator=torch.Generator().manual_seed(1))
    rule = FedMedian().rule()
    np.testing.assert_allclose(rule(rows, torch.ones(5)).numpy(), np.median(rows.numpy(), axis=0), rtol=0, atol=0)
    chosen = Krum(malicious=1).rule()(rows, torch.ones(5))
    distances = ((rows[:, None] - rows[None, :]).double() ** 2).sum(dim=2)
    scores = distances.sort(dim=1).values[:, 1:3].sum(dim=1)
    assert torch.equal(chosen, rows[int(scores.argmin())])


@pytest.mark.parametrize("strategy", [FedMedian(), FedTrimmedMean(), Krum(), MultiKrum(selected=2)], ids=repr)
def test_the_order_of_arrival_decides_nothing_even_between_equal_scores(strategy: Strategy) -> None:
    # At the corners of a square every client has the same neighbours' distances.
    square = [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    outcomes = {tuple(step(strategy, square[turn:] + square[:turn])) for turn in range(4)}
    assert len(outcomes) == 1


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (Krum(malicious=1), r"Krum needs a cohort of at least malicious \+ 3 = 4, got 3; sample more clients"),
        (MultiKrum(selected=4), "selected = 4 of 3 updates would take in malicious ones; at most 3 can be selected"),
    ],
    ids=repr,
)
def test_a_cohort_too_small_for_krum_is_refused(strategy: Strategy, message: str) -> None:
    with pytest.raises(StrategyError, match=message):
        step(strategy, [[1.0], [2.0], [3.0]])


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (FedTrimmedMean, {"beta": 0.5}, "beta must be >= 0 and < 0.5, got 0.5"),
        (Krum, {"malicious": -1}, "malicious must be >= 0, got -1"),
        (MultiKrum, {"selected": 0}, "selected must be >= 1, got 0"),
        (MultiKrum, {"malicious": 1.5}, "malicious must be a whole number, got 1.5"),
        (FedMedian, {"server_learning_rate": -1}, "server_learning_rate must be > 0, got -1"),
    ],
)
def test_a_wrong_argument_is_refused_at_construction(kind: type[Strategy], arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        kind(**arguments)

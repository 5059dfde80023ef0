"""Central differential privacy in stock Flower apps: every round is noised, counted before it begins, and told."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedml_core.errors import ConfigError, FedveilError, RunError, StrategyError
from fedml_core.privacy import AdaptiveClip, TreeNoise
from fedml_core.privacy.accounting import epsilon_of
from fedml_core.privacy.ledger import Account, Budget, Ledger
from fedml_core.weighting import Uniform
from server import EveryClient, FixedSampling, PoissonSampling, PrivateFlowerStrategy, Sampling, SecureFlowerStrategy
from simulations.flower_grid import LocalGrid
from strategies import (
    CentralDP,
    DistributedDP,
    FedAvg,
    FedMedian,
    FlowerStrategy,
    LocalDP,
    SecAggPlus,
    SecureAggregation,
)
from strategies.strategy import Strategy
from tests.strategies.flower_cases import (
    CLIENTS,
    SIZE,
    START,
    honest,
    last_does,
    moved,
    one_round,
    record_of,
    reply_to,
    vector_of,
)
from tests.strategies.test_flower_runs import started

from flwr.app import ConfigRecord, Context, Message  # isort: skip

EVENLY = FedAvg(weighting=Uniform())
CLIENTS_OF = Account("clients", "client", "add-or-remove-one")
# A client moves by up to 4 in each of 15 coordinates; 50 is beyond that.
QUIET = CentralDP(EVENLY, clip_norm=50.0, noise_multiplier=1e-6, expected_cohort=CLIENTS, delta=1e-5)
NOISY = CentralDP(EVENLY, clip_norm=1.0, noise_multiplier=2.0, expected_cohort=CLIENTS, delta=1e-5)


def cost(strategy: Strategy, rounds: int, sampling: Sampling | None = None) -> float:
    event = strategy.pipeline().event()
    assert event is not None
    each = event if sampling is None else sampling.event(CLIENTS, event)
    return epsilon_of([each] * rounds, delta=1e-5, unit="client", adjacency="add-or-remove-one").epsilon


def test_the_model_is_the_noised_mean_over_the_expected_cohort_and_the_metrics_say_what_it_cost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "server.flower_private")
    outcome, metrics = one_round(PrivateFlowerStrategy(NOISY), last_does(lambda message, reply: reply))
    assert metrics is not None
    # Guarantees: "the training metrics of every round hold `epsilon` and `delta`, after all rounds that this object
    # began."
    assert metrics["epsilon"] == pytest.approx(cost(NOISY, 1), rel=2e-3) and metrics["delta"] == 1e-5
    assert metrics["accuracy"] == pytest.approx(0.2)
    # Clipped to length 1 and in one direction, noised by 2 / 4 in each coordinate.
    assert 0.05 < np.std(moved(outcome) - SIZE**-0.5) / 0.5 < 2.0
    assert "round 1: not covered by epsilon: train.accuracy (seen by the server only)" in caplog.text
    assert f"epsilon {cost(NOISY, 1):.2f}"[:-1] in caplog.text and "unit client, add-or-remove-one" in caplog.text


def test_next_to_no_noise_gives_the_plain_mean() -> None:
    outcome, _ = one_round(PrivateFlowerStrategy(QUIET))
    np.testing.assert_allclose(moved(outcome), 2.5, rtol=0, atol=1e-3)


def test_an_update_beyond_the_bound_is_clipped_by_the_server() -> None:
    strategy = CentralDP(EVENLY, 0.1, 1e-6, CLIENTS, 1e-5)
    outcome, _ = one_round(PrivateFlowerStrategy(strategy))
    np.testing.assert_allclose(moved(outcome), 0.1 * SIZE**-0.5, rtol=1e-3)


def test_the_bound_may_follow_the_updates() -> None:
    adaptive = CentralDP(EVENLY, AdaptiveClip(initial=1.0, counter_noise=2.0), 1.0, CLIENTS, 1e-5)
    strategy = PrivateFlowerStrategy(adaptive)
    _, metrics = one_round(strategy)
    assert metrics is not None and metrics["epsilon"] == pytest.approx(cost(adaptive, 1), rel=2e-3)
    assert strategy.state is not None


def test_a_stock_server_app_is_told_the_cost_of_each_round_so_far() -> None:
    strategy = PrivateFlowerStrategy(NOISY, min_nodes=CLIENTS)
    result, models = started(strategy, rounds=3)
    told = [float(result.train_metrics_clientapp[number]["epsilon"]) for number in (1, 2, 3)]  # type: ignore[arg-type]  # it is a number
    assert told == [pytest.approx(cost(NOISY, number), rel=2e-3) for number in (1, 2, 3)]
    assert len(models) == 4 and not np.array_equal(models[1], models[2])
    again, _ = started(strategy, rounds=1)
    assert again.train_metrics_clientapp[1]["epsilon"] == pytest.approx(cost(NOISY, 4), rel=2e-3)


def test_secret_poisson_cohorts_cost_less_and_differ_from_start_to_start() -> None:
    sampling = PoissonSampling(0.5)
    strategy = PrivateFlowerStrategy(NOISY, sampling=sampling)
    nodes, cohorts = list(range(300)), []
    for number in (1, 2, 1, 2):
        cohorts.append(strategy._drawn("train", number, nodes))
    assert len({tuple(cohort) for cohort in cohorts}) == 4
    assert all(100 < len(cohort) < 200 for cohort in cohorts)
    assert strategy.claim is not None and strategy.claim.sampling == "poisson"
    assert strategy.claim.epsilon == pytest.approx(cost(NOISY, 4, sampling), rel=2e-3)
    assert strategy.claim.epsilon < 0.7 * cost(NOISY, 4)
    other = PrivateFlowerStrategy(NOISY, sampling=sampling)
    assert other._drawn("train", 1, nodes) != cohorts[0]


def test_a_cohort_of_a_fixed_size_cannot_be_foretold_from_earlier_ones() -> None:
    # numpy's generator, which `cohort` takes its draws from, can be reckoned on from what it gave; a cipher cannot.
    strategy, nodes = PrivateFlowerStrategy(NOISY, sampling=FixedSampling(20)), list(range(300))
    drawn = [strategy._drawn("train", 1, nodes) for _ in range(2)]
    assert drawn == [FixedSampling(20).hidden_cohort(nodes, number, strategy._secret) for number in (1, 2)]


def test_a_round_in_which_nobody_was_drawn_or_nobody_answered_well_is_noised_and_counted() -> None:
    # Guarantees: "A round without replies is noised and released like any other."
    for case in (PrivateFlowerStrategy(NOISY, sampling=PoissonSampling(1e-9)), PrivateFlowerStrategy(NOISY)):
        outcome, metrics = one_round(case, lambda message, context: reply_to(message, np.full(SIZE, np.nan), 1))
        assert metrics is not None and set(metrics) == {"epsilon", "delta"}
        assert float(np.abs(moved(outcome)).min()) > 0


def test_a_round_is_in_the_ledger_before_anybody_is_asked_and_stays_if_it_fails(tmp_path: Path) -> None:
    # Guarantees: "a round is counted, and in the ledger where one is named, before its cohort is drawn; nothing that
    # goes wrong later takes it back."
    ledger, seen = Ledger(tmp_path / "ledger.sqlite"), list[int]()

    def failing(message: Message, context: Context) -> Message:
        seen.append(len(ledger.entries()))
        raise ValueError("no")

    strategy = PrivateFlowerStrategy(NOISY, ledger=ledger.path)
    one_round(strategy, failing)
    assert seen == [1] * CLIENTS

    class Broken(Sampling):
        def cohort(self, clients: Any, round_number: int, seed: int) -> list[int]:
            raise KeyboardInterrupt

    strategy._sampling = Broken()
    with pytest.raises(KeyboardInterrupt), LocalGrid(honest, clients=CLIENTS) as grid:
        strategy.configure_train(2, record_of(START), ConfigRecord(), grid)
    assert [entry.round for entry in ledger.entries()] == [1, 2]
    assert ledger.spent(CLIENTS_OF, 1e-5).epsilon == pytest.approx(cost(NOISY, 2), rel=2e-3)
    assert strategy.claim is not None and strategy.claim.epsilon == pytest.approx(cost(NOISY, 2), rel=2e-3)


def test_a_budget_refuses_the_next_round_over_runs_and_processes(tmp_path: Path) -> None:
    # Guarantees: "a round that the budget does not allow is not begun; `start` raises RunError with the numbers."
    limit = (cost(NOISY, 2) + cost(NOISY, 3)) / 2
    budget = Budget(epsilon=limit, delta=1e-5, unit="client", adjacency="add-or-remove-one")
    path = tmp_path / "ledger.sqlite"
    started(PrivateFlowerStrategy(NOISY, ledger=path, budget=budget), rounds=1)
    with pytest.raises(FedveilError) as caught, LocalGrid(honest, clients=CLIENTS) as grid:
        PrivateFlowerStrategy(NOISY, ledger=path, budget=budget).start(grid, record_of(START), num_rounds=5)
    assert isinstance(caught.value, RunError) and "round 2 is not begun, by the run's own budget" in str(caught.value)
    entries = Ledger(path).entries()
    assert [entry.round for entry in entries] == [1, 1] and len({entry.run for entry in entries}) == 2


def test_no_client_can_say_what_was_spent() -> None:
    def lying(message: Message, context: Context) -> Message:
        return reply_to(message, vector_of(message.content.array_records["arrays"]), 1, epsilon=0.0, delta=0.5)

    _, metrics = one_round(PrivateFlowerStrategy(NOISY), lying)
    assert metrics is not None and metrics["delta"] == 1e-5 and float(metrics["epsilon"]) > 1  # type: ignore[arg-type]  # it is a number


def test_an_aggregation_that_was_never_counted_is_refused() -> None:
    with pytest.raises(RunError, match="before any round was counted; call configure_train first"):
        PrivateFlowerStrategy(NOISY).aggregate_train(1, [])


def test_a_round_that_was_counted_once_is_released_once() -> None:
    strategy = PrivateFlowerStrategy(NOISY)
    one_round(strategy)
    with pytest.raises(RunError, match="called again for a round that was counted once"):
        strategy.aggregate_train(1, [])


DISTRIBUTED = DistributedDP(EVENLY, 1.0, 1.0, 1e-5, SIZE, 6, 4)
SUMMED = SecureAggregation(DISTRIBUTED, SecAggPlus(corrupt_share=0.2, minimum=5, active=False))


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        (FedAvg(), "FedAvg claims no privacy, so there is nothing to count"),
        (
            LocalDP(EVENLY, 1.0, 2.0, 1e-5),
            "LocalDP's clients add the noise, and Flower's ClientApps know nothing of it",
        ),
        (SUMMED, "SecureAggregation's clients add the noise"),
        (CentralDP(EVENLY, 1.0, 1.0, 4, 1e-5, TreeNoise(rounds=8)), "another node each time that it connects"),
        ("CentralDP", r"takes CentralDP\(...\), got str"),
    ],
    ids=["none", "local", "distributed", "tree", "text"],
)
def test_what_the_servers_own_noise_does_not_protect_is_refused_with_the_reason(strategy: Any, said: str) -> None:
    with pytest.raises(StrategyError, match=said):
        PrivateFlowerStrategy(strategy)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"fraction_train": 0.5}, "fraction_train draws cohorts that everybody can draw again"),
        ({"sampling": 0.5}, "sampling must be one of server's samplings, got 0.5"),
        (
            {"budget": Budget(epsilon=1.0, delta=1e-5, unit="client", adjacency="replace-one")},
            "a budget needs a ledger to remember what is spent",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        PrivateFlowerStrategy(NOISY, **settings)


@pytest.mark.parametrize("sampling", [EveryClient(), FixedSampling(2)])
def test_samplings_that_hide_nobody_cost_what_they_can_prove(sampling: Sampling) -> None:
    strategy = PrivateFlowerStrategy(NOISY, sampling=sampling)
    _, metrics = one_round(strategy)
    assert strategy.claim is not None and strategy.claim.adjacency == sampling.adjacency
    assert metrics is not None and metrics["epsilon"] == strategy.claim.epsilon


def test_no_private_strategy_runs_under_flower_without_being_counted() -> None:
    for strategy in (NOISY, LocalDP(EVENLY, 1.0, 2.0, 1e-5), SUMMED):
        with pytest.raises(StrategyError, match="nothing counts what a round costs"):
            FlowerStrategy(strategy)
    with pytest.raises(
        StrategyError, match="DistributedDP costs privacy, which every site must count in its own ledge"
    ):
        SecureFlowerStrategy(SUMMED)
    FlowerStrategy(FedMedian())


def test_a_strategy_that_hides_its_claim_from_the_report_is_counted_all_the_same() -> None:
    class Quiet(CentralDP):
        def protection(self) -> str:
            return "none"

    quiet = Quiet(EVENLY, 1.0, 1.0, 4, 1e-5)
    with pytest.raises(StrategyError, match="nothing counts what a round costs"):
        FlowerStrategy(quiet)
    _, metrics = one_round(PrivateFlowerStrategy(quiet))
    assert metrics is not None and "epsilon" in metrics

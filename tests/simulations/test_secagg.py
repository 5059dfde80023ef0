"""Secure sums among virtual clients: real sessions, any engine, dropouts at any exchange, and what it all costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedml_core import ConfigError, PrivacyError, StrategyError, Training
from fedml_core.weighting import Uniform
from server import FixedSampling, History, MinimumSeparation, PoissonSampling, RoundReport
from simulations import Faults, Fused, Processes, Sequential, Vectorised, simulate
from simulations.engines.engine import Engine
from simulations.simulate import Simulation
from simulations.virtual_sites import VirtualRoster
from strategies import (
    AssistedOneShot,
    DistributedDP,
    FedAdam,
    FedAvg,
    FedMedian,
    SecAggPlus,
    SecureAggregation,
    Strategy,
)
from tests.simulations.two_classes import TASK, dense

ENGINES = [
    Sequential(),
    Vectorised(clients_at_once=3),
    Fused(clients_at_once=3),
    Processes(workers=2, inner=Sequential()),
    Processes(workers=2, inner=Fused()),
]


def secure(inner: Strategy | None = None, *, draw_masks: bool = True, **protocol: Any) -> SecureAggregation:
    chosen = SecAggPlus(**{"corrupt_share": 0.1, "dropout_share": 0.3, **protocol})
    return SecureAggregation(inner or FedAvg(), chosen, clip=1.0, max_weight=100, draw_masks=draw_masks)


def run(strategy: Strategy, engine: Engine | None = None, **changes: Any) -> History:
    common: dict[str, Any] = {"clients": 12, "rounds": 2, "training": Training(batch_size=7), "seed": 4}
    return simulate(TASK, strategy, engine=engine or Sequential(), **{**common, **changes})


@pytest.mark.parametrize("engine", ENGINES, ids=repr)
def test_every_engine_comes_to_the_model_that_it_comes_to_in_the_clear(engine: Engine) -> None:
    expected = run(FedAvg(), engine)
    found = run(secure(), engine)
    torch.testing.assert_close(found.parameters, expected.parameters, rtol=0, atol=1e-6)
    last, clear = found.reports[-1], expected.reports[-1]
    assert last.metrics["train"]["examples"] == clear.metrics["train"]["examples"]
    assert last.metrics["train"]["loss"] == pytest.approx(clear.metrics["train"]["loss"], abs=1e-6)


def test_a_run_without_masks_is_the_same_to_the_byte_and_to_the_bit() -> None:
    """the sum, and what stops it, are those of the masked protocol with the same members and dropouts."""
    # Trust: whoever runs it sees every vector. It protects nobody.
    faults = Faults(drop=0.2)
    masked = run(secure(FedAdam()), rounds=4, faults=faults)
    unmasked = run(secure(FedAdam(), draw_masks=False), rounds=4, faults=faults)
    assert torch.equal(masked.parameters, unmasked.parameters)
    for one, other in zip(masked.reports, unmasked.reports, strict=True):
        assert (one.status, list(one.participants), one.secure and one.secure["exchanges"]) == (
            other.status,
            list(other.participants),
            other.secure and other.secure["exchanges"],
        )
        # Parameters hold the attempt's number, which is the clock's: as long in both, unless a digit is added.
        assert (one.bytes_up, one.bytes_down) == (other.bytes_up, other.bytes_down)
    assert "simulated without masks" in unmasked.reports[0].protection
    assert "without" not in masked.reports[0].protection


def test_clients_that_drop_out_at_any_exchange_cost_the_others_nothing() -> None:
    seen: list[RoundReport] = []
    run(secure(), rounds=12, faults=Faults(drop=0.15), callbacks=[lambda report, state: seen.append(report)])
    assert all(report.status == "ok" for report in seen)
    assert any(len(report.participants) < 12 for report in seen)
    # Who is lost after its vector came is in the sum all the same.
    assert any(len(report.participants) + len(report.missing) == 12 for report in seen)


def test_below_the_threshold_a_round_is_void_and_the_model_as_before() -> None:
    seen: list[RoundReport] = []
    strategy = secure(corrupt_share=0.2, dropout_share=0.1)
    run(strategy, rounds=8, faults=Faults(drop=0.45), callbacks=[lambda report, state: seen.append(report)])
    void = [report for report in seen if report.status == "void"]
    assert void and all("the secure sum stopped" in report.why for report in void)


def test_clients_whose_update_is_not_finite_drop_out_before_they_send_anything() -> None:
    history = run(secure(), rounds=3, faults=Faults(nan=0.15))
    assert torch.isfinite(history.parameters).all()
    excluded = [row for report in history.reports for row in report.excluded]
    assert excluded and {row.rule for row in excluded} <= {"non-finite", "diverged"}


@pytest.mark.parametrize(
    ("minimum", "changes"),
    [
        (13, {}),
        (6, {"sampling": FixedSampling(5)}),
        (5, {"sampling": MinimumSeparation(3)}),
        (13, {"sampling": PoissonSampling(0.5)}),
        (13, {"faults": Faults(unavailable=0.5)}),
    ],
)
def test_a_minimum_that_no_cohort_reaches_is_refused_before_anything_runs(minimum: int, changes: Any) -> None:
    """What all rounds would be void for, known from the start."""
    most = minimum - 1
    expected = f"a round asks {most} members at most, and the minimum is {minimum}; ask more, or lower"
    with pytest.raises(ConfigError, match=expected):
        Simulation(TASK, secure(minimum=minimum), clients=12, **changes)
    assisted = SecureAggregation(FedAvg(), AssistedOneShot(assistants=(0, 1, 2), minimum=minimum), max_weight=100)
    with pytest.raises(ConfigError, match=expected):
        Simulation(TASK, assisted, clients=12, **changes)
    Simulation(TASK, secure(minimum=most), clients=12, **changes)


def test_more_clients_than_the_noise_has_room_for_are_refused_before_anything_runs() -> None:
    inner = DistributedDP(FedAvg(weighting=Uniform()), 1.0, 1.0, 1e-5, 30, cohort_size=10, honest=4)
    strategy = SecureAggregation(inner, SecAggPlus(minimum=6, corrupt_share=0.2))
    with pytest.raises(PrivacyError, match="12 clients are in a sum that has room for 10; ask fewer"):
        Simulation(TASK, strategy, clients=12)
    # Here some rounds may ask few enough.
    Simulation(TASK, strategy, clients=12, faults=Faults(unavailable=0.2))
    Simulation(TASK, strategy, clients=12, sampling=PoissonSampling(0.8))
    Simulation(TASK, strategy, clients=12, sampling=FixedSampling(10))


def test_a_sampled_cohort_makes_a_session_of_its_own_every_round() -> None:
    history = run(secure(), clients=40, rounds=3, sampling=FixedSampling(10))
    assert [report.secure and report.secure["exchanges"] for report in history.reports] == [5, 5, 5]
    assert all(report.replies == 10 for report in history.reports)


def test_above_a_hundred_clients_the_graph_is_sparse() -> None:
    history = run(secure(corrupt_share=0.05, dropout_share=0.05), clients=120, rounds=1)
    facts = history.reports[0].secure
    assert facts is not None and 2 <= facts["degree"] < 119 and facts["survivors"] == 120


def test_a_rule_that_is_no_sum_is_refused_with_the_reason() -> None:
    with pytest.raises(StrategyError, match="FedMedian must see every update by itself"):
        SecureAggregation(FedMedian(), clip=1.0)


def test_a_weighing_strategy_needs_the_largest_weight() -> None:
    with pytest.raises(ConfigError, match="max_weight"):
        SecureAggregation(FedAvg(), clip=1.0)


def test_a_secure_strategy_is_named_and_comes_back_from_its_configuration() -> None:
    strategy = secure(FedAdam(learning_rate=0.02))
    assert Strategy.from_config(strategy.to_config()) == strategy


def test_virtual_identities_are_fresh_for_every_run_and_stable_within_one() -> None:
    first, second = VirtualRoster(5), VirtualRoster(5)
    assert first[3] == first[3] and first[3] != first[4] and first[3] != second[3]
    signature = first.sign_as(3)(b"message")
    assert first.shared.verify(first[3], signature, b"message") and not first.shared.verify(
        first[4], signature, b"message"
    )
    first.forget()
    assert first.shared.verify(first[3], signature, b"message")


def assisted(inner: Strategy | None = None, **protocol: Any) -> SecureAggregation:
    chosen = AssistedOneShot(**{"assistants": (0, 5, 11), **protocol})
    return SecureAggregation(inner or FedAvg(), chosen, clip=1.0, max_weight=100)


@pytest.mark.parametrize("engine", ENGINES, ids=repr)
def test_every_engine_comes_to_the_same_model_with_assistants(engine: Engine) -> None:
    expected = run(FedAvg(), engine)
    found = run(assisted(), engine)
    torch.testing.assert_close(found.parameters, expected.parameters, rtol=0, atol=1e-6)
    assert [report.secure and report.secure["contributors"] for report in found.reports] == [12, 12]
    assert found.reports[-1].metrics["train"]["examples"] == expected.reports[-1].metrics["train"]["examples"]


def test_a_semi_honest_assisted_sum_is_that_of_the_active_one() -> None:
    active, curious = run(assisted(FedAdam())), run(assisted(FedAdam(), active=False, threshold=2))
    # Rounding is keyed by the run's seed, so both are the same to the bit.
    assert torch.equal(active.parameters, curious.parameters)
    assert "semi-honest" in curious.reports[0].protection and "active" in active.reports[0].protection


def test_assistants_and_clients_that_drop_out_cost_the_others_nothing() -> None:
    seen: list[RoundReport] = []
    strategy = assisted(assistants=(0, 2, 5, 7, 11), threshold=1, active=False)
    run(strategy, rounds=12, faults=Faults(drop=0.2), callbacks=[lambda report, state: seen.append(report)])
    assert all(report.status == "ok" for report in seen)
    assert all(len(report.participants) + len(report.missing) == 12 for report in seen)
    lost = [row["assistant"] for report in seen for row in (report.secure or {})["lost"]]
    assert lost and set(lost) <= {0, 2, 5, 7, 11}
    # Whoever is lost as an assistant only after it contributed is in the sum all the same.
    assert any(row["assistant"] in report.participants for report in seen for row in (report.secure or {})["lost"])


def test_without_a_quorum_of_assistants_a_round_is_void_and_the_model_as_before() -> None:
    seen: list[tuple[RoundReport, torch.Tensor]] = []
    keep = [lambda report, state: seen.append((report, state.parameters))]
    run(assisted(), rounds=8, faults=Faults(drop=0.45), callbacks=keep)
    void = [place for place, (report, _) in enumerate(seen) if report.status == "void"]
    assert void and len(void) < len(seen)
    assert all("it did not answer" in seen[place][0].why for place in void)
    assert all(torch.equal(seen[place][1], seen[place - 1][1]) for place in void if place > 0)


def test_assistants_outside_of_a_sampled_cohort_assist_it() -> None:
    history = run(assisted(), clients=40, rounds=3, sampling=FixedSampling(10))
    assert [report.secure and report.secure["exchanges"] for report in history.reports] == [5, 5, 5]
    assert all(report.replies == 10 for report in history.reports)
    assert any(not {0, 5, 11} <= set(report.participants) for report in history.reports)


def test_clients_whose_update_is_not_finite_contribute_nothing() -> None:
    history = run(assisted(), rounds=3, faults=Faults(nan=0.15))
    assert torch.isfinite(history.parameters).all()
    excluded = [row for report in history.reports for row in report.excluded]
    assert excluded and {row.rule for row in excluded} <= {"non-finite", "diverged"}


def test_clients_add_their_share_of_noise_in_an_assisted_sum() -> None:
    inner = FedAvg(weighting=Uniform())
    size = sum(one.numel() for one in dense().parameters())
    noised = DistributedDP(inner, clip_norm=1.0, noise_multiplier=1.0, delta=1e-5, size=size, cohort_size=12, honest=6)
    protocol = AssistedOneShot(assistants=(0, 5, 11), minimum=7)
    report = run(SecureAggregation(noised, protocol), rounds=1).reports[0]
    assert report.status == "ok" and report.replies == 12 and report.epsilon is not None
    with pytest.raises(PrivacyError, match="raise the protocol's minimum to 7"):
        SecureAggregation(noised, AssistedOneShot(assistants=(0, 5, 11), minimum=6))


def test_an_assistant_that_is_no_client_of_the_simulation_is_an_error() -> None:
    with pytest.raises(ConfigError, match="the roster has no client 40"):
        run(assisted(assistants=(0, 1, 40)))


def test_an_assisted_sum_is_not_simulated_without_masks() -> None:
    with pytest.raises(ConfigError, match="always simulated with its masks"):
        SecureAggregation(FedAvg(), AssistedOneShot(assistants=(0, 1, 2)), max_weight=9, draw_masks=False)


def test_an_assisted_strategy_comes_back_from_its_configuration_with_its_assistants_in_order() -> None:
    strategy = assisted(assistants=(11, 0, 5), each=2)
    found = Strategy.from_config(strategy.to_config())
    assert found == strategy and isinstance(found, SecureAggregation)
    assert isinstance(found.protocol, AssistedOneShot) and found.protocol.assistants == (0, 5, 11)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"assistants": (0,)}, "2 to 7 assistants"),
        ({"assistants": (0, 0, 1)}, "each once"),
        ({"assistants": ("a", "b")}, "numbers of a roster"),
        ({"assistants": 3}, "a list of client numbers"),
        ({"threshold": 3}, "from 1 to 2"),
        ({"lying": 2}, "from 0 to the threshold"),
        ({"each": 3}, "each must be"),
        ({"corrupt_share": 1.0}, "corrupt_share must be"),
        ({"minimum": 1}, "minimum must be"),
    ],
)
def test_assistance_that_cannot_be_is_refused_where_it_is_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AssistedOneShot(**{"assistants": (0, 1, 2), **arguments})

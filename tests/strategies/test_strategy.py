from __future__ import annotations

import dataclasses
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from fedml_core.accumulate import Collect, PlainSum
from fedml_core.compression import StochasticQuantize, TopK
from fedml_core.errors import ReplyError, StrategyError
from fedml_core.model import ModelSpec
from fedml_core.transform import Chain, Draws, State, Transform, chain
from fedml_core.update import Total, Update
from fedml_core.weighting import Uniform, Weigh
from strategies import (
    Compressed,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedMean,
    FedYogi,
    Krum,
    MultiKrum,
    Scaffold,
    Strategy,
    WeightedFedAvg,
)

SAMPLES: dict[str, Strategy] = {
    "FedAvg": FedAvg(),
    "WeightedFedAvg": WeightedFedAvg(weighting=Uniform()),
    "FedProx": FedProx(mu=0.1),
    "FedAvgM": FedAvgM(),
    "FedAdagrad": FedAdagrad(),
    "FedAdam": FedAdam(),
    "FedYogi": FedYogi(),
    "Scaffold": Scaffold(population=10),
    "FedMedian": FedMedian(server_learning_rate=0.5),
    "FedTrimmedMean": FedTrimmedMean(),
    "Krum": Krum(malicious=1),
    "MultiKrum": MultiKrum(malicious=1, selected=2),
    "Compressed": Compressed(FedAdam(), StochasticQuantize(8)),
}
PROTECTED = {"CentralDP", "DistributedDP", "LocalDP", "SecureAggregation"}
"""Wrappers that say whom they protect; they have tests of their own for what they change."""
PAIR = (np.array([1.0, 2.0]), 3)
EVENT = {"name": "round"}


@dataclass(frozen=True)
class _Noticed(Transform):
    """Adds one to every total, and reports to an accountant."""

    def decode(self, total: Total, state: State, draws: Draws) -> tuple[Total, State]:
        return total.replace(values=total.values + 1), state

    def event(self) -> dict[str, Any]:
        return EVENT


@dataclass(frozen=True, kw_only=True)
class _Noticing(Strategy):
    def pipeline(self) -> Transform:
        return chain(_Noticed(), Weigh(Uniform()))


@dataclass(frozen=True)
class _Grows(Transform):
    def encoded_size(self, size: int) -> int:
        return size + 1


@dataclass(frozen=True, kw_only=True)
class _Wrong(Strategy):
    def pipeline(self) -> Transform:
        return chain(_Grows())


def test_every_strategy_has_a_sample_here() -> None:
    ours = {name for name, kind in Strategy.members.items() if kind.__module__.startswith("strategies.")}
    assert set(SAMPLES) == ours - PROTECTED
    assert all(type(sample).__name__ == name for name, sample in SAMPLES.items())


@pytest.mark.parametrize("strategy", SAMPLES.values(), ids=SAMPLES)
def test_a_strategy_is_a_value_that_travels_by_name_and_by_pickle(strategy: Strategy) -> None:
    assert Strategy.from_config(strategy.to_config()) == strategy
    assert pickle.loads(pickle.dumps(strategy)) == strategy
    assert hash(strategy) == hash(dataclasses.replace(strategy))
    assert pickle.loads(pickle.dumps(strategy.accumulator(ModelSpec.of_size(3)))).size >= 3


@pytest.mark.parametrize("strategy", SAMPLES.values(), ids=SAMPLES)
def test_an_empty_cohort_changes_nothing(strategy: Strategy) -> None:
    spec = ModelSpec.of_size(3)
    parameters, state = torch.tensor([1.0, 2.0, 3.0]), strategy.init(spec)
    total = strategy.accumulator(spec).total()
    assert strategy.step(parameters, total, state, Draws.of(0)) == (parameters, state)


@pytest.mark.parametrize("strategy", SAMPLES.values(), ids=SAMPLES)
def test_a_cohort_of_equals_moves_the_model_their_way_and_changes_no_argument(strategy: Strategy) -> None:
    spec = ModelSpec.of_size(4)
    state, half, accumulator = strategy.init(spec), strategy.client_half(), strategy.accumulator(spec)
    delta = torch.tensor([0.5, -0.5, 0.25, -0.25])
    for client in range(5):
        update = Update.of(delta.clone(), 1.0, examples=2.0).replace(facts={"step_size": torch.tensor(0.5)})
        encoded, _ = half.encode(update, strategy.told(state), half.memory(spec), Draws.of(client))
        accumulator.add(encoded)
    before, parameters = str(state), torch.ones(4)
    stepped, _ = strategy.step(parameters, accumulator.total(), state, Draws.of(0))
    assert torch.sign(stepped - 1).tolist() == torch.sign(delta).tolist()
    assert parameters.tolist() == [1.0] * 4
    assert str(state) == before


@pytest.mark.parametrize("strategy", SAMPLES.values(), ids=SAMPLES)
def test_no_strategy_claims_a_protection_that_it_does_not_give(strategy: Strategy) -> None:
    assert strategy.protection() == "none"


@pytest.mark.parametrize("strategy", SAMPLES.values(), ids=SAMPLES)
def test_rules_that_need_single_updates_say_so_and_the_others_sum(strategy: Strategy) -> None:
    robust = type(strategy).__module__ == "strategies.robust"
    assert strategy.needs_single_updates == robust
    assert type(strategy.accumulator(ModelSpec.of_size(2))) is (Collect if robust else PlainSum)


def test_a_strategy_without_a_pipeline_says_what_to_define() -> None:
    @dataclass(frozen=True, kw_only=True)
    class _Empty(Strategy):
        pass

    with pytest.raises(StrategyError, match=r"_Empty must define pipeline\(\)"):
        _Empty()


def test_a_strategy_of_ones_own_is_a_pipeline() -> None:
    @dataclass(frozen=True, kw_only=True)
    class _EqualVoices(Strategy):
        def pipeline(self) -> Transform:
            return chain(Weigh(Uniform()))

    stepped, _ = _EqualVoices().aggregate(np.zeros(2), [(np.array([1.0, 2.0]), 1), (np.array([3.0, 4.0]), 99)])
    assert stepped.tolist() == [2.0, 3.0]


def test_an_accountant_is_not_told_a_round_was_empty_by_a_skipped_step() -> None:
    strategy = _Noticing()
    empty = strategy.accumulator(ModelSpec.of_size(2)).total()
    stepped, _ = strategy.step(torch.zeros(2), empty, strategy.init(ModelSpec.of_size(2)), Draws.of(0))
    assert stepped.tolist() == [1.0, 1.0]


def test_a_step_that_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(StrategyError, match=r"_Wrong's step has shape \(3,\), the model \(2,\)"):
        _Wrong().aggregate(np.zeros(2), [Update.of(torch.ones(3), 1.0)])


@pytest.mark.parametrize("kind", [FedAvg, FedAdam], ids=["result", "state"])
def test_a_step_that_is_not_finite_is_refused_and_the_state_stays(kind: type[Strategy]) -> None:
    # 3e38 is finite; twice that is not, and neither is its square in Adam's second moment.
    strategy = kind()
    parameters = torch.tensor([3e38])
    spec = ModelSpec.of_size(1)
    state = strategy.init(spec)
    accumulator = strategy.accumulator(spec)
    accumulator.add(Update.of(torch.tensor([3e38]), 1.0))
    with pytest.raises(StrategyError, match="step is not finite; lower the learning rates"):
        strategy.step(parameters, accumulator.total(), state, Draws.of(0))
    assert str(state) == str(strategy.init(spec))


def test_the_model_comes_back_in_the_kind_and_dtype_that_it_came_in() -> None:
    for dtype in (np.float16, np.float32, np.float64):
        stepped, _ = FedAvg().aggregate(np.zeros(2, dtype), [PAIR])
        assert isinstance(stepped, np.ndarray)
        assert stepped.dtype == dtype
    for kind in (torch.float32, torch.float64, torch.bfloat16):
        after, _ = FedAvg().aggregate(torch.zeros(2, dtype=kind), [PAIR, (torch.ones(2, dtype=kind), 3)])
        assert isinstance(after, torch.Tensor)
        assert after.dtype == kind


def test_aggregate_changes_neither_the_model_nor_the_updates() -> None:
    parameters, delta = np.zeros(2, np.float32), np.array([1.0, 2.0], np.float32)
    FedAdam().aggregate(parameters, [(delta, 3), (delta, 4)])
    assert (parameters.tolist(), delta.tolist()) == ([0.0, 0.0], [1.0, 2.0])


@pytest.mark.parametrize("parameters", [np.array([0.1, 0.2]), torch.tensor([0.1, 0.2], dtype=torch.float64)])
def test_aggregating_nothing_returns_the_very_model(parameters: Any) -> None:
    assert FedAvg().aggregate(parameters, [])[0] is parameters


@pytest.mark.parametrize(
    ("update", "error", "message"),
    [
        ((np.array([1.0, np.nan]), 1), ReplyError, "update 1: values or sums hold NaN or infinity"),
        ((np.array([1.0, 1e300]), 1), ReplyError, "update 1: values or sums hold NaN or infinity"),
        ((np.ones(3), 1), ReplyError, "update 1: the delta must have 2 entries, got 3"),
        ((np.ones(2), 0), ReplyError, "update 1: the number of examples must be > 0 and <= 1e\\+09, got 0"),
        ((np.ones(2), -5), ReplyError, "update 1: the number of examples must be > 0"),
        ((np.ones(2), 1e12), ReplyError, "update 1: the number of examples must be > 0 and <= 1e\\+09, got 1e\\+12"),
        ((np.ones(2), float("nan")), ReplyError, "update 1: the number of examples must be > 0"),
        ((np.ones(2), "many"), ReplyError, "update 1: the number of examples and the metrics must be numbers"),
        ((np.ones(2), 10**400), ReplyError, "update 1: the number of examples and the metrics must be numbers"),
        ((np.ones(2), 1, {"loss": "low"}), ReplyError, "update 1: the number of examples and the metrics must"),
        ((np.ones((2, 1)), 1), StrategyError, r"a delta must be one vector, got shape \(2, 1\); flatten"),
        ((np.array(["a", "b"]), 1), StrategyError, "a delta must be a torch tensor or a NumPy array of floats"),
        (([1.0, 2.0], 1), StrategyError, "a delta must be a torch tensor or a NumPy array of floats, got list"),
        (np.ones(2), StrategyError, r"an update is \(delta, examples\) or an Update, got ndarray"),
        (Update.of(torch.ones(3)), ReplyError, r"update 1: values must have shape \(..., 2\), got \(3,\)"),
    ],
    ids=repr,
)
def test_an_update_that_must_not_be_used_is_refused_with_its_place(
    update: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        FedAvg().aggregate(np.zeros(2), [PAIR, update])


@pytest.mark.parametrize(
    "parameters", [np.zeros(2, int), np.zeros((1, 2)), [0.0, 0.0], torch.zeros(2, dtype=torch.int)]
)
def test_parameters_that_are_no_vector_of_floats_are_refused(parameters: Any) -> None:
    with pytest.raises(StrategyError, match="parameters must be"):
        FedAvg().aggregate(parameters, [PAIR])


@pytest.mark.parametrize("strategy", [Scaffold(population=3), Compressed(FedAvg(), TopK(0.5))], ids=repr)
def test_clients_that_remember_must_encode_their_own_updates(strategy: Strategy) -> None:
    with pytest.raises(StrategyError, match="clients remember something between rounds, so they must encode their own"):
        strategy.aggregate(np.zeros(2), [PAIR])


def test_updates_that_clients_encoded_are_not_encoded_again() -> None:
    encoded, _ = FedAvg().client_half().encode(Update.of(torch.ones(2), 1.0, examples=4.0), {}, {}, Draws.of(0))
    assert encoded.values.tolist() == [4.0, 4.0]
    assert FedAvg().aggregate(torch.zeros(2), [encoded])[0].tolist() == [1.0, 1.0]


def test_draws_reproduce_a_random_pipeline_and_are_fresh_without() -> None:
    strategy = Compressed(FedAvg(), StochasticQuantize(2))
    delta = (np.linspace(0.1, 0.9, 64), 1)
    runs = [strategy.aggregate(np.zeros(64), [delta], draws=Draws.of(5, 1))[0].tolist() for _ in range(2)]
    fresh = [strategy.aggregate(np.zeros(64), [delta])[0].tolist() for _ in range(2)]
    assert runs[0] == runs[1]
    assert fresh[0] != fresh[1]


def test_a_strategy_without_a_client_half_gives_clients_an_empty_chain() -> None:
    assert FedMedian().client_half() == Chain()
    assert FedMedian(server_learning_rate=0.5).client_half() == Chain()


def test_aggregate_learns_least_squares_from_a_plain_numpy_loop() -> None:
    inputs = [np.random.default_rng(client).normal(size=(20 + client, 3)) for client in range(4)]
    truth = np.array([1.0, -2.0, 0.5])
    strategy, parameters = FedAvgM(server_momentum=0.5), np.zeros(3)
    state = strategy.init(ModelSpec.of_size(3))
    for _ in range(60):
        deltas = [(-0.2 * x.T @ (x @ (parameters - truth)) / len(x), len(x)) for x in inputs]
        parameters, state = strategy.aggregate(parameters, deltas, state)
    assert parameters == pytest.approx(truth, abs=1e-5)

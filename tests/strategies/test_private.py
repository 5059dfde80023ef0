"""CentralDP and LocalDP: what they wrap, what they refuse, and what reaches the model.

Noise is fresh in every run, so each tolerance on it is at least six standard deviations.
"""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch

from fedml_core.compression import StochasticQuantize, TopK
from fedml_core.errors import ConfigError, FedveilError, PrivacyError, ReplyError, StrategyError
from fedml_core.model import ModelSpec
from fedml_core.privacy.adaptive_clip import AdaptiveClip
from fedml_core.privacy.clipping import BoundedSum, ClipByNorm
from fedml_core.privacy.correlated import BandedNoise, TreeNoise
from fedml_core.transform import Draws
from fedml_core.update import Total, Update
from fedml_core.weighting import ByMetric, Uniform
from strategies import (
    CentralDP,
    Compressed,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    LocalDP,
    Scaffold,
    SecureAggregation,
    Strategy,
    WeightedFedAvg,
)

EVENLY = FedAvg(weighting=Uniform())
SIZE = 10_000
SPEC = ModelSpec.of_size(SIZE)
QUIET = 1e-6

SAMPLES: dict[str, Strategy] = {
    "central": CentralDP(EVENLY, 1.0, 1.0, 10.0, 1e-5),
    "adam": CentralDP(FedAdam(weighting=Uniform()), 1.0, 1.0, 10.0, 1e-5),
    "prox": CentralDP(FedProx(mu=0.1, weighting=Uniform()), 1.0, 1.0, 10.0, 1e-5),
    "adaptive": CentralDP(EVENLY, AdaptiveClip(counter_noise=2.0), 1.0, 10.0, 1e-5),
    "tree": CentralDP(EVENLY, 1.0, 1.0, 10.0, 1e-5, TreeNoise(rounds=8, restart_every=4)),
    "banded": CentralDP(EVENLY, 1.0, 1.0, 10.0, 1e-5, BandedNoise(rounds=8, bands=4)),
    "adaptive tree": CentralDP(EVENLY, AdaptiveClip(counter_noise=2.0), 1.0, 10.0, 1e-5, TreeNoise(rounds=8)),
    "sparse": CentralDP(Compressed(EVENLY, TopK(0.5)), 1.0, 1.0, 10.0, 1e-5),
    "local": LocalDP(EVENLY, 1.0, 8.0, 1e-5),
    "local, compressed": Compressed(LocalDP(EVENLY, 1.0, 8.0, 1e-5), StochasticQuantize(8)),
}
EVERY_SAMPLE = pytest.mark.parametrize("strategy", SAMPLES.values(), ids=SAMPLES)


def stepped(strategy: Strategy, rows: torch.Tensor, rounds: int = 1) -> torch.Tensor:
    """Return the model after rounds in which each row is a client's update, from zeros."""
    spec = ModelSpec.of_size(rows.shape[-1])
    model, state = torch.zeros(spec.size), strategy.init(spec)
    for number in range(rounds):
        accumulator, half = strategy.accumulator(spec), strategy.client_half()
        if len(rows):
            update = Update(rows, torch.ones(len(rows), dtype=torch.float64))
            draws = Draws.each([("test", number, place) for place in range(len(rows))])
            accumulator.add(half.encode(update, strategy.told(state), half.memory(spec), draws)[0])
        model, state = strategy.step(model, accumulator.total(), state, Draws.of(0))
    return model


@EVERY_SAMPLE
def test_a_private_strategy_is_a_value_that_travels_by_name_and_by_pickle(strategy: Strategy) -> None:
    assert Strategy.from_config(strategy.to_config()) == strategy
    assert pickle.loads(pickle.dumps(strategy)) == strategy
    assert strategy.privacy() is not None and strategy.pipeline().event() is not None
    assert "DP" in strategy.protection()


@pytest.mark.parametrize("came", [0, 1, 5, 20])
@pytest.mark.parametrize("name", ["central", "tree", "banded", "prox"])
def test_the_denominator_is_fixed_and_the_noise_does_not_fall_with_dropouts(name: str, came: int) -> None:
    rows = torch.zeros(came, SIZE)
    rows[:, 0] = 100.0  # clipped to 1
    model = stepped(SAMPLES[name], rows)
    # 10,000 draws: their deviation is off by 0.7 %.
    assert float(model[1:].std()) == pytest.approx(0.1, rel=0.045)
    assert float(model[0]) == pytest.approx(came / 10, abs=0.7)


def test_an_empty_round_is_noised_like_any_other_under_every_server_optimizer() -> None:
    for name in ("central", "adam", "adaptive", "sparse", "adaptive tree"):
        model = stepped(SAMPLES[name], torch.zeros(0, SIZE))
        assert float((model != 0).float().mean()) > 0.4


def test_without_much_noise_it_is_the_strategy_on_clipped_updates() -> None:
    rows = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.0]])
    clipped = torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.0]])
    for inner in (EVENLY, FedAvgM(weighting=Uniform()), FedAdam(weighting=Uniform())):
        private = stepped(CentralDP(inner, 1.0, QUIET, 3.0, 1e-5), rows, rounds=3)
        torch.testing.assert_close(private, stepped(inner, clipped, rounds=3), rtol=1e-3, atol=1e-2)
    adaptive = CentralDP(EVENLY, AdaptiveClip(initial=1.0, learning_rate=1e-9), QUIET, 3.0, 1e-5)
    torch.testing.assert_close(stepped(adaptive, rows), stepped(EVENLY, clipped), rtol=1e-3, atol=1e-4)


def test_a_strategy_that_counts_clients_sees_the_expected_cohort_alone() -> None:
    private = CentralDP(Scaffold(population=100), 1.0, QUIET, 10.0, 1e-5)
    spec = ModelSpec.of_size(2)
    state = private.init(spec)
    values = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    states = [
        private.step(torch.zeros(2), Total(values, float(count), count, {"examples": 1.0}), state, Draws.of(0))[1]
        for count in (0, 1, 10, 1000)
    ]
    found = [_controls(after) for after in states]
    assert all(torch.allclose(found[0], each, atol=1e-4) for each in found)


def _controls(state: Any) -> torch.Tensor:
    controls: torch.Tensor = next(part["c"] for part in state.values() if "c" in part)
    return controls


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (FedAvg(), r"FedAvg weighs clients by ByExamples, so one client could count for many; give it weighting=Unif"),
        (WeightedFedAvg(weighting=ByMetric("accuracy")), "weighs clients by ByMetric"),
        (FedMedian(), "FedMedian does not add updates up"),
        (SAMPLES["central"], "CentralDP is private already"),
        (SAMPLES["local"], "LocalDP is private already"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda s: CentralDP(s, 1.0, 1.0, 10.0, 1e-5), lambda s: LocalDP(s, 1.0, 1.0, 1e-5)])
def test_what_cannot_be_protected_is_refused(wrap: Any, strategy: Strategy, message: str) -> None:
    with pytest.raises(PrivacyError, match=message):
        wrap(strategy)


def test_compression_of_clipped_updates_is_refused_and_the_other_order_is_not() -> None:
    with pytest.raises(PrivacyError, match="must come last: TopK after it"):
        Compressed(SAMPLES["central"], TopK(0.5))
    assert SAMPLES["sparse"].pipeline().l2_bound(math.inf) == 1.0


def test_a_secure_sum_cannot_check_norms_so_it_is_refused() -> None:
    with pytest.raises(StrategyError, match="CentralDP must see every update by itself"):
        SecureAggregation(SAMPLES["central"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clip_norm": 0.0}, "clip_norm must be"),
        ({"clip_norm": math.inf}, "clip_norm must be"),
        ({"noise_multiplier": 0.0}, "noise_multiplier must be > 0, got 0.0"),
        ({"expected_cohort": 0.0}, "expected_cohort must be > 0, got 0.0"),
        ({"delta": 0.0}, "delta must be > 0 and < 1, got 0.0"),
        ({"noise": "TreeNoise"}, "noise must be TreeNoise, BandedNoise or None, got 'TreeNoise'"),
        ({"clip_norm": AdaptiveClip(), "expected_cohort": 10.0}, "counter_noise must be > 0.5"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    full = {"clip_norm": 1.0, "noise_multiplier": 1.0, "expected_cohort": 10.0, "delta": 1e-5, **arguments}
    with pytest.raises(FedveilError, match=message):
        CentralDP(EVENLY, **full)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 1e-5), (1.0, 0.0), (1.0, 1.0)])
def test_local_terms_that_mean_nothing_are_refused(epsilon: float, delta: float) -> None:
    with pytest.raises(ConfigError, match="must be"):
        LocalDP(EVENLY, 1.0, epsilon, delta)


def test_an_update_that_was_not_clipped_is_refused_by_the_server() -> None:
    accumulator = SAMPLES["central"].accumulator(SPEC)
    assert isinstance(accumulator, BoundedSum)
    with pytest.raises(ReplyError, match="longer than the 1 that noise is added for"):
        accumulator.add(Update.of(torch.ones(SIZE)))


def test_terms_say_what_correlated_noise_asks_of_the_sampling() -> None:
    terms = [SAMPLES[name].privacy() for name in ("central", "tree", "banded", "local")]
    assert [(t.separation, t.rounds, t.adjacency, t.secret_cohort) for t in terms if t is not None] == [
        (1, None, None, True),
        (4, 8, "replace-special", False),
        (4, 8, "replace-special", False),
        (1, None, "replace-one", False),
    ]
    assert all(t is not None and (t.delta, t.unit) == (1e-5, "client") for t in terms)


def test_local_dp_says_aloud_how_much_noise_it_takes() -> None:
    said = LocalDP(EVENLY, 0.5, 1.0, 1e-5).protection()
    assert "epsilon 1 at delta 1e-05" in said
    assert "noise of 3.73 on every coordinate, 7.46 times the longest whole update" in said


def test_clients_are_sent_the_clipping_and_no_noise_of_the_servers() -> None:
    sent = str(SAMPLES["adaptive tree"].client_half().to_config())
    assert "ClipByQuantile" in sent and "ServerTree" not in sent and "noise_multiplier" not in sent
    assert ClipByNorm(1.0).to_config() in SAMPLES["central"].client_half().to_config()["parts"]

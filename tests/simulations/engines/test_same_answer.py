"""Whoever does the work, the answer is the same: every engine against one client after the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedml_core import Task, Training
from server import EvaluationPlan, EveryClient, FixedSampling, History
from simulations import Engine, Faults, Fused, Processes, QuantitySkew, Sequential, Tuned, Vectorised, simulate
from strategies import FedAdam, FedAvg, FedMedian, FedProx, Scaffold, Strategy
from tests.simulations.engines.engine_cases import points

CLIENTS, FEATURES, CLASSES = 12, 5, 3
WHOLE = 1_000  # more than there are clients
STRATEGIES = [FedAvg(), FedProx(mu=0.1), FedAdam(), FedMedian(), Scaffold(population=CLIENTS)]
IN_ONE_PROCESS = [kind(clients_at_once=size) for kind in (Vectorised, Fused) for size in (1, 3, WHOLE)]
SET_UP = [Tuned(threads=1, keep_freed_memory=True, inner=inner) for inner in (Sequential(), *IN_ONE_PROCESS[1::3])]
IN_WORKERS = [
    Processes(workers=workers, inner=inner)
    for workers in (1, 2)
    for inner in (Sequential(), Vectorised(clients_at_once=3), Fused(clients_at_once=3))
]


def task_of(model: Callable[[], nn.Module]) -> Task:
    return Task.classification(
        model=model,
        classes=CLASSES,
        train_data=lambda: points(180, 1, FEATURES),
        test_data=lambda: points(40, 2, FEATURES),
    )


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def run(engine: Engine, strategy: Strategy, model: Callable[[], nn.Module] = dense, **changes: Any) -> History:
    common: dict[str, Any] = {
        "clients": CLIENTS,
        "rounds": 2,
        "partition": QuantitySkew(1.0),
        "holdout": 0.2,
        "sampling": FixedSampling(9),
        "training": Training(batch_size=7),
        "evaluation": EvaluationPlan(clients=EveryClient()),
        "faults": Faults(drop=0.1, nan=0.1),
        "seed": 4,
    }
    return simulate(task_of(model), strategy, engine=engine, **{**common, **changes})


def assert_same(one: History, other: History) -> None:
    # Each parameter may differ by float32 rounding of sums in another order, relative to the largest of them.
    largest = float(one.parameters.abs().max())
    torch.testing.assert_close(other.parameters, one.parameters, rtol=1e-5, atol=1e-5 * largest)
    for a, b in zip(one.reports, other.reports, strict=True):
        assert (a.participants, a.missing, a.bytes_down) == (b.participants, b.missing, b.bytes_down)
        assert [(row.client, row.rule) for row in a.excluded] == [(row.client, row.rule) for row in b.excluded]
        assert a.metrics.keys() == b.metrics.keys()
        for place in a.metrics:
            assert dict(b.metrics[place]) == pytest.approx(dict(a.metrics[place]), rel=1e-4)


def named(value: Any) -> str:
    if isinstance(value, Processes):
        return f"{value.workers}-workers-{value.inner.name}"
    if isinstance(value, Tuned):
        return f"{value.name}-{named(value.inner)}"
    if isinstance(value, Fused | Vectorised):
        return f"{value.name}-{value.clients_at_once}"
    return type(value).__name__


@pytest.fixture(scope="module")
def expected() -> Mapping[str, History]:
    torch.set_num_threads(1)
    return {type(strategy).__name__: run(Sequential(), strategy) for strategy in STRATEGIES}


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return what engines said: one that quietly went on client by client would pass any comparison."""
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=named)
@pytest.mark.parametrize("engine", [*IN_ONE_PROCESS, *SET_UP], ids=named)
def test_clients_side_by_side_give_the_answer_of_one_after_the_other(
    engine: Engine, strategy: Strategy, expected: Mapping[str, History], told: Callable[[], list[str]]
) -> None:
    assert_same(expected[type(strategy).__name__], run(engine, strategy))
    assert told() == []


@pytest.mark.parametrize("strategy", [FedAvg(), FedMedian(), Scaffold(population=CLIENTS)], ids=named)
@pytest.mark.parametrize("engine", IN_WORKERS, ids=named)
def test_workers_with_any_engine_inside_give_the_answer_of_one_process(
    engine: Engine, strategy: Strategy, expected: Mapping[str, History], told: Callable[[], list[str]]
) -> None:
    assert_same(expected[type(strategy).__name__], run(engine, strategy))
    assert told() == []


def test_an_answer_that_differs_would_be_noticed(expected: Mapping[str, History]) -> None:
    with pytest.raises(AssertionError):
        assert_same(
            expected["FedAvg"], run(Sequential(), FedAvg(), training=Training(batch_size=7, learning_rate=0.101))
        )


def stack(widths: list[int], activation: type[nn.Module], dropout: bool) -> nn.Module:
    sizes = [FEATURES, *widths]
    parts: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        parts += [nn.Linear(before, after), activation()]
        if dropout:
            parts.append(nn.Dropout(0.3))
    return nn.Sequential(*parts, nn.Linear(sizes[-1], CLASSES))


@settings(max_examples=12)
@given(
    widths=st.lists(st.integers(1, 9), max_size=2),
    activation=st.sampled_from([nn.ReLU, nn.Tanh, nn.GELU, nn.Sigmoid]),
    dropout=st.booleans(),
    batch_size=st.integers(1, 12),
    epochs=st.integers(1, 2),
    together=st.integers(1, CLIENTS),
)
def test_random_models_train_to_the_same_answer_on_every_engine(
    widths: list[int], activation: type[nn.Module], dropout: bool, batch_size: int, epochs: int, together: int
) -> None:
    training = Training(batch_size=batch_size, epochs=epochs)
    once = partial(
        run, strategy=FedAvg(), model=lambda: stack(widths, activation, dropout), training=training, rounds=1
    )
    one_by_one = once(Sequential())
    for engine in (Vectorised(clients_at_once=together), Fused(clients_at_once=together)):
        assert_same(one_by_one, once(engine))

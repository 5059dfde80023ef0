"""Captured steps: the same answer by replay, on a tape that runs anywhere; and no step for which a host must wait."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedml_core import Examples, Task, Training
from server import EvaluationPlan, FixedSampling, History
from simulations import Engine, Iid, QuantitySkew, Sequential, Vectorised, simulate
from simulations.engines import vmap_trainer
from simulations.engines.step_graphs import StepGraphs, repeats
from strategies import FedAvg, FedProx, Strategy
from tests.simulations.engines.op_tape import OpTape, Waits

CLIENTS = 8
PLAIN: dict[str, Any] = {"batch_size": 5, "learning_rate": 0.1}


def points(count: int) -> Examples:
    drawn = torch.randn(count, 4, generator=torch.Generator().manual_seed(1))
    return Examples.of(drawn, (drawn[:, 0] > 0).long(), weights=torch.linspace(0.5, 2, count))


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Softplus(), nn.LayerNorm(6), nn.Linear(6, 2))


class Counting(nn.Module):
    """Gives each forward pass a number, and changes by it: what no graph repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.passes = nn.Linear(4, 2), 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        out: Tensor = self.layer(x) / self.passes
        return out


def run(
    engine: Engine, model: Callable[[], nn.Module] = dense, strategy: Strategy | None = None, **settings: Any
) -> History:
    task = Task.classification(model=model, classes=2, train_data=lambda: points(160))
    given = {"training": Training(**PLAIN), "partition": QuantitySkew(2.0), "rounds": 4, **settings}
    return simulate(
        task, strategy or FedAvg(), clients=CLIENTS, evaluation=EvaluationPlan(every=0), engine=engine, **given
    )


def same(one: History, other: History) -> None:
    torch.testing.assert_close(one.parameters, other.parameters, rtol=1e-5, atol=1e-6)
    for a, b in zip(one.reports, other.reports, strict=True):
        assert dict(a.metrics["train"]) == pytest.approx(dict(b.metrics["train"]), rel=1e-5)


@pytest.fixture
def on_tape(monkeypatch: pytest.MonkeyPatch) -> Callable[..., OpTape]:
    def use(fail: Exception | None = None) -> OpTape:
        tape = OpTape(fail)
        made = classmethod(lambda cls, device, module: cls(tape, module))
        monkeypatch.setattr(StepGraphs, "on", made)
        return tape

    return use


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"partition": Iid()},
        {"training": Training(**PLAIN, epochs=2)},
        {"training": Training(**PLAIN, optimizer_arguments={"weight_decay": 0.1})},
        {"training": Training(**PLAIN, max_gradient_norm=0.05)},
        {"training": Training(**{**PLAIN, "batch_size": 3}, steps=4)},
        {"training": Training(**PLAIN, epochs=3, learning_rate_decay=0.5)},
        {"sampling": FixedSampling(5)},
    ],
    ids=str,
)
@pytest.mark.parametrize("at_once", [3, CLIENTS])
def test_replayed_steps_give_the_answer_of_clients_one_by_one(
    settings: dict[str, Any], at_once: int, on_tape: Callable[..., OpTape]
) -> None:
    expected = run(Sequential(), **settings)
    tape = on_tape()
    same(expected, run(Vectorised(clients_at_once=at_once), **settings))
    assert tape.recorded >= 1 and tape.replayed > tape.recorded and tape.warmed >= tape.recorded


def test_a_shape_is_warmed_up_once_recorded_once_and_then_only_replayed(on_tape: Callable[..., OpTape]) -> None:
    tape = on_tape()
    run(Vectorised(clients_at_once=CLIENTS), partition=Iid(), rounds=6)
    # 20 examples each: four steps a round, all of one shape.
    assert (tape.warmed, tape.recorded, tape.replayed) == (1, 1, 6 * 4 - 1)


def test_graphs_do_not_outlive_the_weights_that_they_were_recorded_on(on_tape: Callable[..., OpTape]) -> None:
    tape, sizes = on_tape(), iter((2, 5, 8))

    class Growing(FixedSampling):
        def cohort(self, clients: Any, round_number: int, seed: int) -> list[int]:
            return list(range((0, 2, 5, 8)[min(round_number, 3)]))

    settings: dict[str, Any] = {"sampling": Growing(2), "partition": Iid(), "rounds": 5}
    found = run(Vectorised(clients_at_once=CLIENTS), **settings)
    same(run(Sequential(), **settings), found)
    assert tape.recorded == len(list(sizes))


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 2))


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))


@pytest.mark.parametrize(
    ("model", "strategy", "training"),
    [
        (dropping, FedAvg(), PLAIN),
        (normalised, FedAvg(), PLAIN),
        (dense, FedProx(mu=0.1), PLAIN),
        (dense, FedAvg(), {**PLAIN, "optimizer_arguments": {"momentum": 0.9}}),
        (dense, FedAvg(), {**PLAIN, "optimizer": "adam", "learning_rate": 0.01}),
    ],
    ids=["dropout", "BatchNorm", "guide", "momentum", "Adam"],
)
def test_what_a_graph_would_not_repeat_is_not_recorded(
    model: Callable[[], nn.Module], strategy: Strategy, training: dict[str, Any], on_tape: Callable[..., OpTape]
) -> None:
    settings: dict[str, Any] = {"training": Training(**training), "strategy": strategy, "partition": Iid()}
    expected = run(Sequential(), model, **settings)
    tape = on_tape()
    same(expected, run(Vectorised(clients_at_once=CLIENTS), model, **settings))
    assert (tape.warmed, tape.recorded) == (0, 0)


def test_a_model_that_changes_with_its_passes_is_noticed_before_it_is_recorded(on_tape: Callable[..., OpTape]) -> None:
    tape = on_tape()
    run(Vectorised(clients_at_once=CLIENTS), Counting, rounds=3)
    assert (tape.warmed, tape.recorded) == (1, 0)
    assert repeats(Counting()) and not repeats(dropping()) and not repeats(normalised())
    assert repeats(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)))


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
def test_where_recording_fails_it_is_said_once_and_the_run_goes_on(
    kind: type[Exception], on_tape: Callable[..., OpTape], caplog: pytest.LogCaptureFixture
) -> None:
    expected = run(Sequential())
    tape = on_tape(kind("operation not permitted\nwhen stream is capturing"))
    with caplog.at_level(logging.WARNING):
        same(expected, run(Vectorised(clients_at_once=CLIENTS)))
    assert tape.recorded == 0
    assert [one.getMessage() for one in caplog.records] == [
        f"steps are not captured as a CUDA graph ({kind.__name__}: operation not permitted when stream is capturing)"
    ]


def test_no_more_graphs_are_kept_than_their_memory_is_worth(
    on_tape: Callable[..., OpTape], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simulations.engines.step_graphs._MOST_GRAPHS", 1)
    expected = run(Sequential(), rounds=6)
    tape = on_tape()
    same(expected, run(Vectorised(clients_at_once=CLIENTS), rounds=6))
    assert tape.recorded == 1


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    """Watch the steps of chunks, gathering included, and nothing before or after them."""
    watch, real = Waits(), vmap_trainer._Run.take

    def take(self: Any, *given: Any) -> None:
        with watch:
            real(self, *given)

    monkeypatch.setattr(vmap_trainer._Run, "take", take)
    yield watch


@pytest.mark.parametrize("model", [dense, dropping, normalised], ids=lambda model: str(model.__name__))
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_no_step_has_the_host_wait_for_the_device(model: Callable[[], nn.Module], optimizer: str, waits: Waits) -> None:
    training = Training(**PLAIN, optimizer=optimizer, max_gradient_norm=1.0, epochs=2)
    run(Vectorised(clients_at_once=CLIENTS), model, FedProx(mu=0.1), training=training, rounds=2, partition=Iid())
    assert waits.operations > 100 and waits.seen == []


def test_the_watch_sees_what_it_watches_for() -> None:
    with Waits() as watch:
        values = torch.arange(4.0)
        assert float(values.sum()) == 6
        values[values > 1] = 0
        values.nonzero()
    assert watch.seen[0] == "aten._local_scalar_dense.default" and len(watch.seen) >= 3


def void(_: object) -> None:
    """Return nothing."""


def test_a_tape_repeats_on_the_same_memory_what_it_recorded() -> None:
    tape, given, total, factor = OpTape(), torch.ones(3), torch.zeros(3), [2.0]
    replay = tape.record(lambda: void(total.add_((given * factor[0])[1:].sum())))
    replay()
    given.fill_(10.0)
    factor[0] = 100.0  # a number, and so part of the record
    replay()
    assert total.tolist() == [44.0, 44.0, 44.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, this machine has none")
@pytest.mark.parametrize("training", [PLAIN, {**PLAIN, "max_gradient_norm": 0.05}], ids=str)
def test_on_a_gpu_captured_steps_give_the_answer_of_the_cpu(training: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"training": Training(**training), "rounds": 6}
    expected = run(Sequential(), device="cpu", **settings)
    found = run(Vectorised(clients_at_once=CLIENTS), device="cuda:0", **settings)
    torch.testing.assert_close(found.parameters, expected.parameters, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, this machine has none")
@pytest.mark.parametrize("model", [dense, dropping], ids=lambda model: str(model.__name__))
def test_on_a_gpu_no_step_has_the_host_wait(model: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    real, steps = vmap_trainer._Run.take, list[int]()

    def take(self: Any, *given: Any) -> None:
        steps.append(1)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            real(self, *given)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    monkeypatch.setattr(vmap_trainer._Run, "take", take)
    run(Vectorised(clients_at_once=CLIENTS), model, device="cuda:0")
    assert steps

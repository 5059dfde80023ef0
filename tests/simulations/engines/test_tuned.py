"""A process that is set up for an engine, and left as it was: threads, memory that is kept, and the same answer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fedml_core import Examples, Task, Training, freed_memory
from fedml_core.errors import ConfigError
from server import History
from simulations import Auto, Engine, Fused, Processes, Sequential, Suited, Tuned, Vectorised, simulate
from simulations.engines import tuned
from strategies import FedAvg

KEPT, RESTORED = "kept", "restored"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what was done to the process' memory, on any system, instead of doing it."""
    seen: list[str] = []

    def set_to(settings: object) -> bool:
        seen.append(KEPT if settings is freed_memory._KEEP else RESTORED)
        return True

    monkeypatch.setattr(freed_memory, "_set", set_to)
    monkeypatch.setattr(tuned, "why_not_kept", lambda: None)
    return seen


def points(count: int, seed: int) -> Examples:
    drawn = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return Examples.of(drawn, (drawn[:, 0] > 0).long())


def run(engine: Engine, model: Callable[[], nn.Module] = lambda: nn.Linear(4, 2), **changes: Any) -> History:
    task = Task.classification(model=model, classes=2, train_data=lambda: points(120, 1))
    common: dict[str, Any] = {"clients": 6, "rounds": 2, "training": Training(batch_size=4), "seed": 3}
    return simulate(task, FedAvg(), engine=engine, device="cpu", **{**common, **changes})


def assert_same(one: History, other: History) -> None:
    torch.testing.assert_close(one.parameters, other.parameters, rtol=1e-5, atol=1e-6)


def test_threads_are_left_as_they_were() -> None:
    torch.set_num_threads(2)
    seen: list[int] = []
    engine = Tuned(threads=1, inner=Fused())
    assert_same(run(Sequential()), run(engine, callbacks=[lambda *_: seen.append(torch.get_num_threads())]))
    assert seen == [2, 2] and torch.get_num_threads() == 2


@pytest.mark.parametrize(("asked", "used"), [(1, 1), (9, 2), (None, 2)])
def test_a_client_trains_in_the_threads_that_were_asked_for(asked: int | None, used: int) -> None:
    seen: set[int] = set()

    class Watched(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.add(torch.get_num_threads())
            return super().forward(x)

    torch.set_num_threads(2)
    engine = Tuned(threads=asked, keep_freed_memory=asked is None, inner=Vectorised())
    assert_same(run(Sequential(), rounds=1), run(engine, rounds=1, model=lambda: Watched(4, 2)))
    assert seen == {used}


@pytest.mark.parametrize("inner", [Sequential(), Fused(), Vectorised(), Suited()], ids=lambda engine: engine.name)
def test_memory_is_kept_for_the_run_and_not_longer(inner: Engine, memory: list[str]) -> None:
    engine = Tuned(keep_freed_memory=True, inner=inner)
    seen: list[list[str]] = []
    assert_same(run(Sequential()), run(engine, callbacks=[lambda *_: seen.append(list(memory))]))
    assert seen == [[KEPT], [KEPT]] and memory == [KEPT, RESTORED]


def test_a_run_that_fails_leaves_the_process_as_it_was(memory: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Any:
        raise ConfigError("stop")

    with pytest.raises(ConfigError, match="stop"):
        run(Tuned(keep_freed_memory=True), callbacks=[fail])
    assert memory == [KEPT, RESTORED]
    monkeypatch.setattr(Sequential, "open", fail)
    with pytest.raises(ConfigError, match="stop"):
        run(Tuned(keep_freed_memory=True))
    assert memory == [KEPT, RESTORED] * 2


def test_who_did_not_ask_has_the_memory_that_the_system_gives(memory: list[str]) -> None:
    for engine in (Sequential(), Suited(), Vectorised(), Tuned(threads=1), Processes(workers=1)):
        run(engine, rounds=1)
    assert memory == []


def test_where_memory_cannot_be_kept_the_user_is_told_once_and_the_run_goes_on(
    memory: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tuned, "why_not_kept", lambda: "only Linux with glibc can be told to")
    with caplog.at_level(logging.WARNING):
        found = run(Tuned(keep_freed_memory=True))
    assert_same(run(Sequential()), found)
    said = "freed memory is not kept, which costs nothing but time: only Linux with glibc can be told to"
    assert [record.getMessage() for record in caplog.records] == [said]
    assert memory == []


def test_everything_can_be_named_in_a_run_toml() -> None:
    inner = {"name": "sequential", "memory_layout": "channels_last"}
    table = {"name": "tuned", "threads": 1, "keep_freed_memory": True, "inner": inner}
    engine = Engine.from_config(table, "engine")
    assert engine == Tuned(threads=1, keep_freed_memory=True, inner=Sequential(memory_layout="channels_last"))
    assert Engine.from_config(engine.to_config()) == engine


@pytest.mark.parametrize("inner", [Auto(), Processes(workers=2), Tuned(threads=1)], ids=lambda engine: engine.name)
def test_what_sets_up_its_own_processes_is_refused(inner: Engine) -> None:
    with pytest.raises(ConfigError, match=f"{inner.name} sees to threads and memory itself; give another engine"):
        Tuned(threads=1, inner=inner)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"threads": 0}, "threads must be >= 1, got 0"),
        ({"keep_freed_memory": "yes"}, "keep_freed_memory must be true or false, got 'yes'"),
        ({}, "tuned sets up nothing; give it threads or keep_freed_memory, or say sequential"),
        ({"inner": "fused"}, "tuned sets up nothing; give it threads or keep_freed_memory, or say fused"),
        ({"thread": 1}, "engine: Tuned has no argument 'thread'; did you mean 'threads'?"),
        ({"threads": 1, "inner": {"name": "sequential", "memory_layout": "nhwc"}}, "memory_layout must be one of"),
    ],
)
def test_what_cannot_be_is_one_clear_line(table: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Engine.from_config({"name": "tuned", **table}, "engine")
    assert said in str(caught.value) and "\n" not in str(caught.value)

"""The engine that measures: the same answer, the fastest engine, and what it remembers of its choice."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedml_core import Examples, Task, Training
from fedml_core.errors import ConfigError
from server import FixedSampling, History
from simulations import Auto, Engine, Fused, Processes, Sequential, Vectorised, simulate
from simulations.engines.auto import Timing, Trial, tournament
from simulations.engines.choices import cache_file, recall, remember
from strategies import FedAvg

CLIENTS = 12


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the user's own cache out of every test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fedveil" / "engines.json"


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


def points(count: int, seed: int) -> Examples:
    drawn = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return Examples.of(drawn, (drawn[:, 0] > 0).long())


def run(engine: Engine, model: Callable[[], nn.Module] = lambda: nn.Linear(4, 2), **changes: Any) -> History:
    task = Task.classification(model=model, classes=2, train_data=lambda: points(120, 1))
    common: dict[str, Any] = {"clients": CLIENTS, "rounds": 10, "training": Training(batch_size=4), "seed": 3}
    return simulate(task, FedAvg(), engine=engine, **{**common, **changes})


def assert_same(one: History, other: History) -> None:
    torch.testing.assert_close(one.parameters, other.parameters, rtol=1e-5, atol=1e-6)
    for a, b in zip(one.reports, other.reports, strict=True):
        assert (a.participants, a.missing, a.excluded) == (b.participants, b.missing, b.excluded)


@pytest.mark.parametrize("workers", [1, 2])
def test_measuring_does_not_change_the_answer(workers: int, told: Callable[[], list[str]]) -> None:
    assert_same(run(Sequential()), run(Auto(workers=workers)))
    (line,) = told()
    assert line.startswith("engine: ") and "the fastest here" in line


def test_a_run_that_is_too_short_to_choose_has_the_same_answer(told: Callable[[], list[str]], cache: Path) -> None:
    sampling = FixedSampling(2)
    assert_same(run(Sequential(), rounds=1, sampling=sampling), run(Auto(), rounds=1, sampling=sampling))
    assert told() == [] and not cache.exists()


def test_a_choice_is_remembered_and_not_measured_again(told: Callable[[], list[str]], cache: Path) -> None:
    first = run(Auto(workers=1))
    (choice,) = json.loads(cache.read_text())["choices"].values()
    assert choice["name"] in ("Fused", "Vectorised", "Sequential")
    assert_same(first, run(Auto(workers=1)))
    assert "the fastest for this model and machine before" in told()[-1]


def test_another_model_is_measured_anew(told: Callable[[], list[str]]) -> None:
    run(Auto(workers=1))
    run(Auto(workers=1), model=lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    assert all("the fastest here" in line for line in told())


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"version": 1}', '{"version": 1, "choices": []}', '{"version": 99, "choices": {}}']
)
def test_a_damaged_file_is_as_good_as_none(content: str, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text(content)
    assert recall("key") is None
    remember("key", Fused(clients_at_once=3))
    assert recall("key") == Fused(clients_at_once=3)


def test_an_entry_that_names_no_engine_is_ignored(cache: Path) -> None:
    cache.parent.mkdir()
    entries = {"a": {"name": "Warp"}, "b": {"name": "Fused", "clients_at_once": -1}, "c": 3}
    cache.write_text(json.dumps({"version": 1, "choices": entries}))
    assert [recall(key) for key in entries] == [None, None, None]


def test_nested_engines_are_remembered_whole() -> None:
    engine = Processes(workers=2, inner=Vectorised(clients_at_once=7))
    remember("key", engine)
    assert recall("key") == engine


def test_a_cache_that_cannot_be_written_costs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert_same(run(Sequential()), run(Auto(workers=1)))


def test_the_cache_is_where_the_user_keeps_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_file() == tmp_path / "fedveil" / "engines.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_file().is_relative_to(tmp_path / "home")


CANDIDATES: list[tuple[Engine, int]] = [
    (Fused(clients_at_once=4), 4),
    (Vectorised(clients_at_once=4), 4),
    (Sequential(), 8),
]


def winner(rates: dict[str, float], workers: int, unable: tuple[str, ...] = ()) -> tuple[Engine, list[str]]:
    """Return who wins where each engine is as fast as `rates` says, and who was tried."""
    trials = tournament(CANDIDATES, workers, Sequential(), skip_failures=False)
    tried: list[str] = []
    timing: Timing | None = None
    while True:
        try:
            trial: Trial = next(trials) if timing is None else trials.send(timing)
        except StopIteration as end:
            return end.value, tried
        tried.append(trial.engine.name)
        timing = Timing(trial.engine, rates[trial.engine.name], able=trial.engine.name not in unable)


def test_the_fastest_engine_wins() -> None:
    rates = {"fused": 5.0, "vectorised": 9.0, "sequential": 7.0, "processes": 20.0}
    assert winner(rates, 1)[0] == Sequential()
    assert winner({**rates, "fused": 8.0}, 1) == (Fused(clients_at_once=4), ["fused", "fused"] + ["sequential"] * 2)


def test_an_engine_that_gives_up_cannot_win() -> None:
    rates = {"fused": 50.0, "vectorised": 9.0, "sequential": 7.0, "processes": 20.0}
    assert winner(rates, 1, unable=("fused",))[0] == Vectorised(clients_at_once=4)
    assert winner(rates, 1, unable=("fused", "vectorised"))[0] == Sequential()
    assert winner({**rates, "processes": 500.0}, 2, unable=("processes",))[0] == Fused(clients_at_once=4)


def test_workers_must_be_clearly_faster() -> None:
    rates = {"fused": 10.0, "vectorised": 1.0, "sequential": 1.0}
    assert winner({**rates, "processes": 10.5}, 2)[0] == Fused(clients_at_once=4)
    assert winner({**rates, "processes": 15.0}, 2)[0] == Processes(workers=2, inner=Fused(clients_at_once=4))


def test_it_can_be_named_and_stands_inside_workers() -> None:
    assert Engine.from_config({"name": "auto"}) == Auto()
    shared = Engine.from_config({"name": "processes", "workers": 2, "inner": {"name": "auto"}})
    assert_same(run(Sequential(), rounds=2), run(shared, rounds=2))


def test_impossible_workers_are_refused() -> None:
    with pytest.raises(ConfigError, match="workers must be >= 1, got 0"):
        Auto(workers=0)

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
from simulations.engines import choices
from simulations.engines.batched import Batched
from simulations.engines.choices import cache_file, code_version, recall, remember
from simulations.engines.threaded import Threaded
from simulations.engines.tournament import Match, Timing, Trial, tournament
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
    common: dict[str, Any] = {"clients": CLIENTS, "rounds": 30, "training": Training(batch_size=4), "seed": 3}
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


@pytest.mark.parametrize("changed", ["torch", "processors", "threads", "engines"])
def test_a_choice_is_forgotten_with_what_it_was_made_for(
    changed: str, told: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(Auto(workers=1))
    if changed == "torch":
        monkeypatch.setattr(torch, "__version__", "99.0")
    elif changed == "processors":
        monkeypatch.setattr(choices, "available_processors", lambda: 99)
    elif changed == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    else:
        monkeypatch.setattr(choices, "code_version", lambda: "another")
    run(Auto(workers=1))
    assert len(told()) == 2 and all("the fastest here" in line for line in told())


def test_the_version_of_the_code_is_that_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = code_version()
    for package in ("one", "two"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "engine.py").write_text("fast = 1")
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path / package)
    monkeypatch.setattr(choices, "_DECIDING", ("one", "two"))
    versions = [ours, code_version.__wrapped__()]
    (tmp_path / "two" / "engine.py").write_text("fast = 2")
    versions.append(code_version.__wrapped__())
    assert len(set(versions)) == 3


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


def fused(size: int) -> Fused:
    return Fused(clients_at_once=size)


def vectorised(size: int) -> Vectorised:
    return Vectorised(clients_at_once=size)


LADDERS: list[list[Batched]] = [[fused(4), fused(16), fused(64)], [vectorised(4), vectorised(16)]]


def winner(
    rates: Callable[[Engine], float],
    *,
    unable: tuple[str, ...] = (),
    fits: int = 1_000,
    seconds: float = 1.0,
    **match: Any,
) -> tuple[Engine, list[Trial]]:
    """Return who wins where engines are as fast as `rates` says and `fits` clients fit the memory, and all trials."""
    trials = tournament(Match(**{"ladders": LADDERS, "plain": Sequential(), "cohort": 100, **match}))
    tried: list[Trial] = []
    timing: Timing | None = None
    while True:
        try:
            tried.append(next(trials) if timing is None else trials.send(timing))
        except StopIteration as end:
            return end.value, tried
        engine = tried[-1].engine
        crowded = isinstance(engine, Batched) and (engine.clients_at_once or 0) > fits
        able = engine.name not in unable and not crowded
        timing = Timing(engine, rates(engine), seconds, able=able, crowded=crowded)


def by_name(**rates: float) -> Callable[[Engine], float]:
    return lambda engine: rates.get(engine.name, 0.0)


def test_the_fastest_engine_wins() -> None:
    assert winner(by_name(fused=5, sequential=7))[0] == Sequential()
    assert winner(by_name(fused=8, sequential=7))[0] == fused(4)


def test_more_clients_at_once_are_tried_as_long_as_they_are_faster() -> None:
    def rate(engine: Any) -> float:
        return {fused(4): 10.0, fused(16): 12.0, fused(64): 11.0}.get(engine, 1.0)

    best, tried = winner(rate)
    assert best == fused(16)
    assert [trial.size for trial in tried if trial.engine.name == "fused"] == [4, 4, 16, 16, 64, 64]
    best, tried = winner(by_name(fused=9))
    assert best == fused(4) and fused(64) not in [trial.engine for trial in tried]


def test_what_is_written_by_hand_beats_what_is_not() -> None:
    _, tried = winner(by_name(fused=5, vectorised=50))
    assert "vectorised" not in [trial.engine.name for trial in tried]


def test_an_engine_that_gives_up_cannot_win() -> None:
    rates = by_name(fused=50, vectorised=9, sequential=7, processes=20)
    assert winner(rates, unable=("fused",))[0] == vectorised(4)
    assert winner(rates, unable=("fused", "vectorised"))[0] == Sequential()
    assert winner(rates, unable=("fused", "processes"), workers=2)[0] == vectorised(4)
    assert winner(by_name(), unable=("fused", "vectorised"), workers=2, threads=2)[0] == Sequential()


@pytest.mark.parametrize(("fits", "chosen"), [(1_000, 64), (63, 16), (15, 4), (3, 2), (1, 1)])
def test_as_many_clients_at_once_as_fit_the_memory(fits: int, chosen: int) -> None:
    rates: Callable[[Engine], float] = lambda engine: getattr(engine, "clients_at_once", 0.5)  # noqa: E731
    assert winner(rates, fits=fits, ladders=LADDERS[:1])[0] == fused(chosen)


def test_where_not_even_one_client_fits_at_once_they_train_one_by_one() -> None:
    assert winner(by_name(fused=9, vectorised=9, sequential=1), fits=0)[0] == Sequential()


def test_workers_must_be_clearly_faster() -> None:
    assert winner(by_name(fused=10, processes=10.5), workers=2)[0] == fused(4)
    assert winner(by_name(fused=10, processes=15), workers=2)[0] == Processes(workers=2, inner=fused(4))


def test_one_thread_is_chosen_unless_all_are_faster() -> None:
    assert winner(by_name(fused=10, threaded=9.9), threads=2)[0] == Threaded(inner=fused(4))
    assert winner(by_name(fused=10, threaded=9), threads=2)[0] == fused(4)
    assert winner(by_name(sequential=10, threaded=5), threads=2, ladders=[])[0] == Sequential()
    several = winner(by_name(fused=10, threaded=12, processes=20), threads=2, workers=2)[0]
    assert several == Processes(workers=2, inner=fused(4))


def test_what_is_over_at_once_is_measured_again() -> None:
    assert len(winner(by_name(sequential=1), ladders=[], threads=2, seconds=1.0)[1]) == 4
    assert len(winner(by_name(sequential=1), ladders=[], threads=2, seconds=0.01)[1]) == 8


def test_where_there_is_no_choice_nothing_is_measured() -> None:
    assert winner(by_name(), ladders=[]) == (Sequential(), [])


def test_it_can_be_named_and_stands_inside_workers() -> None:
    assert Engine.from_config({"name": "auto"}) == Auto()
    shared = Engine.from_config({"name": "processes", "workers": 2, "inner": {"name": "auto"}})
    assert_same(run(Sequential(), rounds=2), run(shared, rounds=2))


def test_impossible_workers_are_refused() -> None:
    with pytest.raises(ConfigError, match="workers must be >= 1, got 0"):
        Auto(workers=0)


def test_threads_are_left_as_they_were() -> None:
    torch.set_num_threads(2)
    seen: list[int] = []
    engine = Threaded(threads=1, inner=Fused())
    expected = run(Sequential(), rounds=2)
    assert_same(expected, run(engine, rounds=2, callbacks=[lambda *_: seen.append(torch.get_num_threads())]))
    assert seen == [2, 2] and torch.get_num_threads() == 2


def test_a_client_trains_in_the_threads_that_were_asked_for() -> None:
    seen: set[int] = set()

    class Watched(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.add(torch.get_num_threads())
            return super().forward(x)

    torch.set_num_threads(2)
    engine = Threaded(threads=1, inner=Vectorised())
    assert_same(run(Sequential(), rounds=1), run(engine, rounds=1, model=lambda: Watched(4, 2)))
    assert seen == {1}


@pytest.mark.parametrize("inner", [Auto(), Processes(workers=2), Threaded()], ids=lambda engine: engine.name)
def test_what_has_threads_of_its_own_gets_no_others(inner: Engine) -> None:
    with pytest.raises(ConfigError, match=f"the threads of {inner.name} are its own business"):
        Threaded(inner=inner)
    with pytest.raises(ConfigError, match="threads must be >= 1, got 0"):
        Threaded(threads=0)

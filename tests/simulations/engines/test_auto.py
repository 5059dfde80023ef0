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

from fedml_core import Examples, Task, Training, freed_memory
from fedml_core.errors import ConfigError
from fedml_core.freed_memory import why_not_kept
from server import FixedSampling, History
from simulations import Auto, Engine, Fused, Processes, Sequential, Tuned, Vectorised, simulate
from simulations.engines import auto, choices
from simulations.engines.choices import cache_file, code_version, recall, remember
from simulations.engines.tournament import Match, Trial, tournament
from strategies import FedAvg
from tests.clients.layout_cases import ResNet, Viewing, images

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
    assert choice["name"] in ("Fused", "Vectorised", "Sequential", "Tuned")
    assert_same(first, run(Auto(workers=1)))
    assert "the fastest for this model and machine before" in told()[-1]


@pytest.mark.parametrize("changed", ["torch", "processors", "threads", "memory", "engines"])
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
    elif changed == "memory":
        kept = why_not_kept() is None
        monkeypatch.setattr("simulations.engines.choices.why_not_kept", lambda: "it cannot" if kept else None)
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
    "content", ["", "{", "[]", '{"version": 1}', '{"version": 2, "choices": []}', '{"version": 99, "choices": {}}']
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
    cache.write_text(json.dumps({"version": 2, "choices": entries}))
    assert [recall(key) for key in entries] == [None, None, None]


@pytest.mark.parametrize(
    "engine",
    [
        Processes(workers=2, inner=Vectorised(clients_at_once=7)),
        Tuned(threads=1, keep_freed_memory=True, inner=Sequential(memory_layout="contiguous")),
    ],
    ids=lambda engine: engine.name,
)
def test_nested_engines_are_remembered_whole(engine: Engine) -> None:
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


def test_it_can_be_named_and_stands_inside_workers() -> None:
    assert Engine.from_config({"name": "auto"}) == Auto()
    shared = Engine.from_config({"name": "processes", "workers": 2, "inner": {"name": "auto"}})
    assert_same(run(Sequential(), rounds=2), run(shared, rounds=2))


def test_impossible_workers_are_refused() -> None:
    with pytest.raises(ConfigError, match="workers must be >= 1, got 0"):
        Auto(workers=0)


def match_of(monkeypatch: pytest.MonkeyPatch, task: Task) -> Match:
    """Return who took part in a run."""
    seen: list[Match] = []

    def rules(match: Match) -> Any:
        seen.append(match)
        return tournament(match)

    with monkeypatch.context() as patched:
        patched.setattr(auto, "tournament", rules)
        simulate(task, FedAvg(), engine=Auto(workers=1), clients=2, rounds=1, seed=3, device="cpu")
    return seen[0]


def test_layouts_are_measured_where_the_model_would_be_rearranged(monkeypatch: pytest.MonkeyPatch) -> None:
    convolutional = Task.classification(model=ResNet, classes=3, train_data=lambda: images(20))
    dense = Task.classification(model=lambda: nn.Linear(4, 2), classes=2, train_data=lambda: points(20, 1))
    assert match_of(monkeypatch, convolutional).layouts == ("contiguous",)
    assert match_of(monkeypatch, dense).layouts == ()


def test_kept_memory_is_measured_where_the_system_can(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task.classification(model=lambda: nn.Linear(4, 2), classes=2, train_data=lambda: points(20, 1))
    for why_not, keeps in ((None, True), ("it cannot", False)):
        monkeypatch.setattr(auto, "why_not_kept", lambda why_not=why_not: why_not)
        assert match_of(monkeypatch, task).keeps == keeps


def test_memory_is_kept_only_while_that_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, plain = Tuned(keep_freed_memory=True), Sequential()
    done: list[str] = []

    def set_to(settings: object) -> bool:
        done.append("kept" if settings is freed_memory._KEEP else "restored")
        return True

    monkeypatch.setattr(freed_memory, "_set", set_to)
    monkeypatch.setattr("simulations.engines.tuned.why_not_kept", lambda: None)

    def rules(match: Match) -> Any:
        for engine in (kept, kept, plain, kept, plain):
            done.append(engine.name)
            yield Trial(engine, 4)
        return plain

    monkeypatch.setattr(auto, "tournament", rules)
    found = run(Auto(workers=1), rounds=2)
    assert done == ["tuned", "kept", "tuned", "sequential", "restored", "tuned", "kept", "sequential", "restored"]
    assert_same(run(Sequential(), rounds=2), found)


@pytest.mark.parametrize("model", [ResNet, Viewing])
def test_trials_of_layouts_do_not_change_the_answer(
    model: Callable[[], nn.Module], told: Callable[[], list[str]]
) -> None:
    task = Task.classification(model=model, classes=3, train_data=lambda: images(60))
    common: dict[str, Any] = {"clients": 12, "rounds": 24, "training": Training(batch_size=5), "seed": 3}
    histories = [
        simulate(task, FedAvg(), engine=engine, device="cpu", **common) for engine in (Sequential(), Auto(workers=1))
    ]
    largest = float(histories[0].parameters.abs().max())
    torch.testing.assert_close(histories[1].parameters, histories[0].parameters, rtol=1e-5, atol=1e-5 * largest)
    (choice,) = [line for line in told() if line.startswith("engine: ")]
    assert "sequential" in choice and "sequential in contiguous layout" in choice
    given_up = [line for line in told() if "keeps the default layout" in line]
    assert len(given_up) == (2 if model is Viewing else 0)  # once a run

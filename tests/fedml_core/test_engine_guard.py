"""Flower calls nobody, and a Flower that we do not know is refused."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError

import pytest

from fedml_core import engine_guard
from fedml_core.errors import ConfigError


def test_the_switches_override_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in engine_guard.FLOWER_SWITCHES:
        monkeypatch.setenv(name, "something else")
    engine_guard.guard_engine()
    assert {name: os.environ[name] for name in engine_guard.FLOWER_SWITCHES} == {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }


@pytest.mark.parametrize("installed", ["1.40.0", "1.42.0", "1.410", "2.0", "1.4"])
def test_another_version_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    monkeypatch.setattr(engine_guard, "version", lambda _: installed)
    with pytest.raises(ConfigError, match=f"flwr {installed} is installed, .* needs flwr 1.41.*; install flwr==1.41"):
        engine_guard.guard_engine()


def test_a_missing_flower_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(engine_guard, "version", missing)
    with pytest.raises(ConfigError, match="flwr is not installed; install flwr==1.41"):
        engine_guard.guard_engine()

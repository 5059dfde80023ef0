"""What can be named in a run.toml: every family of named objects, with arguments and the first line of its manual."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedml_core.errors import ConfigError
from fedml_core.named import nearest
from fedml_core.transform import Transform
from fedml_core.weighting import Weighting
from server.configure import import_strategies
from server.sampling import Sampling
from simulations.engines import Engine
from simulations.fleet_availability import Availability
from simulations.fleet_spread import Spread
from simulations.partition import Partitioner
from simulations.sources import Source
from strategies.schedules import Schedule
from strategies.strategy import Strategy

REQUIRED = "required"


@dataclass(frozen=True)
class Entry:
    """One thing that can be named. `arguments`: by name, the default as text, or "required"."""

    name: str
    arguments: Mapping[str, str]
    about: str

    @property
    def call(self) -> str:
        """Return the name and its arguments in one line."""
        required = [name for name, default in self.arguments.items() if default == REQUIRED]
        optional = [f"{name} = {default}" for name, default in self.arguments.items() if default != REQUIRED]
        return f"{self.name}({', '.join([*required, *optional])})"


def catalogue(kind: str | None = None) -> dict[str, list[Entry]]:
    """Return the entries of one kind, or of all.

    Raises: ConfigError: for an unknown kind; the nearest is offered.
    """
    import_strategies()
    kinds: dict[str, Mapping[str, type[Any]]] = {
        "strategies": Strategy.members,
        "partitioners": Partitioner.members,
        "samplings": Sampling.members,
        "sources": Source.members,
        "weightings": Weighting.members,
        "schedules": Schedule.members,
        "transforms": Transform.members,
        "spreads": Spread.members,
        "availabilities": Availability.members,
        "engines": {engine.name: engine for engine in Engine.members.values()},  # as reports name them
    }
    if kind is not None and kind not in kinds:
        raise ConfigError(f"there is no kind {kind!r}; {nearest(kind, kinds)}")
    wanted = kinds if kind is None else {kind: kinds[kind]}
    return {
        title: [_entry(name, member) for name, member in sorted(members.items()) if _can_be_made(member)]
        for title, members in wanted.items()
    }


def _can_be_made(member: type[Any]) -> bool:
    return dataclasses.is_dataclass(member) and not inspect.isabstract(member)


def _entry(name: str, member: Any) -> Entry:
    arguments = {field.name: _default(field) for field in dataclasses.fields(member) if field.init}
    about = (inspect.getdoc(member) or "").split("\n\n")[0].replace("\n", " ")
    return Entry(name, arguments, about)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return _shown(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return _shown(field.default_factory())
    return REQUIRED


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return f'"{value}"' if isinstance(value, str) else str(value)

"""Frozen dataclasses that travel as a name and numbers: transforms, weightings, schedules, strategies, samplings.

Both sides have the classes installed; what crosses the wire, stands in a TOML file or rests in a checkpoint is
`{"name": "Proximal", "mu": 0.01}` and nothing that can be executed. A class joins its family by subclassing it.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self

from fedml_core.errors import ConfigError

_OURS = ("fedml_core", "strategies", "clients", "server", "simulations")


class Named:
    """The base of every family of named objects.

    A family is a direct subclass of `Named`; each of its concrete subclasses, the user's own included, is registered
    under its class name when it is defined. A user's class may not take the name of one of ours.
    """

    family: ClassVar[str] = ""
    members: ClassVar[dict[str, type[Any]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register the class in its family, or start a family."""
        super().__init_subclass__(**kwargs)
        if Named in cls.__bases__:
            cls.family, cls.members = cls.__name__.lower(), {}
            return
        known = cls.members.get(cls.__name__)
        ours = known is not None and known.__module__.split(".")[0] in _OURS
        if ours and known is not None and known.__module__ != cls.__module__:
            raise ConfigError(
                f"{cls.family} {cls.__name__} in {cls.__module__} takes the name of fedveil's own; rename it"
            )
        if not cls.__name__.startswith("_"):
            cls.members[cls.__name__] = cls

    def to_config(self) -> dict[str, Any]:
        """Return the name and the fields that make an equal object.

        Raises: ConfigError: if a field holds something that is not a number, text, list or named object.
        """
        own: Any = self
        if not dataclasses.is_dataclass(own):
            raise ConfigError(f"{type(self).__name__} must be a frozen dataclass to be named, sent or saved")
        fields = {
            f.name: _plain(getattr(self, f.name), type(self).__name__, f.name)
            for f in dataclasses.fields(own)
            if f.init
        }
        return {"name": type(self).__name__, **fields}

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | str, where: str = "") -> Self:
        """Return the member of this family that `config` names; a bare string is a name without arguments.

        Raises: ConfigError: for an unknown name or argument (the nearest are offered), or a value that is refused.
        """
        table: dict[str, Any] = {"name": config} if isinstance(config, str) else dict(config)
        prefix = f"{where}: " if where else ""
        name = table.pop("name", None)
        member = cls.member(name) if isinstance(name, str) else None
        if member is None:
            raise ConfigError(f"{prefix}unknown {cls.family} {name!r}; {nearest(str(name), cls.members)}")
        return typing.cast(Self, construct(member, table, prefix))

    @classmethod
    def member(cls, name: str) -> type[Any] | None:
        """Return the member called `name`, in any case and with or without dashes: `quantity-skew` is QuantitySkew."""
        if name in cls.members:
            return cls.members[name]
        return {_folded(known): member for known, member in cls.members.items()}.get(_folded(name))


def construct(member: Callable[..., Any], table: Mapping[str, Any], prefix: str = "") -> Any:
    """Return `member(**table)` where `member` is a dataclass; nested named objects are built from their tables."""
    name = getattr(member, "__name__", str(member))
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, member)) if f.init}
    for key in table:
        if key not in fields:
            raise ConfigError(f"{prefix}{name} has no argument {key!r}; {nearest(key, fields)}")
    for key, field in fields.items():
        if key not in table and field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{prefix}{name} needs {key}; add it")
    hints = typing.get_type_hints(member)
    arguments = {key: _built(value, hints.get(key), f"{prefix}{name}.{key}") for key, value in table.items()}
    try:
        return member(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{prefix}{name}: {error}") from error


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `did you mean 'a' or 'b'?`, or the list of what is known, for the end of an error line."""
    names = sorted(known)
    folded = {_folded(name): name for name in names}
    close = [folded[match] for match in difflib.get_close_matches(_folded(word), folded, n=3, cutoff=0.55)]
    if close:
        return f"did you mean {' or '.join(repr(name) for name in close)}?"
    return f"known: {', '.join(names) or 'none'}"


def _folded(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _plain(value: Any, owner: str, field: str) -> Any:
    if isinstance(value, Named):
        return value.to_config()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [_plain(item, owner, field) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item, owner, field) for key, item in value.items()}
    raise ConfigError(
        f"{owner}.{field} is a {type(value).__name__}, which cannot be sent by name; define a named class instead"
    )


def _families(hint: Any) -> list[type[Named]]:
    if isinstance(hint, type) and issubclass(hint, Named):
        return [hint]
    return [family for part in typing.get_args(hint) for family in _families(part)]


def _built(value: Any, hint: Any, where: str) -> Any:
    families = _families(hint)
    if families and isinstance(value, Mapping):
        return families[0].from_config(value, where)
    if families and isinstance(value, str) and str not in typing.get_args(hint):
        return families[0].from_config(value, where)
    if isinstance(value, list):
        return tuple(_built(item, hint, f"{where}[{index}]") for index, item in enumerate(value))
    return value

"""Frozen dataclasses that travel as a name and numbers: transforms, weightings, strategies, partitioners, ...

Both sides have the classes installed; what crosses the wire, stands in a TOML file or rests in a checkpoint is
`{"name": "Proximal", "mu": 0.01}` and nothing that can be executed. A class joins its family by subclassing it.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

from fedml_core.errors import ConfigError, StrategyError

_SHOWN = 80
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
        prefix = f"{where}: " if where else ""
        if not isinstance(config, str | Mapping):
            wanted = 'a name, or a table with one such as {name = "..."}'
            raise ConfigError(f"{prefix}the {cls.family} must be {wanted}, got {_shown(config)}")
        table: dict[str, Any] = {"name": config} if isinstance(config, str) else dict(config)
        name = table.pop("name", None)
        if not isinstance(name, str):
            raise ConfigError(
                f"{prefix}the {cls.family} needs a name, got {_shown(name)}; {nearest('', cls._concrete())}"
            )
        member = cls.member(name)
        if member is None:
            offer = nearest(name, cls._concrete(), lambda known: _spelled_like(name, known))
            raise ConfigError(f"{prefix}unknown {cls.family} {_shown(name)}; {offer}")
        return typing.cast(Self, construct(member, table, prefix))

    @classmethod
    def member(cls, name: str) -> type[Any] | None:
        """Return the member called `name`, in any case and with or without dashes: `quantity-skew` is QuantitySkew."""
        concrete = cls._concrete()
        if name in concrete:
            return concrete[name]
        return {_folded(known): member for known, member in concrete.items()}.get(_folded(name))

    @classmethod
    def _concrete(cls) -> dict[str, type[Any]]:
        # Whether a class is abstract is not known yet when it is registered.
        return {name: member for name, member in cls.members.items() if not inspect.isabstract(member)}


def construct(member: Callable[..., Any], table: Mapping[str, Any], prefix: str = "") -> Any:
    """Return `member(**table)` where `member` is a dataclass; nested named objects are built from their tables.

    Raises: ConfigError: for an argument that is unknown (the nearest is offered), missing or of a wrong kind, and for
        a class that cannot be made from a table. Where `prefix` says what the table is for, every error begins with it.
    """
    name = getattr(member, "__name__", str(member))
    if not dataclasses.is_dataclass(member):
        raise ConfigError(f"{prefix}{name} must be a frozen dataclass to be named in a file or a message")
    fields = {f.name: f for f in dataclasses.fields(member) if f.init}
    for key in table:
        if key not in fields:
            offer = nearest(str(key), fields) if fields else "it takes none"
            raise ConfigError(f"{prefix}{name} has no argument {_shown(key)}; {offer}")
    for key, field in fields.items():
        if key not in table and field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{prefix}{name} needs {key}; add it")
    try:
        hints = typing.get_type_hints(member)
    except NameError as error:
        raise ConfigError(f"{prefix}{name}: an annotation cannot be read ({error}); import what it names") from error
    arguments = {key: _built(value, hints.get(key), f"{prefix}{name}.{key}") for key, value in table.items()}
    try:
        return member(**arguments)
    except (ConfigError, StrategyError) as error:
        raise type(error)(f"{prefix}{error}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{prefix}{name}: {error}") from error


def nearest(word: str, known: Iterable[str], spelled: Callable[[str], str] = str) -> str:
    """Return `did you mean 'a' or 'b'?`, or the list of what is known, for the end of an error line.

    `spelled`: how to write a name that is offered.
    """
    names = sorted(known)
    folded = {_folded(name): name for name in names}
    close = [folded[match] for match in difflib.get_close_matches(_folded(word[:_SHOWN]), folded, n=3, cutoff=0.55)]
    if close:
        return f"did you mean {' or '.join(repr(spelled(name)) for name in close)}?"
    return f"known: {', '.join(names) or 'none'}"


def _spelled_like(word: str, name: str) -> str:
    """Return `name` as somebody who wrote `word` would write it: `quantity-skew` or `QuantitySkew`."""
    if word != word.lower():
        return name
    separators = [letter for letter in word if letter in "-_"]
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", separators[0], name).lower() if separators else name.lower()


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


def _built(value: Any, hint: Any, where: str) -> Any:
    """Return a value of a table as the field's annotation `hint` wants it; only fields of named objects are checked."""
    families = _families(hint)
    if not families:
        return tuple(_built(item, None, where) for item in value) if isinstance(value, list) else value
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    lists = [option for option in options if typing.get_origin(option) in (tuple, list, Sequence)]
    if lists and isinstance(value, list):
        item_hint = typing.get_args(lists[0])[0]
        return tuple(_built(item, item_hint, f"{where}[{index}]") for index, item in enumerate(value))
    if any(option is Any or _is_one(value, option) for option in options):
        return value
    if families[0] in options and isinstance(value, Mapping | str):
        return families[0].from_config(value, where)
    wanted = f"name a {families[0].family}" if families[0] in options else f"be a list of {families[0].family}s"
    raise ConfigError(f"{where} must {wanted}, got {_shown(value)}")


def _families(hint: Any) -> list[type[Named]]:
    if isinstance(hint, type) and issubclass(hint, Named):
        return [hint]
    return [family for part in typing.get_args(hint) for family in _families(part)]


def _is_one(value: Any, option: Any) -> bool:
    return isinstance(option, type) and isinstance(value, (option, int) if option is float else option)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."

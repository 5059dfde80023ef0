"""What pydantic found wrong with a file, in our words: a line for each mistake, with file, key, value and remedy."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from fedml_core.named import nearest

_SHOWN = 60
Key = tuple[str, ...]

_ALLOWED: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "greater_than": lambda context: f"> {context['gt']:g}",
    "greater_than_equal": lambda context: f">= {context['ge']:g}",
    "less_than": lambda context: f"< {context['lt']:g}",
    "less_than_equal": lambda context: f"<= {context['le']:g}",
    "finite_number": lambda context: "a finite number",
    "int_type": lambda context: "a whole number",
    "float_type": lambda context: "a number",
    "bool_type": lambda context: "true or false",
    "string_type": lambda context: "text",
    "string_too_short": lambda context: "text that is not empty",
    "dict_type": lambda context: "a table",
    "model_type": lambda context: "a table",
    "literal_error": lambda context: context["expected"],
}


def explain(error: ValidationError, model: type[BaseModel], path: str, from_command_line: Iterable[Key]) -> str:
    """Return a line for each mistake that pydantic found in the file `path`.

    `from_command_line`: keys whose value came from there, so that nobody looks for them in the file.
    """
    overridden = tuple(from_command_line)
    lines = []
    for row in error.errors(include_url=False):
        key = tuple(str(part) for part in row["loc"])
        where = "on the command line" if any(key[: len(o)] == o for o in overridden) else path
        lines.append(f"{where}: {_fact(typing.cast(Mapping[str, Any], row), key, model)}")
    return "\n".join(lines)


def _fact(row: Mapping[str, Any], key: Key, model: type[BaseModel]) -> str:
    kind, name, context = row["type"], ".".join(key), row.get("ctx", {})
    if kind == "missing":
        return f"{name} is missing; add it"
    if kind == "extra_forbidden":
        return f"unknown key {name!r}; {_offer(key, model)}"
    if kind == "value_error":
        said = str(context["error"])
        return f"{name}{' ' if said.startswith('must ') else ': '}{said}, got {_shown(row['input'])}"
    if kind in _ALLOWED:
        return f"{name} must be {_ALLOWED[kind](context)}, got {_shown(row['input'])}"
    return f"{name}: {row['msg'][:1].lower()}{row['msg'][1:]}, got {_shown(row['input'])}"


def _offer(key: Key, model: type[BaseModel]) -> str:
    *parents, last = key
    table: type[BaseModel] | None = model
    for part in parents:
        table = _table_of(table.model_fields[part].annotation) if table else None
    elsewhere = [place for place in _places(model, last, ()) if place[:-1] != tuple(parents)]
    offer = nearest(last, table.model_fields if table else ())
    if elsewhere and not offer.startswith("did you mean"):
        place = elsewhere[0][:-1]
        return f"it belongs into the table [{'.'.join(place)}]" if place else "it belongs at the top, before any table"
    return offer


def _places(model: type[BaseModel], name: str, above: Key) -> Iterator[Key]:
    """Yield every key path under `model` that ends in `name`."""
    for field, info in model.model_fields.items():
        if field == name:
            yield (*above, field)
        inner = _table_of(info.annotation)
        if inner is not None:
            yield from _places(inner, name, (*above, field))


def _table_of(annotation: Any) -> type[BaseModel] | None:
    """Return the model in an annotation such as `X` or `X | None`, if there is one."""
    for option in (annotation, *typing.get_args(annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _shown(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."

"""What an accountant is told: a small vocabulary of plain mappings, checked field by field.

Events are written by the objects that sample, clip and add noise, travel and are stored as JSON, and compose. The idea
of events apart from accountants is that of Google's dp-accounting; the names and fields are ours, so a ledger does not
depend on a library.

`gaussian` {noise_multiplier}: noise of standard deviation noise_multiplier x the L2 bound of one unit.
`laplace` {scale}: noise of scale x the L1 bound of one unit.
`discrete-gaussian-sum`, `skellam-sum` {clients, dimension, l2, local_noise, scale, ring_bits, beta}: a sum to which
    `clients` honest clients add integer noise; `dimension` is the padded one; `l2` (the clip norm) and `local_noise`
    (the deviation of one client's noise) are in units of the update, `scale` is integers per unit.
`poisson` {sampling_probability, event}; `fixed-size` {population, sample, event}: amplification by sampling.
`shuffled` {event}: one step over a batch that shuffling, or somebody else, chose. There is no amplification: it costs
    what `event` costs.
`tree` {noise_multiplier, steps, restarts}: tree aggregation of `steps` steps, begun anew `restarts` times; a unit
    takes part at most once between two restarts.
`matrix` {noise_multiplier, sensitivity}: correlated noise; `sensitivity` is the whole run's over one unit's bound.
`analytic-gaussian-local` {noise_multiplier}: noise at the client, on its own update alone.
`composed` {events}, `repeated` {count, event}: more than one of them on the same data, each may depend on the others.

Guarantees: an event with an unknown name, a missing field, an extra field or a value out of range raises PrivacyError.
    Equal multisets of events fold to equal terms, whatever their order and grouping.
Trust: an event says what its author did; nothing here can see whether noise was really drawn.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedml_core.checks import require_number, require_whole
from fedml_core.errors import ConfigError, PrivacyError

__all__ = ["ADJACENCIES", "UNITS", "Mechanism", "Term", "canonical", "checked", "fold", "sampling_of"]

UNITS = ("client", "example")
"""Whose data the promise is about."""
ADJACENCIES = ("add-or-remove-one", "replace-one", "replace-special")
"""How two neighbouring data sets differ: one unit more or less, another one instead, or an empty one instead."""

_MOST_NESTED, _MOST_COUNT, _MOST_BITS = 16, 10**9, 64
_MOST_TIMES = 10**15  # that often is for ever; floats count so far exactly
_LEAST, _MOST = 1e-9, 1e15
Check = Callable[[str, object], None]


def _positive(name: str, value: object) -> None:
    # Beyond these no number of an event means protection, and squares would leave what a float holds.
    require_number(name, value, at_least=_LEAST, at_most=_MOST)


def _probability(name: str, value: object) -> None:
    require_number(name, value, above=0, at_most=1)


def _share(name: str, value: object) -> None:
    require_number(name, value, above=0, below=1)


def _count(name: str, value: object) -> None:
    require_whole(name, value, at_least=1, at_most=_MOST_COUNT)


def _from_zero(name: str, value: object) -> None:
    require_whole(name, value, at_least=0, at_most=_MOST_COUNT)


def _bits(name: str, value: object) -> None:
    require_whole(name, value, at_least=2, at_most=_MOST_BITS)


_SUM: Mapping[str, Check] = {
    "clients": _count,
    "dimension": _count,
    "l2": _positive,
    "local_noise": _positive,
    "scale": _positive,
    "ring_bits": _bits,
    "beta": _share,
}
_MECHANISMS: Mapping[str, Mapping[str, Check]] = {
    "gaussian": {"noise_multiplier": _positive},
    "laplace": {"scale": _positive},
    "discrete-gaussian-sum": _SUM,
    "skellam-sum": _SUM,
    "tree": {"noise_multiplier": _positive, "steps": _count, "restarts": _from_zero},
    "matrix": {"noise_multiplier": _positive, "sensitivity": _positive},
    "analytic-gaussian-local": {"noise_multiplier": _positive},
}
_AROUND: Mapping[str, Mapping[str, Check]] = {
    "poisson": {"sampling_probability": _probability},
    "fixed-size": {"population": _count, "sample": _count},
    "shuffled": {},
    "repeated": {"count": _count},
}
_SAMPLED = ("poisson", "fixed-size", "shuffled")
_CAN_BE_SAMPLED = ("gaussian", "laplace", "discrete-gaussian-sum", "skellam-sum")


@dataclass(frozen=True)
class Mechanism:
    """One event without others inside: its name and its numbers, sorted by field."""

    name: str
    numbers: tuple[tuple[str, float], ...]

    def __getitem__(self, field: str) -> float:
        """Return the number of one field."""
        return dict(self.numbers)[field]


Parts = tuple[tuple[Mechanism, int], ...]


@dataclass(frozen=True)
class Term:
    """Mechanisms that answer from the same sample, each so many times.

    `scheme`: "none", "poisson", "fixed-size" or "shuffled". `rate`: the share that is sampled, 1 without amplification.
    `population`: whom a fixed-size sample was drawn from, else 0.
    """

    scheme: str
    rate: float
    population: int
    parts: Parts


def canonical(event: Mapping[str, Any]) -> str:
    """Return the event as JSON in one spelling: sorted keys, no spaces; equal events are equal texts.

    Raises: PrivacyError: if it is not an event.
    Example:
        >>> canonical({"noise_multiplier": 1.0, "name": "gaussian"})
        '{"name":"gaussian","noise_multiplier":1.0}'
    """
    return _text(checked(event))


def checked(event: object) -> dict[str, Any]:
    """Return the event as a new plain dictionary, once every name, field and range is right.

    Raises: PrivacyError: otherwise; it says which event and which field.
    """
    read = _read(event)
    for _ in _terms(read):
        continue
    return read


def fold(events: Iterable[Mapping[str, Any]]) -> dict[Term, int]:
    """Return what was done and how often; 10,000 equal rounds are one term.

    Raises: PrivacyError: if one of `events` is not an event.
    """
    if isinstance(events, Mapping):
        raise PrivacyError("events must be a list of events, got one mapping; put it into a list")
    texts: Counter[str] = Counter()
    for event in events:
        texts[_text(event)] += 1
    folded: Counter[Term] = Counter()
    for text, times in texts.items():
        for term, count in _terms(_read(json.loads(text))):
            folded[term] += times * count
    return dict(sorted(folded.items(), key=lambda item: repr(item[0])))


def sampling_of(terms: Iterable[Term]) -> str:
    """Return the sampling scheme of all of them: its name, names joined by +, or "none"."""
    return "+".join(sorted({term.scheme for term in terms})) or "none"


def _text(event: object) -> str:
    if not isinstance(event, Mapping):
        raise PrivacyError(f"an event must be a mapping with a name, got {type(event).__name__}")
    try:
        return json.dumps(event, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_mapping)
    except (TypeError, ValueError, RecursionError) as error:
        raise PrivacyError(f"an event must hold plain, finite JSON values: {error}") from None


def _mapping(value: object) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} is not one")


def _read(event: object, depth: int = 0) -> dict[str, Any]:
    """Return a copy with every field checked, at every depth."""
    if depth > _MOST_NESTED:
        raise PrivacyError(f"an event holds events at most {_MOST_NESTED} deep, and this one goes deeper")
    if not isinstance(event, Mapping):
        raise PrivacyError(f"an event must be a mapping with a name, got {type(event).__name__}")
    name, around = event.get("name"), None
    if isinstance(name, str):
        around = _AROUND.get(name)
        checks = {"events": _list} if name == "composed" else around if around is not None else _MECHANISMS.get(name)
        if checks is not None:
            return _fields(event, name, checks, depth, inner=around is not None)
    known = ", ".join(sorted([*_MECHANISMS, *_AROUND, "composed"]))
    raise PrivacyError(f"nothing can account for an event named {str(name)[:60]!r}; known: {known}")


def _fields(
    event: Mapping[str, Any], name: str, checks: Mapping[str, Check], depth: int, *, inner: bool
) -> dict[str, Any]:
    wanted = {"name", *checks, *(["event"] if inner else [])}
    if missing := sorted(wanted - event.keys()):
        raise PrivacyError(f"the event {name} needs {', '.join(missing)}; without it its cost is not known")
    if extra := sorted(str(key)[:60] for key in event.keys() - wanted):
        raise PrivacyError(f"the event {name} has no field {', '.join(extra)}; its fields are {', '.join(wanted)}")
    try:
        for field, check in checks.items():
            check(field, event[field])
    except ConfigError as error:
        raise PrivacyError(f"the event {name}: {error}") from None
    read = {"name": name, **{field: event[field] for field in checks}}
    if name == "composed":
        read["events"] = [_read(each, depth + 1) for each in event["events"]]
    if inner:
        read["event"] = _read(event["event"], depth + 1)
    if name == "fixed-size" and read["sample"] > read["population"]:
        raise PrivacyError(
            f"the event fixed-size: sample must be <= population, got {read['sample']} of {read['population']}"
        )
    return read


def _list(name: str, value: object) -> None:
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(f"{name} must be a list of at least one event, got {type(value).__name__}")


def _terms(event: Mapping[str, Any]) -> Iterator[tuple[Term, int]]:
    """Yield the terms of a checked event; raise PrivacyError for a sample of what no theorem amplifies."""
    name = event["name"]
    if name not in _SAMPLED:
        for part, count in _parts(event, sampled=None):
            if isinstance(part, Term):
                yield part, count
            else:
                yield Term("none", 1.0, 0, ((part, 1),)), count
        return
    gathered: Counter[Mechanism] = Counter()
    for part, count in _parts(event["event"], sampled=name):
        if isinstance(part, Mechanism):
            gathered[part] += count
    parts = tuple(sorted(gathered.items(), key=repr))
    if name == "poisson":
        yield Term(name, float(event["sampling_probability"]), 0, parts), 1
    elif name == "fixed-size":
        yield Term(name, event["sample"] / event["population"], event["population"], parts), 1
    else:
        yield from ((Term(name, 1.0, 0, ((part, 1),)), count) for part, count in parts)


def _parts(event: Mapping[str, Any], sampled: str | None) -> Iterator[tuple[Mechanism | Term, int]]:
    """Yield mechanisms and, outside a sample, sampled terms; how often each."""
    name = event["name"]
    if name == "composed":
        for each in event["events"]:
            yield from _parts(each, sampled)
    elif name == "repeated":
        for part, count in _parts(event["event"], sampled):
            if count * event["count"] > _MOST_TIMES:
                raise PrivacyError(f"an event is repeated {count * event['count']:.0e} times; 1e+15 is the most")
            yield part, count * event["count"]
    elif sampled and name not in _CAN_BE_SAMPLED:
        raise PrivacyError(
            f"no theorem says what {sampled} sampling of the event {name} costs; report {name} as it is, not sampled"
        )
    elif name in _SAMPLED:
        yield from _terms(event)
    else:
        yield Mechanism(name, tuple(sorted((key, float(event[key])) for key in _MECHANISMS[name]))), 1

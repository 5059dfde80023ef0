"""What clients said exactly beside a private update: whatever an epsilon is said about, it does not cover that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["flagged", "over_rounds", "uncovered_text"]

Metrics = Mapping[str, Mapping[str, float]]
Privacy = Mapping[str, Any]


def flagged(fields: Mapping[str, Any], metrics: Metrics) -> dict[str, Any]:
    """Return a report's fields about privacy, where each claim names the metrics that it does not cover.

    Metrics of the server's own test data follow from a private model and are covered. `fields`: may hold `privacy` and
    `example_privacy`. `metrics`: the report's, by place.
    """
    claims = {name: fields[name] for name in ("privacy", "example_privacy") if fields.get(name)}
    return {**fields, **{name: _with(claim, _names(claim, metrics)) for name, claim in claims.items()}}


def over_rounds(claims: Iterable[Privacy | None]) -> Privacy | None:
    """Return the last claim of a run, which covers nothing that one of them did not cover."""
    last: Privacy | None = None
    names: dict[str, None] = {}
    for claim in claims:
        last = claim
        names.update(dict.fromkeys((claim or {}).get("uncovered", ())))
    return last if last is None else _with(last, sorted(names, key=_place))


def uncovered_text(*claims: Privacy | None) -> str:
    """Return in one line what the claims do not cover, or "" if there is nothing.

    Example:
        >>> uncovered_text({"epsilon": 1.0, "uncovered": ["train.loss", "clients.accuracy"]})
        'not covered by epsilon: train.loss, clients.accuracy (seen by the server only)'
    """
    names = dict.fromkeys(name for claim in claims if claim for name in claim.get("uncovered", ()))
    return f"not covered by epsilon: {', '.join(names)} (seen by the server only)" if names else ""


def _names(claim: Privacy, metrics: Metrics) -> list[str]:
    found = [f"{place}.{name}" for place in ("train", "clients") for name in metrics.get(place, ())]
    # What private training says of examples is batch size over sampling rate, which is public.
    return [name for name in found if claim["unit"] != "example" or name != "train.examples"]


def _with(claim: Privacy, names: list[str]) -> Privacy:
    return {**claim, "uncovered": names} if names else claim


def _place(name: str) -> bool:
    return not name.startswith("train.")

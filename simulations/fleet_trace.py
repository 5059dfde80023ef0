"""A trace of when devices were there, read from JSON or CSV and checked line by line."""

from __future__ import annotations

import csv
import json
import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedml_core.errors import ConfigError

__all__ = ["Intervals", "read_trace"]

_COLUMNS = ("client", "start_s", "end_s")


@dataclass(frozen=True)
class Intervals:
    """One client's intervals, sorted and apart: from `starts[i]` to before `ends[i]`, in seconds."""

    starts: tuple[float, ...]
    ends: tuple[float, ...]

    def holds(self, time: float) -> bool:
        """Return whether an interval lies around `time`."""
        place = bisect_right(self.starts, time) - 1
        return place >= 0 and time < self.ends[place]

    def next_start(self, time: float) -> float | None:
        """Return the first start after `time`, or None."""
        place = bisect_right(self.starts, time)
        return self.starts[place] if place < len(self.starts) else None


def read_trace(path: Path, period_s: float | None = None) -> dict[int, Intervals]:
    """Return each client's intervals, sorted by client; intervals that touch or overlap are one.

    Raises: ConfigError: if the file cannot be read, or an entry is not one: with the file and the place in it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        rows = _from_json(text) if path.suffix.lower() == ".json" else _from_csv(text)
        found: dict[int, list[tuple[float, float]]] = {}
        for where, client, start, end in rows:
            number, begins, ends = _checked(where, client, start, end, period_s)
            found.setdefault(number, []).append((begins, ends))
    except OSError as error:
        raise ConfigError(f"the trace {path} cannot be read ({error.strerror}); correct the path") from None
    except (ValueError, csv.Error) as error:
        raise ConfigError(f"the trace {path}: {error}") from None
    if not found:
        raise ConfigError(f"the trace {path} holds no interval, so nobody could ever be asked; give it some")
    return {client: _merged(sorted(found[client])) for client in sorted(found)}


def _from_json(text: str) -> Iterator[tuple[str, object, object, object]]:
    try:
        table = json.loads(text)
    except RecursionError:
        raise ValueError("is nested too deep to be a trace") from None
    if not isinstance(table, dict):
        raise ValueError('must be an object such as {"0": [[0, 3600]]}, by client')
    for client, spans in table.items():
        if not isinstance(spans, list):
            raise ValueError(f"client {client!r:.40} must have a list of [start_s, end_s], got {spans!r:.40}")
        for span in spans:
            if not isinstance(span, list) or len(span) != 2:
                raise ValueError(f"client {client!r:.40} must have a list of [start_s, end_s], got {span!r:.40}")
            yield f"client {client!r:.40}", client, *span


def _from_csv(text: str) -> Iterator[tuple[str, object, object, object]]:
    reader = csv.reader(text.splitlines())
    header = tuple(cell.strip() for cell in next(reader, []))
    if header != _COLUMNS:
        raise ValueError(f"the first line must be {','.join(_COLUMNS)}, got {','.join(header)!r:.60}")
    for row in reader:
        if not row:
            continue
        if len(row) != len(_COLUMNS):
            raise ValueError(f"line {reader.line_num} must have 3 columns, got {len(row)}")
        client, start, end = row
        yield f"line {reader.line_num}", client, start, end


def _checked(
    where: str, client: object, start: object, end: object, period_s: float | None
) -> tuple[int, float, float]:
    text = str(client).strip()
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise ValueError(f"{where}: a client must be a whole number from 0, got {client!r:.40}")
    begins, ends = _seconds(where, start), _seconds(where, end)
    last = math.inf if period_s is None else period_s
    if not 0 <= begins < ends <= last:
        bound = "" if period_s is None else f" <= period_s = {period_s:g}"
        raise ValueError(f"{where}: an interval needs 0 <= start_s < end_s{bound}, got {begins:g} to {ends:g}")
    return int(text), begins, ends


def _seconds(where: str, value: object) -> float:
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where}: a time must be a finite number of seconds, got {value!r:.40}")
    return number


def _merged(spans: list[tuple[float, float]]) -> Intervals:
    starts, ends = [spans[0][0]], [spans[0][1]]
    for begins, stops in spans[1:]:
        if begins <= ends[-1]:
            ends[-1] = max(ends[-1], stops)
        else:
            starts.append(begins)
            ends.append(stops)
    return Intervals(tuple(starts), tuple(ends))

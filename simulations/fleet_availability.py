"""When simulated clients can be asked: always, some hours of each day, or as a trace of real devices says."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self, overload

from fedml_core.checks import require_number
from fedml_core.errors import ConfigError
from fedml_core.named import Named
from fedml_core.randomness import key_bytes
from simulations.fleet_trace import Intervals, read_trace

__all__ = ["Always", "Availability", "Daily", "Trace"]

DAY_S = 86_400.0
# A start that lies within a millionth of a client's step of the clock has come: times are sums of rounded floats.
_ROUNDING = 1e-6
_WRAP = 1e-9


@dataclass(frozen=True)
class Availability(Named, ABC):
    """Who can be asked at a time of the virtual clock; subclass it for your own pattern."""

    @abstractmethod
    def available(self, count: int, now_s: float, seed: int) -> Sequence[int]:
        """Return which of the clients 0 to count - 1 can be asked, each once."""

    @abstractmethod
    def next_s(self, count: int, now_s: float, seed: int) -> float | None:
        """Return, where nobody can be asked now, the next time at which somebody can, or None for never."""

    def identity(self) -> str:
        """Return what must be equal for a run to go on where it stopped."""
        return repr(self)

    def beside(self, folder: Path) -> Self:
        """Return this with paths relative to `folder` made ones that can be opened from the working directory."""
        return self


@dataclass(frozen=True)
class Always(Availability):
    """Every client, at any time."""

    def available(self, count: int, now_s: float, seed: int) -> Sequence[int]:
        """Return all."""
        return range(count)

    def next_s(self, count: int, now_s: float, seed: int) -> float | None:
        """Return now."""
        return now_s


@dataclass(frozen=True)
class Daily(Availability):
    """Each client is there for `on_s` seconds of every `period_s`, such as at night while it charges.

    The clients' starts are spread evenly over `spread_s` seconds, by default the whole period; with 0 all come and go
    together. Who starts when is shuffled by the seed. O(1) for any population: nobody is looked at who is not sampled.
    """

    on_s: float = 8 * 3600.0
    period_s: float = DAY_S
    spread_s: float | None = None

    def __post_init__(self) -> None:
        """Check the times."""
        require_number("period_s", self.period_s, above=0)
        require_number("on_s", self.on_s, above=0, at_most=self.period_s)
        if self.spread_s is not None:
            require_number("spread_s", self.spread_s, at_least=0, at_most=self.period_s)

    def available(self, count: int, now_s: float, seed: int) -> Sequence[int]:
        """Return, as a sequence that computes its members when it is asked for them, who is there."""
        time = self._time(now_s)
        later = self._started(time, count)
        today = range(self._started(time - self.on_s, count), later)
        before = range(max(later, self._started(time + self.period_s - self.on_s, count)), count)
        return _Shuffled((today, before), count, seed)

    def next_s(self, count: int, now_s: float, seed: int) -> float | None:
        """Return when the next client starts."""
        time = self._time(now_s)
        rank = self._started(time, count)
        wait = self.period_s - time if rank == count else self._spread * rank / count - time
        return now_s + wait

    def _time(self, now_s: float) -> float:
        """Return the time within the period; a rounding error before its end is the start of the next."""
        time = now_s % self.period_s
        return 0.0 if self.period_s - time < _WRAP * self.period_s else time

    @property
    def _spread(self) -> float:
        return self.period_s if self.spread_s is None else self.spread_s

    def _started(self, time: float, count: int) -> int:
        """Return how many clients, in the order of their starts, start at `time` or before: spread_s * rank / count."""
        if time < -_ROUNDING:
            return 0
        if self._spread == 0:
            return count
        return max(0, min(count, math.floor(time * count / self._spread + _ROUNDING) + 1))


@dataclass(frozen=True)
class Trace(Availability):
    """As a file says: CSV with the columns client, start_s, end_s, or JSON such as {"0": [[0, 3600], [7200, 9000]]}.

    Times are virtual seconds from the run's start; a client that the file lacks is never there, and numbers beyond
    the population are ignored. With `period_s`, the whole trace repeats. In a run.toml, `path` is relative to the file.
    """

    path: str
    period_s: float | None = None

    def __post_init__(self) -> None:
        """Check the period; the file is read when it is needed."""
        if not isinstance(self.path, str) or not self.path:
            raise ConfigError(f"path must name a file, got {self.path!r}")
        if self.period_s is not None:
            require_number("period_s", self.period_s, above=0)

    def available(self, count: int, now_s: float, seed: int) -> Sequence[int]:
        """Return who has an interval around now; ends do not belong to it. O(clients in the file)."""
        time = now_s if self.period_s is None else now_s % self.period_s
        return [client for client, spans in self._clients.items() if client < count and spans.holds(time)]

    def next_s(self, count: int, now_s: float, seed: int) -> float | None:
        """Return the earliest start after now."""
        time = now_s if self.period_s is None else now_s % self.period_s
        known = [spans for client, spans in self._clients.items() if client < count]
        after = [start for spans in known if (start := spans.next_start(time)) is not None]
        if after:
            return now_s - time + min(after)
        first = [spans.starts[0] for spans in known]
        return None if self.period_s is None or not first else now_s - time + self.period_s + min(first)

    def identity(self) -> str:
        """Return the contents' digest: a trace may move."""
        digest = hashlib.sha256(repr(list(self._clients.items())).encode()).hexdigest()[:16]
        return f"Trace({digest}, period_s={self.period_s})"

    def beside(self, folder: Path) -> Self:
        """Return this with its path relative to the working directory."""
        return dataclasses.replace(self, path=str(folder / Path(self.path).expanduser()))

    @cached_property
    def _clients(self) -> dict[int, Intervals]:
        return read_trace(Path(self.path), self.period_s)


class _Shuffled(Sequence[int]):
    """The clients at some ranks of a shuffled order, each computed when it is asked for.

    The order is client = (rank - shift) / step modulo count. A step near the golden section of the count lays
    neighbouring clients far apart, so that a partition's order says nothing about who is there when.
    """

    def __init__(self, ranks: tuple[range, ...], count: int, seed: int) -> None:
        self._ranks, self._count = ranks, count
        step = next(s for s in range(max(1, round(0.618034 * count)), 2 * count + 2) if math.gcd(s, count) == 1)
        self._inverse = pow(step, -1, count) if count > 1 else 0
        self._shift = int.from_bytes(key_bytes(seed, "fleet", "availability", size=8), "little") % count

    def __len__(self) -> int:
        return sum(len(ranks) for ranks in self._ranks)

    @overload
    def __getitem__(self, place: int) -> int: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[int]: ...

    def __getitem__(self, place: int | slice) -> int | Sequence[int]:
        if isinstance(place, slice):
            return [self[index] for index in range(*place.indices(len(self)))]
        index = place + len(self) if place < 0 else place
        for ranks in self._ranks:
            if 0 <= index < len(ranks):
                return self._client(ranks[index])
            index -= len(ranks)
        raise IndexError(f"there are {len(self)} clients, got place {place}")

    def __iter__(self) -> Iterator[int]:
        return (self._client(rank) for ranks in self._ranks for rank in ranks)

    def _client(self, rank: int) -> int:
        return (rank - self._shift) * self._inverse % self._count

"""Clients' data loaded ahead, while others train, and kept at hand as long as there is room."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedml_core.checks import require_whole
from fedml_core.data import ClientData, Data, Examples
from simulations.packing import Packed
from simulations.population import Population
from simulations.sources.source import packed_of

__all__ = ["Prefetched", "announce"]


class Prefetched:
    """A population in front of a slower one: `expect` says who is needed next, and threads load them meanwhile.

    Guarantees: gives what the population behind it gives, each error at the client that caused it, and only if it is
    asked for. Holds at most `cache_bytes` and one client a thread beyond; among what it has given out, what was used
    longest ago goes first. No thread outlives the work that was announced, or `close`.

    Args: population: may be asked by several threads at once, as every source may. cache_bytes: of examples in memory;
        a data set that is not in memory as `Examples` is not kept, and is loaded when it is asked for. threads: >= 1.
    """

    def __init__(self, population: Population, cache_bytes: int, threads: int = 1) -> None:
        require_whole("cache_bytes", cache_bytes, at_least=1)
        require_whole("threads", threads, at_least=1)
        self._population, self._cache_bytes, self._threads = population, cache_bytes, threads
        self._start_empty()

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close."""
        self.close()

    def __len__(self) -> int:
        """Return the number of clients."""
        return len(self._population)

    def expect(self, clients: Iterable[int]) -> None:
        """Load these clients, in this order, as room allows; they take the place of those announced before."""
        self._own_process()
        with self._changed:
            self._plan.clear()
            self._plan.extend(clients)
            self._asked.clear()
            self._used.update(self._ahead)
            self._ahead.clear()
            while len(self._running) < min(self._threads, len(self._plan)):
                thread = threading.Thread(target=self._work, name="fedveil-prefetch", daemon=True)
                self._running.add(thread)
                thread.start()
            self._changed.notify_all()

    def load(self, client: int) -> ClientData:
        """Return one client's data: from memory, or as the population behind loads them.

        Raises: what loading the client raised.
        """
        self._own_process()
        with self._changed:
            self._asked.add(client)
            while client in self._loading:
                self._changed.wait()
            entry = self._ahead.pop(client, None) or self._used.pop(client, None)
            if entry is None:
                self._loading.add(client)
            else:
                self._bytes -= entry.size_bytes
        if entry is None:
            entry = self._loaded(client)
        if entry.error is not None:
            self._keep(client, None)
            raise entry.error
        self._keep(client, entry)
        assert entry.data is not None
        return entry.data

    def counts(self, clients: Sequence[int]) -> NDArray[np.int64] | None:
        """Return what the population behind returns."""
        return self._population.counts(clients)

    def pack(self, clients: Sequence[int]) -> Packed | None:
        """Return the clients' training examples as one, or None if one of them is not in memory as `Examples`.

        Raises: as `load`.
        """
        self._own_process()
        with self._changed:
            known = any(client in kept for client in clients for kept in (self._ahead, self._used, self._loading))
            self._asked.update(clients)
        # Whoever is not at hand is best gathered in one go by the population itself.
        return packed_of(self.load(client) for client in clients) if known else self._population.pack(clients)

    def close(self) -> None:
        """Stop loading, and forget everything; a later `expect` begins anew. Idempotent."""
        if self._process != os.getpid():
            return
        with self._changed:
            self._plan.clear()
            running = list(self._running)
            self._changed.notify_all()
        for thread in running:
            thread.join()
        with self._changed:
            self._ahead.clear()
            self._used.clear()
            self._bytes = 0

    @property
    def held_bytes(self) -> int:
        """Return the bytes of the examples that are kept now."""
        with self._changed:
            return self._bytes

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs to load for itself."""
        return {"population": self._population, "cache_bytes": self._cache_bytes, "threads": self._threads}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin with nothing loaded."""
        self.__init__(**state)  # type: ignore[misc]  # exactly the constructor's arguments

    def _start_empty(self) -> None:
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._plan: deque[int] = deque()
        self._asked: set[int] = set()  # since that was announced
        self._ahead: dict[int, _Entry] = {}  # loaded, and not asked for yet: never dropped for another
        self._used: OrderedDict[int, _Entry] = OrderedDict()
        self._loading: set[int] = set()
        self._running: set[threading.Thread] = set()
        self._bytes = 0

    def _own_process(self) -> None:
        # A forked process has no copies of the threads, and perhaps a lock that one of them held.
        if self._process != os.getpid():
            self._start_empty()

    def _work(self) -> None:
        """Load what was announced, until there is no more."""
        while (client := self._next()) is not None:
            entry = self._loaded(client)
            with self._changed:
                self._loading.discard(client)
                if entry.data is not None and not _in_memory(entry.data):
                    self._plan.clear()  # these data are not read by loading them: there is nothing to do ahead
                else:
                    self._ahead[client] = entry
                    self._bytes += entry.size_bytes
                    self._make_room()
                self._changed.notify_all()

    def _next(self) -> int | None:
        """Return who is to be loaded, once there is room, or None if nobody is left."""
        with self._changed:
            while self._plan:
                self._make_room()
                client = self._plan[0]
                if client in self._asked or client in self._loading or client in self._ahead:
                    self._plan.popleft()
                elif client in self._used:
                    self._ahead[self._plan.popleft()] = self._used.pop(client)
                elif self._bytes < self._cache_bytes:
                    self._loading.add(self._plan.popleft())
                    return client
                else:
                    self._changed.wait()
            self._running.discard(threading.current_thread())
            return None

    def _loaded(self, client: int) -> _Entry:
        try:
            data = self._population.load(client)
        except Exception as error:  # noqa: BLE001  # raised where the client is asked for
            return _Entry(None, 0, error)
        size = _size(data.train) + _size(data.test)
        return _Entry(data, size)

    def _keep(self, client: int, entry: _Entry | None) -> None:
        """Keep what was asked for, if it can be kept."""
        with self._changed:
            self._loading.discard(client)
            if entry is not None and entry.data is not None and _in_memory(entry.data):
                self._used[client] = entry
                self._bytes += entry.size_bytes
                self._make_room()
            self._changed.notify_all()

    def _make_room(self) -> None:
        """Drop what was used longest ago, until the rest fits or has not been asked for yet."""
        while self._bytes >= self._cache_bytes and self._used:
            self._bytes -= self._used.popitem(last=False)[1].size_bytes


@dataclass(frozen=True)
class _Entry:
    data: ClientData | None
    size_bytes: int
    error: Exception | None = None


def announce(population: Population, clients: Sequence[int]) -> None:
    """Tell a population that can load ahead who is needed next, in order; engines call it before they load."""
    if isinstance(population, Prefetched):
        population.expect(clients)


def _in_memory(data: ClientData) -> bool:
    return isinstance(data.train, Examples) and (data.test is None or isinstance(data.test, Examples))


def _size(data: Data | None) -> int:
    if not isinstance(data, Examples):
        return 0
    tensors = (*data.inputs, data.targets, *(() if data.weights is None else (data.weights,)))
    return sum(tensor.nbytes for tensor in tensors)

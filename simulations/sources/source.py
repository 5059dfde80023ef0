"""What a source of clients' data is: a path and few words, which any process can open and read a client at a time."""

from __future__ import annotations

import dataclasses
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedml_core.data import ClientData, Examples
from fedml_core.errors import ConfigError
from fedml_core.named import Named
from simulations.packing import Packed


class Reader(ABC):
    """An open source. May be asked by several threads at once."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of clients."""

    @abstractmethod
    def read(self, client: int) -> ClientData:
        """Return the data of a client that exists.

        Raises: TaskError: if they cannot be read, naming the client and the file.
        """

    def counts(self, clients: Sequence[int]) -> NDArray[np.int64] | None:
        """Return how many training examples each has, (K,), or None where only loading would tell."""
        return None

    def pack(self, clients: Sequence[int]) -> Packed | None:
        """Return the clients' training examples as one."""
        return packed_of(self.read(client) for client in clients)


@dataclass(frozen=True)
class Source(Named, ABC):
    """Clients whose data lie in files; a `Population`. To write your own, define `open` in a frozen dataclass.

    Guarantees: nothing is read before the number of clients is asked for, and then only what tells it; a client's data
    are read when it is loaded, and not kept. A copy in another process is the fields alone, and opens the files anew.

    `path`: relative to the working directory; in a run.toml, to the file's folder.
    """

    path: str | Path

    def __post_init__(self) -> None:
        """Keep the path as text, so that a source can be named in a file."""
        object.__setattr__(self, "path", str(self.path))

    @abstractmethod
    def open(self) -> Reader:
        """Return a reader of the files.

        Raises: ConfigError: if they are missing or are no such source.
        """

    def __len__(self) -> int:
        """Return the number of clients.

        Raises: ConfigError: as `open`.
        """
        return len(self._reader)

    def load(self, client: int) -> ClientData:
        """Return one client's data.

        Raises: TaskError: if they cannot be read. ConfigError: if there is no such client.
        """
        return self._reader.read(self._known([client])[0])

    def counts(self, clients: Sequence[int]) -> NDArray[np.int64] | None:
        """Return how many training examples each has, (K,), or None where only loading would tell."""
        return self._reader.counts(self._known(clients))

    def pack(self, clients: Sequence[int]) -> Packed | None:
        """Return the clients' training examples as one."""
        return self._reader.pack(self._known(clients))

    def beside(self, folder: Path) -> Self:
        """Return this source with its path taken as relative to `folder`."""
        return dataclasses.replace(self, path=str(folder / Path(self.path).expanduser()))

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields: what another process needs."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def _known(self, clients: Sequence[int]) -> Sequence[int]:
        count = len(self._reader)
        if len(clients) and not (min(clients) >= 0 and max(clients) < count):
            wrong = next(client for client in clients if not 0 <= client < count)
            raise ConfigError(f"{self.path} has no client {wrong}; its clients are 0 to {count - 1}")
        return clients

    @property
    def _reader(self) -> Reader:
        # A forked process must not share its parent's open files.
        kept: tuple[int, Reader] | None = self.__dict__.get("_opened")
        if kept is None or kept[0] != os.getpid():
            kept = (os.getpid(), self.open())
            object.__setattr__(self, "_opened", kept)
        return kept[1]


def packed_of(clients: Iterable[ClientData]) -> Packed | None:
    """Return the clients' training examples as one, or None if they are not all `Examples` of one shape and dtype."""
    parts = []
    for client in clients:
        if not isinstance(client.train, Examples):
            return None
        parts.append(client.train)
    alike = len({tuple((c.shape[1:], c.dtype) for c in (*part.inputs, part.targets)) for part in parts}) == 1
    return Packed.of(parts) if alike else None

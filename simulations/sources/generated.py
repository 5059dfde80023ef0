"""Clients whose data a function makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedml_core.data import ClientData
from fedml_core.errors import ConfigError, TaskError
from simulations.packing import Packed
from simulations.sources.source import packed_of


@dataclass(frozen=True)
class Generated:
    """Clients whose data a function makes or reads when they are sampled; a population of millions costs nothing.

    `count`: how many there are. `make(i)`: client i's data; called anew each time that they are needed.
    """

    count: int
    make: Callable[[int], ClientData]

    def __post_init__(self) -> None:
        """Check the count."""
        if self.count < 1:
            raise ConfigError(f"count must be >= 1, got {self.count}")

    def __len__(self) -> int:
        """Return the number of clients."""
        return self.count

    def load(self, client: int) -> ClientData:
        """Return what the function returns for this client.

        Raises: TaskError: if the user's function fails, naming the client.
        """
        try:
            return self.make(client)
        except Exception as error:
            raise TaskError(f"client_data({client}) failed: {type(error).__name__}: {error}") from error

    def counts(self, clients: Sequence[int]) -> NDArray[np.int64] | None:
        """Return None: only loading would tell."""
        return None

    def pack(self, clients: Sequence[int]) -> Packed | None:
        """Return the clients' training examples as one, or None if one of them is not in memory as `Examples`."""
        return packed_of(self.load(client) for client in clients)

"""Clients whose data somebody has in memory already: one part each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedml_core.data import ClientData, Data, Examples
from fedml_core.errors import ConfigError
from simulations.packing import Packed
from simulations.sources.source import packed_of


@dataclass(frozen=True)
class Held:
    """Client i holds `parts[i]`: examples, a map-style data set, or `ClientData` where some are kept aside.

    Raises: ConfigError: for a part that is none of these, saying which.
    """

    parts: Sequence[Data | ClientData] = field(repr=False)
    _clients: tuple[ClientData, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Look at every part."""
        object.__setattr__(self, "_clients", tuple(_client(place, part) for place, part in enumerate(self.parts)))

    def __len__(self) -> int:
        """Return the number of clients."""
        return len(self._clients)

    def load(self, client: int) -> ClientData:
        """Return one client's part."""
        return self._clients[client]

    def counts(self, clients: Sequence[int]) -> NDArray[np.int64] | None:
        """Return how many training examples each has."""
        return np.array([len(self._clients[client].train) for client in clients], dtype=np.int64)

    def pack(self, clients: Sequence[int]) -> Packed | None:
        """Return the clients' training examples as one, or None if one of them is not in memory as `Examples`."""
        return packed_of(self._clients[client] for client in clients)


def _client(place: int, part: object) -> ClientData:
    if isinstance(part, ClientData):
        return part
    # A tuple or a tensor has a length and items as well, but is one example of somebody's rather than a data set.
    single = isinstance(part, tuple | Tensor | str | bytes)
    if isinstance(part, Examples) or (not single and hasattr(part, "__getitem__") and hasattr(part, "__len__")):
        return ClientData(part)
    raise ConfigError(
        f"clients[{place}] must be Examples, a map-style data set or ClientData, got {type(part).__name__}; "
        "for pooled examples, give the number of clients and a partition"
    )

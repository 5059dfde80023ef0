"""Many clients' replies in one piece, for engines that train K clients at once or add up in worker processes.

They never cross a wire: only a simulation's channel yields them, so that an engine's work is not taken apart into
single replies and put together again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedml_core.accumulate import Accumulator
from fedml_core.update import Update


@dataclass(frozen=True)
class BulkArrival:
    """K clients' encoded updates of one assignment: row k of `update` is that of `clients[k]`.

    `size_bytes`: what K single replies would have been on a wire.
    """

    clients: Sequence[int]
    update: Update
    size_bytes: int


@dataclass(frozen=True)
class GatheredArrival:
    """What a worker has checked and added up already.

    `accepted`: the clients in the sum. `excluded`: client, rule and reason of each that is not. `parts`: by client,
    the messages that came with its share of a secure sum.
    """

    accepted: Sequence[int]
    excluded: Sequence[tuple[int, str, str]]
    accumulator: Accumulator = field(repr=False)
    size_bytes: int
    parts: Mapping[int, Mapping[str, bytes]] = field(default_factory=dict, repr=False)

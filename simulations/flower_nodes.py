"""The nodes of a Flower grid inside this process: who they are, how each is configured, and what each remembers."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import fedml_core.engine_guard  # noqa: F401 - switches Flower's calls home off, so it goes before flwr

# isort: split
from flwr.app import Context, RecordDict, UserConfig, UserConfigValue

from fedml_core.checks import require_whole
from fedml_core.errors import ConfigError

__all__ = ["FIRST_NODE_ID", "Clients", "Nodes", "checked_config"]

FIRST_NODE_ID = 1000
"""Node ids count up from here: the client of partition 7 is node 1007 (Flower keeps 1 for the server)."""

Clients = int | Sequence[Mapping[str, UserConfigValue]]


class Nodes:
    """The nodes of one run; a node costs nothing until its first message.

    Args: clients: how many, each with Flower's `partition-id` and `num-partitions` as its node config, or one node
        config per node.
    Raises: ConfigError: if there is none, or a config holds what Flower cannot.
    """

    def __init__(self, clients: Clients) -> None:
        count, self._configs = _checked_clients(clients)
        self.ids = range(FIRST_NODE_ID, FIRST_NODE_ID + count)
        self._contexts: dict[int, Context] = {}
        self._lock = threading.Lock()

    @property
    def contexts(self) -> Mapping[int, Context]:
        """Return the contexts of the nodes that were messaged so far, by node id."""
        return MappingProxyType(self._contexts)

    def context(self, node_id: int, run_id: int, run_config: UserConfig) -> Context:
        """Return a node's context, the same at each call."""
        with self._lock:
            if node_id not in self._contexts:
                index = node_id - FIRST_NODE_ID
                config: UserConfig = {"partition-id": index, "num-partitions": len(self.ids)}
                if self._configs is not None:
                    config = self._configs[index]
                self._contexts[node_id] = Context(run_id, node_id, config, RecordDict(), dict(run_config))
            return self._contexts[node_id]


def _checked_clients(clients: Clients) -> tuple[int, list[UserConfig] | None]:
    """Return how many nodes there are, and their configs where they were named."""
    if isinstance(clients, int):
        require_whole("clients", clients, at_least=1)
        return clients, None
    if not isinstance(clients, list | tuple) or not clients:
        raise ConfigError(f"clients must be a number or a list of node configs, got {clients!r}; name one at least")
    return len(clients), [checked_config(f"node config {index}", config) for index, config in enumerate(clients)]


def checked_config(name: str, config: Mapping[str, UserConfigValue]) -> UserConfig:
    """Return a config of plain values; ConfigError, with its `name`, if it is none."""
    if not isinstance(config, Mapping):
        raise ConfigError(f"{name} must be a mapping, got {type(config).__name__}")
    for key, value in config.items():
        if not isinstance(key, str) or not isinstance(value, bool | int | float | str):
            raise ConfigError(f"{name} maps {key!r} to a {type(value).__name__}; use text keys, and numbers or text")
    return dict(config)

"""Runs an ordinary Flower app, ServerApp and ClientApp unchanged, inside this process."""

from __future__ import annotations

from collections.abc import Mapping

import fedml_core.engine_guard  # noqa: F401 - switches Flower's calls home off, so it goes before flwr

# isort: split
from flwr.app import Context, RecordDict, UserConfigValue
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import ServerApp

from simulations.flower_grid import ClientCallable, FaultHook, LocalGrid
from simulations.flower_nodes import Clients

__all__ = ["run_flower_apps"]


def run_flower_apps(
    server_app: ServerApp,
    client_app: ClientCallable,
    *,
    clients: Clients,
    run_config: Mapping[str, UserConfigValue] | None = None,
    threads: int = 1,
    faults: FaultHook | None = None,
) -> Context:
    """Run a Flower app to its end in this process and return the server's context, with what it left in `state`.

    A strategy that wants more nodes than there are clients (Flower's default is two) waits for ever, as in a fleet; a
    warning says so.
    The exceptions of the server app come out as they are; those of clients are error replies with the class name only
    (their tracebacks go to this module's logger, at level DEBUG).
    Args: as `LocalGrid`.
    Raises: ConfigError: as `LocalGrid`. RunError: if this process has a Flower run open already.
    """
    grid = LocalGrid(client_app, clients=clients, run_config=run_config, threads=threads, faults=faults)
    run = grid.run
    context = Context(run.run_id, SUPERLINK_NODE_ID, {}, RecordDict(), run.override_config)
    with grid:
        server_app(grid, context)
    return context

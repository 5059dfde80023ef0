"""From a run.toml and its task to a simulation that is ready to run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from clients.optimizers import make_optimizer
from fedml_core.config import RunConfig
from fedml_core.errors import ConfigError
from fedml_core.named import construct, nearest
from fedml_core.task import Task
from server.configure import blaming, plan_from
from simulations.engines.engine import Engine
from simulations.engines.sequential import Sequential
from simulations.faults import Faults
from simulations.partition import partitioner
from simulations.partition_contract import Partitioner
from simulations.simulate import Simulation

__all__ = ["ENGINES", "partitioners", "simulation_from"]

ENGINES: Mapping[str, Callable[..., Engine]] = {"sequential": Sequential}


def simulation_from(config: RunConfig, task: Task) -> Simulation:
    """Return the simulation that a run.toml describes; no data is loaded yet.

    Raises: ConfigError, StrategyError: for whatever cannot be, with the file and the table.
    """
    plan = plan_from(config)
    with blaming(config.path, "clients.partition"):
        rule = _partitioner_from(config.clients.partition)
    with blaming(config.path, "simulation.faults"):
        faults = Faults(**config.simulation.faults.model_dump())
    with blaming(config.path, "training"):  # otherwise the first client would find out, after all data is loaded
        make_optimizer(config.training, 1, [nn.Parameter(torch.zeros(1, 1))])
    with blaming(config.path, "evaluation.clients"):
        if plan.evaluation.clients is not None:
            plan.evaluation.clients.require(config.clients.count)
    engine = _engine_from(config)
    with blaming(config.path, "sampling"):
        return Simulation(
            task,
            plan.strategy,
            clients=config.clients.count,
            rounds=config.rounds,
            sampling=plan.sampling,
            training=plan.training,
            partition=rule,
            holdout=config.clients.holdout,
            evaluation=plan.evaluation,
            early_stopping=plan.early_stopping,
            faults=faults,
            engine=engine,
            minimum_replies=plan.minimum_replies,
            seed=plan.seed,
            device=config.simulation.device,
        )


def partitioners() -> dict[str, type[Partitioner]]:
    """Return every partitioner by its class name, those that the user's task defines included."""
    found: dict[str, type[Partitioner]] = {}
    waiting: list[type[Partitioner]] = Partitioner.__subclasses__()
    while waiting:
        kind = waiting.pop()
        waiting.extend(kind.__subclasses__())
        if not inspect.isabstract(kind):
            found[kind.__name__] = kind
    return found


def _partitioner_from(table: Mapping[str, Any]) -> Partitioner:
    kind = partitioners().get(table["name"])
    if kind is None:
        return partitioner(table)
    arguments = {key: value for key, value in table.items() if key != "name"}
    built: Partitioner = construct(kind, arguments)
    return built


def _engine_from(config: RunConfig) -> Engine:
    table = dict(config.simulation.engine)
    name = table.pop("name")
    with blaming(config.path, "simulation.engine"):
        if name not in ENGINES:
            raise ConfigError(f"unknown engine {name!r}; {nearest(name, ENGINES)}")
        skip = config.simulation.on_client_error == "skip"
        engine: Engine = construct(ENGINES[name], {"skip_failures": skip, **table})
        return engine

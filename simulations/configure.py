"""From a run.toml and its task to a simulation that is ready to run."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import nn

from clients.optimizers import make_optimizer
from fedml_core.config import RunConfig
from fedml_core.errors import ConfigError
from fedml_core.named import construct
from fedml_core.task import Task
from server.configure import blaming, plan_from
from server.sampling import Sampling
from simulations.engines import Engine
from simulations.faults import Faults
from simulations.partition import Partitioner
from simulations.private_clients import require_counted
from simulations.simulate import Simulation
from simulations.sources import Source
from simulations.virtual_time import Fleet

if TYPE_CHECKING:
    from clients.private_training import PrivateTraining

__all__ = ["simulation_from"]


def simulation_from(config: RunConfig, task: Task) -> Simulation:
    """Return the simulation that a run.toml describes; no data is loaded yet.

    Raises: ConfigError, StrategyError: for whatever cannot be, with the file and the table.
    """
    plan = plan_from(config)
    with blaming(config, "clients.partition"):
        rule = Partitioner.from_config(config.clients.partition)
    with blaming(config, "simulation.faults"):
        faults = Faults(**config.simulation.faults.model_dump())
    _check_optimizer(config)
    clients = _clients_from(config)
    _check_evaluators(config, plan.evaluation.clients, clients if isinstance(clients, int) else len(clients))
    engine, fleet = _engine_from(config), _fleet_from(config)
    private = _private_from(config, engine)
    with blaming(config, "budget"):
        require_counted(config.budget, plan.strategy.privacy(), examples=private is not None)
    with blaming(config, "sampling", "clients", "strategy"):
        return Simulation(
            task,
            plan.strategy,
            clients=clients,
            rounds=config.rounds,
            sampling=plan.sampling,
            training=plan.training,
            partition=rule,
            holdout=config.clients.holdout,
            evaluation=plan.evaluation,
            early_stopping=plan.early_stopping,
            faults=faults,
            engine=engine,
            fleet=fleet,
            minimum_replies=plan.minimum_replies,
            round_timeout_s=plan.round_timeout_s,
            seed=plan.seed,
            device=config.simulation.device,
            private=private,
            budget=config.budget,
        )


def _check_optimizer(config: RunConfig) -> None:
    """Refuse what the first client would find out only after all data is loaded.

    Plain SGD is not tried: there is nothing to refuse, and torch's first optimizer imports its compiler for most of a
    second, which engines that train without it never need.
    """
    if config.training.optimizer.lower() == "sgd" and not config.training.optimizer_arguments:
        return
    with blaming(config, "training"):
        make_optimizer(config.training, 1, [nn.Parameter(torch.zeros(1, 1))])


def _check_evaluators(config: RunConfig, sampling: Sampling | None, count: int) -> None:
    with blaming(config, "evaluation.clients", "clients"):
        if sampling is not None:
            sampling.require(count)


def _engine_from(config: RunConfig) -> Engine:
    with blaming(config, "simulation.engine"):
        skip = config.simulation.on_client_error == "skip"
        return Engine.from_config({"skip_failures": skip, **config.simulation.engine})


def _private_from(config: RunConfig, engine: Engine) -> PrivateTraining | None:
    """Return how simulated clients protect their examples."""
    table = config.clients.examples
    if table is None:
        return None
    from clients.private_training import PrivateTraining  # only who trains privately waits for its imports

    with blaming(config, "clients.examples"):
        engine.require_private()
        return PrivateTraining.of(table)


def _clients_from(config: RunConfig) -> int | Source:
    """Return how many clients there are, or the files that hold them."""
    if config.clients.source is None:
        return config.clients.count
    with blaming(config, "clients.source"):
        for key in ("count", "partition", "holdout"):
            if key in config.clients.model_fields_set:
                raise ConfigError(f"a source has its own clients and data, and clients.{key} is given; leave one out")
        source = Source.from_config(config.clients.source).beside(config.folder)
        len(source)
        return source


def _fleet_from(config: RunConfig) -> Fleet | None:
    table = config.simulation.fleet
    if table is None:
        return None
    with blaming(config, "simulation.fleet"):
        fleet: Fleet = construct(Fleet, table)
        return dataclasses.replace(fleet, availability=fleet.availability.beside(config.folder))

"""From a checked configuration file to the objects that it names, for every runner alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import strategies
from fedml_core.config import RunConfig
from fedml_core.config_tables import ConfigFile
from fedml_core.errors import ConfigError, StrategyError
from server.plan import EarlyStopping, EvaluationPlan, Plan
from server.sampling import Sampling
from strategies.strategy import Strategy

__all__ = ["blaming", "import_strategies", "plan_from"]


def plan_from(config: RunConfig) -> Plan:
    """Return what each round is to do; load the task first, so that the classes beside it are known by name.

    Raises: ConfigError, StrategyError: for a strategy or sampling, or an argument of one, that does not exist (the
        nearest is offered) or is refused; with the file and the table.
    """
    import_strategies()
    with blaming(config, "strategy"):
        strategy = Strategy.from_config(config.strategy)
    with blaming(config, "sampling"):
        sampling = Sampling.from_config(config.sampling)
    stopping = config.early_stopping
    with blaming(config, "early_stopping"):
        early_stopping = None if stopping is None else EarlyStopping(**stopping.model_dump())
    return Plan(
        strategy=strategy,
        training=config.training,
        sampling=sampling,
        seed=config.seed,
        minimum_replies=config.minimum_replies,
        round_timeout_s=config.round_timeout_s,
        evaluation=_evaluation_from(config),
        early_stopping=early_stopping,
    )


def import_strategies() -> None:
    """Make every strategy that comes with fedveil known by name; the package imports lazily."""
    for name in dir(strategies):
        if name != "FlowerStrategy":  # it adapts ours for Flower's own runner, and would import Flower
            getattr(strategies, name)


@contextmanager
def blaming(config: ConfigFile, table: str, *others: str) -> Iterator[None]:
    """Say in every configuration error from inside which table of which file is at fault, and what --set changed.

    `others`: tables that what is wrong may also come from.
    """
    try:
        yield
    except (ConfigError, StrategyError) as error:
        raise type(error)(f"{config.source_of(table, *others)}: {table}: {error}") from error


def _evaluation_from(config: RunConfig) -> EvaluationPlan:
    table = config.evaluation
    clients = None
    if table.clients is not None:
        with blaming(config, "evaluation.clients"):
            clients = Sampling.from_config(table.clients)
    return EvaluationPlan(every=table.every, server=table.server, clients=clients, batch_size=table.batch_size)

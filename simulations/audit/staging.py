"""The runs that an audit does: with canaries, without them, and where masks are dear, one sum with all of them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch

from fedml_core.errors import ConfigError
from fedml_core.randomness import Key
from fedml_core.update import Update
from server.history import History
from server.plan import EvaluationPlan
from server.record import Callback
from simulations.audit.canaries import Canaries, FirstClients, Watched, with_canaries
from simulations.audit.configured import most_at_once, without_masks
from simulations.faults import Faults
from simulations.simulate import Simulation
from strategies.secure import SecureAggregation

__all__ = ["masked_alone", "run_masked", "run_quietly", "run_watched", "shortened", "watched_by"]

_LOUD = 10.0
"""How many times longer than the bound a canary's update is: clipping must show that it is there."""
_MOST_MASKED = 500
"""Members' sessions in all rounds, up to which the run with canaries draws its own masks: two dozen take a second."""
_MOST_SUMMED = 10_000
"""Members' sessions in the rounds that are attacked at all, without masks: a hundred take a second."""
_QUIET = EvaluationPlan(every=0, server=False)


def watched_by(simulation: Simulation, canaries: int | None, seed: int) -> Watched:
    """Return the population with canaries in it.

    Args: canaries: how many coins; None for an eighth of the parameters, within what is of use.
    Raises: ConfigError: if there are more than a cohort can hold, or training diverges.
    """
    spec, private = simulation.trainer.spec, simulation.strategy.privacy() is not None
    template = _template(simulation)
    most_useful = 1000 if private else 64  # without a claim, a few tell enough
    count = min(most_useful, max(16, spec.parameter_count // 8)) if canaries is None else canaries
    length = float(template.values.double().norm())
    if private:
        bound = simulation.strategy.pipeline().l2_bound(math.inf)
        length = _LOUD * max(length, bound if math.isfinite(bound) else 0.0)
    real, most = simulation.population, most_at_once(simulation)
    if most is not None and canaries is None:
        count = max(8, min(count, most))
    made = Canaries(count, spec.parameter_count, length, template, seed)
    if most is not None and len(real) + len(made.members) > most:
        if most <= len(made.members):
            raise ConfigError(f"{count} canaries are too many for cohorts of at most {most}; take {most} or fewer")
        real = FirstClients(real, most - len(made.members))
    return Watched(real, made)


def _template(simulation: Simulation) -> Update:
    """Return what the first client would send in the first round, before a strategy's protection."""
    data, clients = simulation.population.load(0).train, simulation.private_clients
    key: tuple[Key, ...] = (simulation.seed, "audit", "template")
    start, training = simulation.trainer.initial(), simulation.training
    if clients is None:
        update = simulation.trainer.train(start, data, training, round_number=1, key=key)
    else:
        trainer = clients.trainer(simulation.task, simulation.seed, device=simulation.device)
        update = trainer.train(start, data, training, round_number=1, key=key)
    if not bool(torch.isfinite(update.values).all()):
        raise ConfigError("the first client's training diverged; lower the learning rate before an audit")
    return update


def shortened(simulation: Simulation) -> Simulation:
    """Return the run, or, where it takes secure sums of thousands, its first rounds, which an audit has time for."""
    if not simulation.strategy.takes_secure_sums:
        return simulation
    most = max(1, _MOST_SUMMED // len(simulation.population))
    return dataclasses.replace(simulation, rounds=most) if most < simulation.rounds else simulation


def masked_alone(simulation: Simulation, members: int) -> bool:
    """Return whether masks are drawn in a run of their own, since all rounds of `members` would take minutes."""
    strategy = simulation.strategy
    masked = isinstance(strategy, SecureAggregation) and strategy.draw_masks
    return masked and members * simulation.rounds > _MOST_MASKED


def run_watched(
    simulation: Simulation, watched: Watched, out: Path, *callbacks: Callback
) -> tuple[Simulation, History]:
    """Return the run with canaries, and what became of it; its sums are those of the run, with masks or without."""
    strategy = simulation.strategy
    run = dataclasses.replace(
        simulation,
        strategy=without_masks(strategy) if masked_alone(simulation, len(watched)) else strategy,
        clients=watched,
        engine=with_canaries(simulation.engine, watched),
        evaluation=EvaluationPlan(every=0, server=simulation.evaluation.server),
        early_stopping=None,
        faults=Faults(),
        fleet=None,
    )
    return run, run.run(out=out, overwrite=True, callbacks=callbacks)


def run_masked(simulation: Simulation, out: Path) -> History:
    """Return one round of as few members as the protocol lets sum up, with every mask, key and signature."""
    strategy = simulation.strategy
    assert isinstance(strategy, SecureAggregation)
    protocol, population = strategy.protocol, simulation.population
    fewest = math.ceil(protocol.minimum / (1 - float(getattr(protocol, "dropout_share", 0.0))))
    clients = FirstClients(population, fewest) if fewest < len(population) else population
    return dataclasses.replace(
        simulation,
        clients=clients,
        rounds=1,
        evaluation=_QUIET,
        early_stopping=None,
        faults=Faults(),
        fleet=None,
    ).run(out=out, overwrite=True)


def run_quietly(simulation: Simulation) -> History:
    """Return the run without canaries; the sums are the same without masks, and come at once."""
    strategy = without_masks(simulation.strategy)
    return dataclasses.replace(
        simulation, strategy=strategy, evaluation=_QUIET, early_stopping=None, faults=Faults(), fleet=None
    ).run()

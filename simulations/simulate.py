"""A whole simulated run in one call, for scripts and for the command line."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from clients.memory import InProcessMemory
from clients.torch_trainer import TorchTrainer
from fedml_core.errors import ConfigError
from fedml_core.named import nearest
from fedml_core.task import Task
from fedml_core.training import Training
from server.checkpoint import RunState
from server.coordinator import Coordinator
from server.history import History, RunFolder, summarise
from server.plan import EarlyStopping, EvaluationPlan, Plan
from server.round import RoundReport
from server.sampling import EveryClient, Sampling
from simulations.channel import SimulationChannel
from simulations.engines.engine import Engine
from simulations.engines.sequential import Sequential
from simulations.faults import Faults
from simulations.partition import Iid
from simulations.partition_contract import Partitioner
from simulations.population import Population, population_of
from strategies.strategy import Strategy

Callback = Callable[[RoundReport, RunState], object]


@dataclass(frozen=True)
class Simulation:
    """A simulated federation: what `simulate` takes by name.

    `clients`: the size of the population. `rounds`: in all, resumed ones included. `partition`: how pooled examples are
    shared out. `holdout`: the share that each client keeps aside. `sampling`: each round's cohort. `device`: "auto",
    "cpu", "cuda", ... `seed`: of everything that must reproduce.
    """

    task: Task
    strategy: Strategy
    clients: int = 10
    rounds: int = 10
    sampling: Sampling = field(default_factory=EveryClient)
    training: Training = field(default_factory=Training)
    partition: Partitioner = field(default_factory=Iid)
    holdout: float = 0.0
    evaluation: EvaluationPlan = field(default_factory=EvaluationPlan)
    early_stopping: EarlyStopping | None = None
    faults: Faults = field(default_factory=Faults)
    engine: Engine = field(default_factory=Sequential)
    minimum_replies: int = 1
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        """Check what can be checked before any data is loaded."""
        if self.clients < 1:
            raise ConfigError(f"clients must be >= 1, got {self.clients}")
        if self.rounds < 1:
            raise ConfigError(f"rounds must be >= 1, got {self.rounds}")
        self.sampling.require(self.clients)
        if self.evaluation.clients is not None:
            self.evaluation.clients.require(self.clients)

    @cached_property
    def plan(self) -> Plan:
        """Return what each round does."""
        return Plan(
            strategy=self.strategy,
            training=self.training,
            sampling=self.sampling,
            seed=self.seed,
            minimum_replies=self.minimum_replies,
            evaluation=self.evaluation,
            early_stopping=self.early_stopping,
        )

    @cached_property
    def population(self) -> Population:
        """Return the clients."""
        return population_of(self.task, self.partition, self.clients, seed=self.seed, holdout=self.holdout)

    @cached_property
    def trainer(self) -> TorchTrainer:
        """Return the trainer that the clients share."""
        return TorchTrainer(self.task, self.seed, device=self.device)

    def run(
        self,
        *,
        out: Path | None = None,
        resume: bool = False,
        overwrite: bool = False,
        callbacks: Sequence[Callback] = (),
    ) -> History:
        """Run it, recording to the folder `out` if there is one, calling each callback after each round."""
        folder = RunFolder(out, self.plan) if out is not None else None
        memory, state = InProcessMemory(), self._state(folder, resume=resume, overwrite=overwrite)
        memory.restore(state.extra)
        coordinator = self._coordinator(state)
        reports = folder.reports() if folder and resume else []
        channel = SimulationChannel(
            self.population, self.trainer, memory, engine=self.engine, faults=self.faults, seed=self.seed
        )
        for report in coordinator.rounds(channel, self.rounds):
            reports.append(report)
            coordinator.state = dataclasses.replace(coordinator.state, extra=memory.to_tree())
            if folder is not None:
                folder.record(coordinator.state)
            for callback in callbacks:
                callback(report, coordinator.state)
        facts = {"clients": len(self.population), "engine": self.engine.name, "out": str(out) if out else None}
        history = History(reports, coordinator.state.parameters, self.trainer.spec, summarise(reports, **facts))
        if folder is not None:
            folder.finish(history.summary)
        return history

    def _state(self, folder: RunFolder | None, *, resume: bool, overwrite: bool) -> RunState:
        spec = self.trainer.spec

        def fresh() -> RunState:
            return Coordinator.begin(self.plan, spec, self.trainer.initial(), uuid.uuid4().hex)

        if folder is not None:
            return folder.begin(fresh, spec, resume=resume, overwrite=overwrite)
        if resume:
            raise ConfigError("resume needs the folder of the run; give out=")
        return fresh()

    def _coordinator(self, state: RunState) -> Coordinator:
        held_out = self.task.test_data() if self.task.test_data else None
        if held_out is not None:
            self.task.check(held_out, "the task's test_data")
        return Coordinator(
            self.plan,
            self.trainer.spec,
            state,
            evaluate=None if held_out is None else lambda parameters: self.trainer.evaluate(parameters, held_out),
            derive=self.task.derive,
        )


def simulate(
    task: Task,
    strategy: Strategy,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> History:
    """Return the history of a simulated federation; `settings` are the fields of `Simulation`.

    Raises: ConfigError: for a setting that does not exist (the nearest is offered) or cannot be. TaskError: if the
        task's functions fail. RunError: if every round was void.

    Example:
        history = simulate(task, FedAvg(), clients=100, rounds=20, sampling=FixedSampling(10))
    """
    known = {f.name for f in dataclasses.fields(Simulation)}
    for name in settings:
        if name not in known:
            raise ConfigError(f"simulate has no setting {name!r}; {nearest(name, known)}")
    simulation = Simulation(task, strategy, **settings)
    return simulation.run(
        out=None if out is None else Path(out), resume=resume, overwrite=overwrite, callbacks=callbacks
    )

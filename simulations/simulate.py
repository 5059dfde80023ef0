"""A whole simulated run in one call, for scripts and for the command line."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clients.memory import InProcessMemory, MemoryStore, SpillingMemory
from clients.torch_trainer import TorchTrainer
from fedml_core.errors import ConfigError
from fedml_core.named import nearest
from fedml_core.task import Task
from fedml_core.training import Training
from server.checkpoint import RunState
from server.coordinator import Coordinator
from server.history import History, RunFolder
from server.plan import EarlyStopping, EvaluationPlan, Plan
from server.record import Callback, coordinator_for, finished, record_rounds
from server.round import RoundReport
from server.sampling import EveryClient, Sampling
from simulations.channel import SimulationChannel
from simulations.engines.engine import Engine, Stage
from simulations.engines.suited import Suited
from simulations.faults import Faults
from simulations.partition import Iid
from simulations.partition_contract import Partitioner
from simulations.population import Population, population_of
from simulations.virtual_time import Fleet, VirtualClock, reached, require_same
from strategies.strategy import Strategy

if TYPE_CHECKING:
    from simulations.secagg import VirtualMembers

_CLOCK = "clock"  # where a checkpoint keeps the virtual time, beside the clients' memories


@dataclass(frozen=True)
class Simulation:
    """A simulated federation: what `simulate` takes by name.

    `clients`: how many, or the clients themselves, such as a source: `NpzClients("data")`. `rounds`: in all, resumed
    ones included. `partition`: how pooled examples are shared out. `holdout`: the share that each client keeps aside.
    `sampling`: each round's cohort. `device`: "auto", "cpu", "cuda", ... `seed`: of everything that must reproduce.
    `fleet`: the devices to pretend to run on; `round_timeout_s`: the deadline on their virtual clock. Without a fleet
    nothing takes time and nobody is late. `memory_bytes`: of what clients remember in a run with a folder; the rest of
    it lies in the folder.
    """

    task: Task
    strategy: Strategy
    clients: int | Population = 10
    rounds: int = 10
    sampling: Sampling = field(default_factory=EveryClient)
    training: Training = field(default_factory=Training)
    partition: Partitioner = field(default_factory=Iid)
    holdout: float = 0.0
    evaluation: EvaluationPlan = field(default_factory=EvaluationPlan)
    early_stopping: EarlyStopping | None = None
    faults: Faults = field(default_factory=Faults)
    engine: Engine = field(default_factory=Suited)
    fleet: Fleet | None = None
    minimum_replies: int = 1
    round_timeout_s: float | None = None
    seed: int = 0
    device: str = "auto"
    memory_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        """Check what can be checked before any data is loaded."""
        count = self.clients if isinstance(self.clients, int) else len(self.clients)
        if count < 1:
            raise ConfigError(f"clients must be >= 1, got {count}")
        if self.rounds < 1:
            raise ConfigError(f"rounds must be >= 1, got {self.rounds}")
        self.sampling.require(count)
        if self.evaluation.clients is not None:
            self.evaluation.clients.require(count)

    @cached_property
    def plan(self) -> Plan:
        """Return what each round does."""
        return Plan(
            strategy=self.strategy,
            training=self.training,
            sampling=self.sampling,
            seed=self.seed,
            minimum_replies=self.minimum_replies,
            round_timeout_s=self.round_timeout_s,
            evaluation=self.evaluation,
            early_stopping=self.early_stopping,
        )

    @cached_property
    def population(self) -> Population:
        """Return the clients."""
        if not isinstance(self.clients, int):
            return self.clients
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
        state = self._state(folder, resume=resume, overwrite=overwrite)
        memory: InProcessMemory | SpillingMemory
        memory = InProcessMemory() if out is None else SpillingMemory(out, self.memory_bytes)
        clock = None if self.fleet is None else VirtualClock(self.fleet, self.population, self.seed)
        extra = dict(state.extra)
        time = extra.pop(_CLOCK, {})
        with ExitStack() as held:
            held.callback(memory.close)
            memory.restore(extra)
            if clock is None:
                require_same(time.get("fleet"), None)
            elif state.round > 0:
                clock.restore(time)
            virtual = self._virtual_members() if self.strategy.takes_secure_sums else None
            coordinator = coordinator_for(
                self.task,
                self.plan,
                state,
                self.trainer,
                witnesses=None if virtual is None else virtual.witnesses,
                folder=folder,
            )
            stage = self._stage(memory)
            session = self.engine.open(stage)
            held.callback(session.close)
            members = None if virtual is None else virtual.members(stage, session)
            reports = record_rounds(
                coordinator,
                SimulationChannel(stage, session, clock, members),
                self.rounds,
                folder=folder,
                callbacks=callbacks,
                extra=lambda: {**memory.to_tree(), **({_CLOCK: clock.to_tree()} if clock else {})},
            )
        facts = {"clients": len(self.population), "engine": self.engine.name, **self._times(clock, reports)}
        return finished(coordinator, reports, folder, **facts)

    def _virtual_members(self) -> VirtualMembers:
        from simulations.secagg import VirtualMembers  # loads cryptography, which sums in the clear do without
        from strategies.secure import SecureAggregation

        assert isinstance(self.strategy, SecureAggregation)
        return VirtualMembers(len(self.population), draw_masks=self.strategy.draw_masks)

    def _times(self, clock: VirtualClock | None, reports: Sequence[RoundReport]) -> dict[str, Any]:
        """Return what the summary says about virtual time."""
        if clock is None or self.fleet is None:
            return {}
        targets = reached(reports, self.fleet.targets)
        return {"virtual_seconds": clock.now_s, **({"targets": targets} if targets else {})}

    def _stage(self, memory: MemoryStore) -> Stage:
        return Stage(
            task=self.task,
            trainer=self.trainer,
            population=self.population,
            memory=memory,
            strategy=self.strategy,
            faults=self.faults,
            seed=self.seed,
        )

    def _state(self, folder: RunFolder | None, *, resume: bool, overwrite: bool) -> RunState:
        spec = self.trainer.spec

        def fresh() -> RunState:
            return Coordinator.begin(self.plan, spec, self.trainer.initial(), uuid.uuid4().hex)

        if folder is not None:
            return folder.begin(fresh, spec, resume=resume, overwrite=overwrite)
        if resume:
            raise ConfigError("resume needs the folder of the run; give out=")
        return fresh()


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

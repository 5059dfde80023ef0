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

from clients.memory import InProcessMemory, MemoryStore
from clients.spilling_memory import SpillingMemory
from clients.torch_trainer import TorchTrainer
from fedml_core.data import ClientData, Data
from fedml_core.devices import without_autocast
from fedml_core.errors import CheckpointError, ConfigError
from fedml_core.named import nearest
from fedml_core.policy_tables import BudgetTable
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
from simulations.population import Population, given_clients, population_of
from simulations.private_clients import PrivateClients, require_counted
from simulations.virtual_time import Fleet, VirtualClock, reached, require_same
from strategies.strategy import Strategy

if TYPE_CHECKING:
    from clients.private_training import PrivateTraining
    from simulations.client_budget import ClientBudget
    from simulations.private_accounts import Accounts
    from simulations.secagg import VirtualMembers

_CLOCK = "clock"  # where a checkpoint keeps the virtual time, beside the clients' memories


@dataclass(frozen=True)
class Simulation:
    """A simulated federation: what `simulate` takes by name.

    `clients`: how many, or the clients themselves: a list with each one's data, or a source, such as
    `NpzClients("data")`. `rounds`: in all, resumed
    ones included. `partition`: how pooled examples are shared out. `holdout`: the share that each client keeps aside.
    `sampling`: each round's cohort. `device`: "auto", "cpu", "cuda", ... `seed`: of everything that must reproduce.
    `fleet`: the devices to pretend to run on; `round_timeout_s`: the deadline on their virtual clock. Without a fleet
    nothing takes time and nobody is late. `memory_bytes`: of what clients remember in a run with a folder; the rest of
    it lies in the folder. `private`: how every client protects its examples, or None. `budget`: at which delta that is
    counted, and the most that it may cost an example of any client, or a client where the strategy protects these and
    the budget says so; a round that would cost more is not begun.
    """

    task: Task
    strategy: Strategy
    clients: int | Population | Sequence[Data | ClientData] = 10
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
    private: PrivateTraining | None = None
    budget: BudgetTable = field(default_factory=BudgetTable)

    def __post_init__(self) -> None:
        """Check what can be checked before any data is loaded."""
        count = self.clients if isinstance(self.clients, int) else len(self.population)
        if count < 1:
            raise ConfigError(f"clients must be >= 1, got {count}")
        if self.rounds < 1:
            raise ConfigError(f"rounds must be >= 1, got {self.rounds}")
        self.sampling.require(count)
        self.strategy.require_cohort(*self._cohort_sizes(count))
        if self.evaluation.clients is not None:
            self.evaluation.clients.require(count)
        if self.private is not None:
            self.engine.require_private()
        require_counted(self.budget, self.strategy.privacy(), examples=self.private is not None)

    def _cohort_sizes(self, count: int) -> tuple[int, int]:
        """Return the fewest and the most clients of a cohort; the fewest is 0 where some may be out of reach."""
        fewest, most = self.sampling.sizes(range(count))
        return (fewest if self.fleet is None and self.faults.unavailable == 0 else 0), most

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
        if isinstance(self.clients, int):
            return population_of(self.task, self.partition, self.clients, seed=self.seed, holdout=self.holdout)
        return given_clients(self.clients)

    @cached_property
    def trainer(self) -> TorchTrainer:
        """Return the trainer that the clients share; those that protect their examples only evaluate by it."""
        return TorchTrainer(self.task, self.seed, device=self.device)

    @cached_property
    def private_clients(self) -> PrivateClients | None:
        """Return how clients protect their examples and what a training costs, or None where they do not.

        Raises: TaskError: if the model cannot be trained so, with what to use instead.
        """
        if self.private is None:
            return None
        found = PrivateClients.of(self.private, self.training)
        found.trainer(self.task, self.seed, device=self.device)
        return found

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
        _ = self.private_clients  # a model that cannot be private is refused before the folder is touched
        state = self._state(folder, resume=resume, overwrite=overwrite)
        memory: InProcessMemory | SpillingMemory
        memory = InProcessMemory() if out is None else SpillingMemory(out, self.memory_bytes)
        clock = None if self.fleet is None else VirtualClock(self.fleet, self.population, self.seed)
        extra = dict(state.extra)
        time = extra.pop(_CLOCK, {})
        with ExitStack() as held:
            held.callback(memory.close)
            held.enter_context(without_autocast(self.trainer.device))
            memory.restore(extra)
            if clock is None:
                require_same(time.get("fleet"), None)
            elif state.round > 0:
                clock.restore(time)
            accounts = self._accounts(state, out, resume=resume)
            if accounts is not None:
                held.callback(accounts.close)
            virtual = self._virtual_members() if self.strategy.takes_secure_sums else None
            coordinator = self._coordinator(state, folder, virtual)
            stage = self.stage(memory)
            if accounts is not None:
                stage = dataclasses.replace(stage, again=accounts.charge)
            session = self.engine.open(stage)
            held.callback(session.close)
            members = None if virtual is None else virtual.members(stage, session)
            if folder is not None and accounts is not None and not resume:
                folder.keep(state)  # so that a run that dies in its first round is resumed, with what that has cost
            reports = record_rounds(
                coordinator,
                SimulationChannel(stage, session, clock, members, accounts=accounts),
                self.rounds,
                folder=folder,
                callbacks=callbacks,
                extra=lambda: {**memory.to_tree(), **({_CLOCK: clock.to_tree()} if clock else {})},
            )
        facts = {"clients": len(self.population), "engine": self.engine.name, **self._times(clock, reports)}
        return finished(coordinator, reports, folder, **facts)

    def stage(self, memory: MemoryStore) -> Stage:
        """Return what an engine needs to know of the run. `memory`: what clients remember."""
        return Stage(
            task=self.task,
            trainer=self.trainer,
            population=self.population,
            memory=memory,
            strategy=self.strategy,
            faults=self.faults,
            seed=self.seed,
            private=self.private_clients,
        )

    def _coordinator(self, state: RunState, folder: RunFolder | None, virtual: VirtualMembers | None) -> Coordinator:
        return coordinator_for(
            self.task,
            self.plan,
            state,
            self.trainer,
            witnesses=None if virtual is None else virtual.witnesses,
            folder=folder,
            reserve=self._client_budget(state),
            reported=None if self.private is None else ("examples",),
        )

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

    def _accounts(self, state: RunState, out: Path | None, *, resume: bool) -> Accounts | None:
        """Return the accounts of the clients' examples, or None where these are not protected.

        Raises: CheckpointError: if the run began with other accounts, or without.
        """
        if out is None and self.private is None:
            return None
        from simulations.private_accounts import ACCOUNTS_FILE, Accounts, forget_accounts

        if out is not None and not resume:
            forget_accounts(out)
        if self.private_clients is None:
            if out is not None and (out / ACCOUNTS_FILE).exists():
                raise CheckpointError(
                    f"{out} holds a run whose clients protect their examples, and now they would not; restore "
                    "[clients.examples], or start a new run in another folder"
                )
            return None
        reported = ((state.report or {}).get("example_privacy") or {}) if resume else None
        return Accounts(self.private_clients, self.budget, folder=out, run=state.run, reported=reported)

    def _client_budget(self, state: RunState) -> ClientBudget | None:
        terms = self.strategy.privacy()
        if terms is None or not self.budget.limited or self.budget.unit != terms.unit:
            return None
        from simulations.client_budget import ClientBudget  # loads the accountant, which others do without

        return ClientBudget(self.budget, terms, terms.adjacent(self.sampling.adjacency), state)

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

"""What a run.toml and a site.toml may say: checked once, on load, so that a mistake costs a line and not a run.

What a file reads (the task, keys, memories) is relative to the file's own folder; `out`, where a run writes, is
relative to the working directory, as every path on a command line is. What a table names (a strategy, a sampling, a
partitioner) is looked up later, when the user's own classes are loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from fedml_core.config_tables import ConfigFile, Table, Text
from fedml_core.policy_tables import BudgetTable, ExampleTable, LedgerTable, PolicyTable, RunBudgetTable
from fedml_core.training import Training

__all__ = [
    "ClientsTable",
    "EarlyStoppingTable",
    "EvaluationTable",
    "FaultsTable",
    "KeysTable",
    "RunConfig",
    "SecureAggregationTable",
    "ServerTable",
    "SimulationTable",
    "SiteConfig",
    "load_run",
    "load_site",
]


def _with_name(value: Any) -> Any:
    table = {"name": value} if isinstance(value, str) else value
    if not isinstance(table, dict) or not isinstance(table.get("name"), str):
        raise ValueError('must be a name, or a table with one such as {name = "..."}')
    return table


NamedTable = Annotated[dict[str, Any], BeforeValidator(_with_name)]
"""`"FedProx"` or `{name = "FedProx", mu = 0.01}`: a name, and the arguments of what it names."""


def _operator(digits: str) -> str:
    from fedml_core.operator_key import is_operator  # loads cryptography, for which a simulation need not wait

    if not is_operator(digits):
        raise ValueError("must be the 64 hex digits that fedveil keys operator printed")
    return digits


Operator = Annotated[str, AfterValidator(_operator)]
"""An operator's public key, as hex."""
Share = Annotated[float, Field(ge=0, le=1)]
Member = Annotated[int, Field(ge=0, le=2**31 - 1)]


class ClientsTable(Table):
    """The simulated clients."""

    count: int = Field(default=10, ge=1)
    """How many there are."""
    source: NamedTable | None = None
    """Files that hold each client's data, in the place of the task's own; see `fedveil list sources`."""
    partition: NamedTable = Field(default_factory=lambda: {"name": "iid"})
    """How the task's pooled examples are shared out; see `fedveil list partitioners`."""
    holdout: float = Field(default=0.0, ge=0, lt=1)
    """The share of its examples that each client keeps aside for evaluation."""
    examples: ExampleTable | None = None
    """How every simulated client protects its examples, as a real site's site.toml says for itself."""


class EvaluationTable(Table):
    """When and by whom the model is evaluated."""

    every: int = Field(default=1, ge=0)
    """Rounds between evaluations; 0 is never but after the last."""
    server: bool = True
    """On the task's own test data."""
    clients: NamedTable | None = None
    """A sampling of clients that evaluate on what they keep aside."""
    batch_size: int = Field(default=256, ge=1)
    """Examples a batch."""


class EarlyStoppingTable(Table):
    """Stop when a metric no longer improves."""

    metric: Text = "server.loss"
    """server.NAME, clients.NAME or train.NAME."""
    patience: int = Field(default=5, ge=1)
    """Evaluations without improvement."""
    minimum_change: float = Field(default=0.0, ge=0)
    """What counts as improvement."""
    higher_is_better: bool | None = None
    """By default, not for what is called loss, error, mae, rmse or perplexity."""


class FaultsTable(Table):
    """What goes wrong in a simulation, as shares of the clients, drawn in each round."""

    unavailable: Share = 0.0
    """Of all clients: cannot be asked."""
    drop: Share = 0.0
    """Of the cohort: never reply."""
    late: Share = 0.0
    """Of the cohort: reply after the deadline."""
    nan: Share = 0.0
    """Of the cohort: send an update that is not finite."""


class SimulationTable(Table):
    """How a simulation is run; it does not change what is computed."""

    engine: NamedTable = Field(default_factory=lambda: {"name": "suited"})
    """Who does the clients' work."""
    device: Text = "auto"
    """auto, cpu, cuda, cuda:1, mps, ..."""
    on_client_error: Literal["fail", "skip"] = "fail"
    """What a client's failure does: ends the run, or excludes the client from the round."""
    faults: FaultsTable = FaultsTable()
    """Shares of clients that fail on purpose."""
    fleet: dict[str, Any] | None = None
    """The devices to pretend to run on, on a virtual clock: speeds, bandwidths, availability, targets."""


class ServerTable(Table):
    """How `fedveil server` waits for real clients."""

    minimum_clients: int = Field(default=1, ge=1)
    """A round starts when so many are connected."""
    wait_s: float | None = Field(default=None, gt=0)
    """Seconds to wait for them before giving up; by default for ever."""


class RunConfig(ConfigFile):
    """A run.toml: what a run is to do, simulated or on real machines."""

    task: Text
    """A file, such as "task.py", or "package.module:attribute"."""
    rounds: int = Field(default=10, ge=1)
    """In all, resumed ones included."""
    seed: int = 0
    """Of everything that must reproduce; it protects nothing."""
    out: Text = "out"
    """The folder for checkpoint, history, report and plots, relative to the working directory."""
    minimum_replies: int = Field(default=1, ge=1)
    """With fewer good replies a round is void and leaves the model unchanged."""
    round_timeout_s: float | None = Field(default=None, gt=0)
    """Seconds to wait for a round's replies; by default for all of them. In a simulation, of its fleet's clock."""
    strategy: NamedTable = Field(default_factory=lambda: {"name": "FedAvg"})
    """How updates become one step; see `fedveil list strategies`."""
    clients: ClientsTable = ClientsTable()
    """The simulated clients."""
    sampling: NamedTable = Field(default_factory=lambda: {"name": "EveryClient"})
    """Each round's cohort; see `fedveil list samplings`."""
    training: Training = Training()
    """Local training."""
    evaluation: EvaluationTable = EvaluationTable()
    """When and by whom the model is evaluated."""
    early_stopping: EarlyStoppingTable | None = None
    """Stop when a metric no longer improves."""
    simulation: SimulationTable = SimulationTable()
    """For `fedveil simulate`."""
    server: ServerTable = ServerTable()
    """For `fedveil server`."""
    budget: RunBudgetTable = RunBudgetTable()
    """What `fedveil server` may spend on its clients' privacy."""
    ledger: LedgerTable = LedgerTable()
    """Where it writes down what was spent."""


class KeysTable(Table):
    """Where a site's secrets are; see `fedveil keys`."""

    site: Text = "site-keys.json"
    """What `fedveil keys new` made, or the folder that holds it."""
    authority: Text | None = None
    """The federation's ca.pem, by which the server is recognised."""


class SecureAggregationTable(Table):
    """The least protection under which a site takes part in a secure sum; a server that asks for less is refused."""

    required: bool = False
    """Whether this site trains under secure aggregation only."""
    roster: Text = "roster.json"
    """The operator's signed roster, which names every site and its key."""
    operator: Operator | None = None
    """The operator's public key, by which the roster is recognised; see `fedveil keys operator`."""
    minimum_cohort: int = Field(default=3, ge=2)
    """The fewest members whose sum the server may learn."""
    minimum_threshold: int = Field(default=2, ge=2)
    """The fewest members that together can open another's secrets."""
    minimum_security_bits: int = Field(default=60, ge=20, le=128)
    """Of cohorts too large for all to be neighbours: an unlucky graph must be as unlikely as 2^-bits."""
    corrupt_share: float = Field(default=0.1, ge=0, lt=1)
    """The share of members that this site believes may collude with the server."""
    allow_semi_honest: bool = False
    """Whether to believe that the server follows the protocol, where it asks for that."""
    maximum_attempts: int = Field(default=3, ge=1)
    """How often a round may be tried."""
    assistants: list[Member] | None = None
    """Whom this site trusts to assist in one-shot sums, by client numbers; by default everybody on the roster."""

    @model_validator(mode="after")
    def _can_be_met(self) -> Self:
        if self.required and self.operator is None and not self.allow_semi_honest:
            raise ValueError("must name the operator where required = true, or no server could ever be answered")
        return self


class SiteConfig(ConfigFile):
    """A site.toml: who this client is and what it holds. It never leaves the site."""

    id: int = Field(ge=0, le=2**31 - 1)
    """The client's number, as it was enrolled."""
    name: Text | None = None
    """For people."""
    task: Text
    """A file, such as "task.py", or "package.module:attribute": the same task as the server's."""
    device: Text = "auto"
    """auto, cpu, cuda, cuda:1, mps, ..."""
    memory: Text = "memory"
    """The folder for what the site must remember between rounds."""
    keys: KeysTable = KeysTable()
    """The site's secrets."""
    secure_aggregation: SecureAggregationTable = SecureAggregationTable()
    """What secure aggregation must give this site."""
    policy: PolicyTable = PolicyTable()
    """What this site takes part in at all."""
    budget: BudgetTable = BudgetTable()
    """What may be spent on its data."""
    ledger: LedgerTable = LedgerTable()
    """Where it writes down what was spent."""
    examples: ExampleTable | None = None
    """How every example is protected; without it, none is by itself."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Handed to the task's `site_data` as it is."""


def load_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the run.toml at `path`, or in the folder `path`.

    Args: overrides: `key.path=value` each, where value is TOML or else text; they take the place of what the file says.
    Raises: ConfigError: a line for each mistake, with file, key, value and what is allowed.
    """
    return RunConfig.load(path / "run.toml" if path.is_dir() else path, overrides)


def load_site(path: Path) -> SiteConfig:
    """Return the site.toml at `path`, or in the folder `path`.

    Raises: ConfigError: as `load_run`.
    """
    return SiteConfig.load(path / "site.toml" if path.is_dir() else path, ())

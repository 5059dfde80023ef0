"""What a site.toml says about protection: the ledger, the budget, and the least under which the site takes part.

Checked on load; see `clients.policy` for what each key does and `fedml_core.config` for the rest of the file.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from fedml_core.config_tables import Table, Text

__all__ = ["PROTECTIONS", "BudgetTable", "FloorTable", "LedgerTable", "MetricsTable", "PolicyTable", "RunBudgetTable"]

PROTECTIONS = ("none", "secure-aggregation", "central", "distributed", "local", "example")
"""What may protect an update: nothing; masks; noise at the server, in the sum, at the client, in each step."""


def _protections(text: str) -> str:
    words = text.split("+")
    if unknown := [word for word in words if word not in PROTECTIONS]:
        raise ValueError(
            f"{unknown[0]!r} is no protection; known: {', '.join(PROTECTIONS)}, joined by + where all must"
        )
    if "none" in words and len(words) > 1:
        raise ValueError("none cannot be joined with a protection")
    return text


class BudgetTable(Table):
    """The most that may be spent on the data set; without a limit here nothing is refused for its cost."""

    epsilon: float | None = Field(default=None, gt=0)
    """For ever, over all runs and servers."""
    epsilon_per_run: float | None = Field(default=None, gt=0)
    """In one run."""
    epsilon_per_round: float | None = Field(default=None, gt=0)
    """In one round."""
    delta: float = Field(default=1e-5, gt=0, lt=1)
    """At which every epsilon is worked out; well below one over the number of units."""
    unit: Literal["example", "client"] = "example"
    """Whose privacy is counted: one example's, or the whole site's."""
    adjacency: Literal["add-or-remove-one", "replace-one", "replace-special"] = "add-or-remove-one"
    """How neighbouring data sets differ."""

    @property
    def limited(self) -> bool:
        """Return whether there is a limit."""
        return any(limit is not None for limit in (self.epsilon, self.epsilon_per_run, self.epsilon_per_round))


class RunBudgetTable(BudgetTable):
    """The most that a server may spend on its clients."""

    unit: Literal["example", "client"] = "client"
    """Whose privacy is counted: one client's, or one example's."""


class LedgerTable(Table):
    """Where it is written down what was released about the data."""

    path: Text | None = None
    """The file; by default ledger.sqlite in a site's memory folder, or in a run's. Sites of one holder may share it."""
    head: Text | None = None
    """The file that says how far the ledger went; by default beside it. Best on another disk."""
    dataset: Text | None = None
    """The data's name, for ever: newer files about the same people keep it. By default client-<id>, or clients."""


class ExampleTable(Table):
    """Private training by example (DP-SGD): with this table a site trains in no other way, whatever a server asks."""

    noise_multiplier: float = Field(gt=0)
    """Noise's standard deviation over the bound on one example's gradient."""
    clip_norm: float = Field(gt=0)
    """The bound on one example's gradient (L2); where clipping is adaptive, the first."""
    sampling_rate: float = Field(gt=0, le=1)
    """The probability with which an example is in a batch."""
    clipping: Literal["flat", "per-layer", "adaptive"] = "flat"
    """What is bound: the whole gradient, each layer's, or the whole by a bound that follows the gradients."""
    max_physical_batch: int = Field(default=512, ge=1)
    """How many examples are in memory at a time."""
    gradients: Literal["auto", "bookkeeping", "vmap", "hooks", "functorch", "ghost"] = "auto"
    """How clipped gradients are taken; the last three are Opacus's."""


class FloorTable(Table):
    """The least that one kind of noise must be."""

    minimum_noise_multiplier: float = Field(default=0.0, ge=0)
    """Noise's standard deviation over the bound on one unit's influence."""
    maximum_clip_norm: float | None = Field(default=None, gt=0)
    """The bound on this site's update (L2, in parameter units)."""
    maximum_sampling_rate: float | None = Field(default=None, gt=0, le=1)
    """The share of units that take part in a step."""


class MetricsTable(Table):
    """What a site says about its own results."""

    names: list[Text] | None = None
    """Which metrics may leave (loss, accuracy, ...); by default all where no noise is claimed, else none."""
    step: float | None = Field(default=None, gt=0)
    """To what means are rounded, such as 0.05."""
    examples_step: int | None = Field(default=None, ge=1)
    """To what the number of examples is rounded down, at least once it."""
    evaluate: bool = True
    """Whether the site evaluates models on what it keeps aside."""


class PolicyTable(Table):
    """What the site takes part in; a server that asks for anything else is refused, with the key and the numbers."""

    accept: list[Annotated[str, AfterValidator(_protections)]] = Field(default_factory=lambda: ["none"], min_length=1)
    """The protections that are enough, each by itself; "secure-aggregation+central" asks for both."""
    runs: list[Text] | None = None
    """Runs by their id, or patterns such as "a1b2*"; by default all."""
    servers: list[Text] | None = None
    """Servers as HOST:PORT, or patterns; by default all."""
    transforms: list[Text] | None = None
    """What may be done to updates, by the names of transforms; by default everything that is installed."""
    optimizers: list[Text] | None = None
    """What may train, by the names of torch.optim; by default every one."""
    uniform_weights: bool = False
    """Whether every site must count the same: a weight by examples tells how many there are."""
    maximum_rounds: int | None = Field(default=None, ge=1)
    """The last round of a run."""
    maximum_participations: int | None = Field(default=None, ge=1)
    """How often the site trains in one run, over restarts."""
    maximum_epochs: int | None = Field(default=None, ge=1)
    """Passes over the data in one round."""
    maximum_steps: int | None = Field(default=None, ge=1)
    """Batches in one round."""
    central: FloorTable = FloorTable()
    """Noise that the server promises to add; the site can check the clipping, and must believe the noise."""
    distributed: FloorTable = FloorTable()
    """Noise that the members of a secure sum add together."""
    local: FloorTable = FloorTable()
    """Noise that the site adds to its own update."""
    example: FloorTable = FloorTable()
    """Noise in every step of the site's own training."""
    metrics: MetricsTable = MetricsTable()
    """What the site says about its own results."""

    @model_validator(mode="after")
    def _can_be_met(self) -> Self:
        for name, listed in (("runs", self.runs), ("servers", self.servers), ("optimizers", self.optimizers)):
            if listed == []:
                raise ValueError(f"must name at least one of {name}, or leave {name} out")
        accepted = {word for choice in self.accept for word in choice.split("+")}
        if "accept" in self.model_fields_set and "none" in accepted:
            return self
        for kind in ("central", "distributed", "local"):
            if kind in self.model_fields_set and kind not in accepted:
                raise ValueError(f"must name {kind} in accept, or [policy.{kind}] would refuse nothing")
        return self

"""What crosses the one seam: an assignment to clients, a reply back, and the channel that carries them.

Simulation and deployment differ in the channel and in nothing else. A message holds weights, numbers and names; never
code. Their one wire form is that of `fedml_core.message_frames`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray
from torch import Tensor

from fedml_core.bulk import BulkArrival, GatheredArrival
from fedml_core.training import Training
from fedml_core.transform import Chain, State, Transform
from fedml_core.update import Update

if TYPE_CHECKING:
    from fedml_core.ring import Encoding


@dataclass(frozen=True)
class TrainWork:
    """Train, run the pipeline's client half, send the update. `seed` shuffles and drops out; it protects nothing.

    `promised`: the event of the noise that the server says it will add to the sum, or None; a site can only believe it.
    `ring`: how a simulation's engine adds updates up as ring vectors, or None; it never crosses a wire.
    """

    training: Training
    pipeline: Transform = field(default_factory=Chain)
    told: State = field(default_factory=dict, repr=False)
    seed: int = 0
    ring: Encoding | None = None
    promised: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class EvaluateWork:
    """Evaluate the model on the client's own held-out examples and send summed metrics."""

    batch_size: int = 256


@dataclass(frozen=True)
class SecureWork:
    """One exchange of a secure sum: `stage` names it, `parts` are messages of the protocol, by name.

    `train`: what to train before the masks go on, in the exchange where they do.
    """

    stage: str
    parts: Mapping[str, bytes] = field(repr=False)
    train: TrainWork | None = None


Work = TrainWork | EvaluateWork | SecureWork


@dataclass(frozen=True)
class Assignment:
    """What a server asks of every client of a cohort in one exchange."""

    run: str
    round: int
    fingerprint: str
    parameters: Tensor = field(repr=False)
    work: Work


@dataclass(frozen=True)
class Evaluation:
    """Summed metrics over a client's held-out examples; `sums["examples"]` is what to divide by."""

    sums: Mapping[str, float]


@dataclass(frozen=True)
class SecureAnswer:
    """A client's messages in one exchange of a secure sum, by name, and its masked vector where one is due.

    `vector`: unsigned ring elements of shape (length,); uniform to whoever knows none of the masks.
    """

    parts: Mapping[str, bytes] = field(repr=False)
    vector: NDArray[Any] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Refusal:
    """The client's own policy said no: which rule, and the numbers."""

    rule: str
    reason: str


@dataclass(frozen=True)
class Failure:
    """The client could not do the work: one word for reports and a line without data, weights or paths in it."""

    rule: str
    reason: str


Body = Update | Evaluation | SecureAnswer | Refusal | Failure


@dataclass(frozen=True)
class Reply:
    """What a client answers to an assignment."""

    run: str
    round: int
    client: int
    fingerprint: str
    body: Body


@dataclass(frozen=True)
class Arrival:
    """A reply as the channel received it: from whom, by the channel's own knowledge, and how large it was."""

    client: int
    reply: Reply
    size_bytes: int


Arrived = Arrival | BulkArrival | GatheredArrival


class Channel(Protocol):
    """The one seam between a coordinator and its clients."""

    def clients(self, round_number: int) -> Sequence[int]:
        """Return, sorted, the clients that can be asked in this round; a `range` where the population is virtual."""
        ...

    def exchange(self, assignment: Assignment, cohort: Sequence[int], timeout_s: float | None) -> Iterator[Arrived]:
        """Send `assignment` to each client of `cohort` and yield replies as they arrive, until all did or time is up.

        A client that cannot be reached yields nothing; one that reports its own failure yields a `Failure`.
        """
        ...

    def deliver(self, assignments: Mapping[int, Assignment], timeout_s: float | None) -> Iterator[Arrived]:
        """Do as `exchange` with an assignment for each client."""
        ...

"""One secure sum with a real session for each client and for the server, and whose CPU seconds each step took.

Everything of the protocol is done as in the fleet but for the transport: adverts signed and verified, shares sealed,
vectors encoded and masked, survivors confirmed. A few clients are measured, and share nothing with each other; to save
time, what the others read and verify alike, they do once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from benchmarks.secagg_roofline import Roofline
from clients.secagg import SecureMember
from clients.standing import Standing
from fedml_core.binding import binding_of
from fedml_core.errors import ConfigError, SecureAggregationError
from fedml_core.message_frames import assignment_to_frame, reply_to_frame
from fedml_core.messages import Arrival, Assignment, Reply, SecureWork, TrainWork
from fedml_core.model import ModelSpec
from fedml_core.secagg.bulletin import Bulletin, verify
from fedml_core.training import Training
from fedml_core.update import Update
from server.gathering import Order
from server.secagg import SecureGathering
from server.secure_exchange import Witnesses
from simulations.virtual_sites import AnySite, SharedWork
from strategies import FedAvg
from strategies.secure import SecAggPlus, SecureAggregation

__all__ = ["SecureSum", "take"]

_DIGEST = "ab" * 32
_CLIP = 1.0
_MAX_WEIGHT = 100.0
_MEASURED = 3
_ROOFLINE_MASKS = 20


@dataclass(frozen=True)
class SecureSum:
    """What is measured. `dropouts`: so many clients share their keys and then send no vector. `threads`: for masks."""

    clients: int
    parameters: int
    dropouts: int
    protocol: SecAggPlus
    threads: int = 1

    def __post_init__(self) -> None:
        """Check that somebody is left."""
        if self.parameters < 1 or self.clients < 2 or not 0 <= self.dropouts < self.clients or self.threads < 1:
            raise ConfigError(
                "a secure sum is measured with at least 1 parameter, 2 clients, 1 thread and fewer dropouts than "
                f"clients, got {self.parameters}, {self.clients}, {self.threads} and {self.dropouts}"
            )

    def weight(self, client: int) -> float:
        """Return the weight of one client: 1 to 100."""
        return float(1 + client % int(_MAX_WEIGHT))

    def update(self, client: int) -> Tensor:
        """Return one client's update, not weighted; some of its coordinates lie beyond the clip."""
        generator = torch.Generator().manual_seed(client)
        return torch.randn(self.parameters, generator=generator).mul_(0.3)


@dataclass
class Costs:
    """CPU seconds by exchange: of one measured client in the mean, and of the server. Bytes are those of one client.

    The wall seconds are those of all exchanges together.
    """

    client: dict[str, float] = field(default_factory=dict)
    server: dict[str, float] = field(default_factory=dict)
    client_wall_s: float = 0.0
    server_wall_s: float = 0.0
    upload_bytes: int = 0
    download_bytes: int = 0
    client_mask_s: list[float] = field(default_factory=list)
    server_mask_s: list[float] = field(default_factory=list)


class TimedChannel:
    """Carries the exchanges to clients in this process; what happens in here is not the server's time."""

    def __init__(self, plan: SecureSum) -> None:
        self._plan, self.costs = plan, Costs()
        self._roofline = Roofline(plan.parameters)
        self._measured = range(min(_MEASURED, plan.clients - plan.dropouts))
        self._lost = range(plan.clients - plan.dropouts, plan.clients)
        self._values: Tensor | None = None
        self._shared = SharedWork()
        self._stage, self._since, self._wall = "advertise", 0.0, 0.0
        keys = [Ed25519PrivateKey.generate() for _ in range(plan.clients)]
        self.roster = {member: key.public_key().public_bytes_raw() for member, key in enumerate(keys)}
        self._members = [self._member(number, key) for number, key in enumerate(keys)]

    def _member(self, number: int, key: Ed25519PrivateKey) -> SecureMember:
        site, shared = AnySite(), self._shared
        alone = number in self._measured
        standing = Standing(
            number,
            self.roster,
            _DIGEST,
            key.sign,
            site,
            site,
            threads=self._plan.threads,
            verify=verify if alone else shared.verify,
            read_bulletin=Bulletin.read if alone else shared.read_bulletin,
            bind=binding_of if alone else shared.bind,
        )
        return SecureMember(standing, self._train)

    def _train(self, assignment: Assignment) -> Update:
        raise SecureAggregationError("the updates of a benchmark are made before their time is taken")

    def start(self) -> None:
        """Begin to take the server's time."""
        self._since, self._wall = time.process_time(), time.perf_counter()

    def stop(self) -> None:
        """Give the server the time since it was last given control."""
        spent = time.process_time() - self._since
        self.costs.server_wall_s += time.perf_counter() - self._wall
        self.costs.server[self._stage] = self.costs.server.get(self._stage, 0.0) + spent

    def deliver(self, assignments: Mapping[int, Assignment], timeout_s: float | None) -> Iterator[Arrival]:
        """Carry one exchange."""
        first = next(iter(assignments.values()))
        assert isinstance(first.work, SecureWork)
        self.stop()
        self._stage = stage = first.work.stage
        self._compare(stage)
        for member, assignment in assignments.items():
            if stage == "mask" and member in self._lost:
                continue
            arrival = self._answer(stage, member, assignment)
            self.start()
            yield arrival
            self.stop()
        self._compare(stage)
        self.start()

    def _compare(self, stage: str) -> None:
        """Measure the roofline, close in time to the masks of clients and server."""
        if stage in ("mask", "unmask"):
            masks = self.costs.client_mask_s if stage == "mask" else self.costs.server_mask_s
            masks.append(self._roofline.seconds(_ROOFLINE_MASKS))

    def _answer(self, stage: str, member: int, assignment: Assignment) -> Arrival:
        client, work = self._members[member], assignment.work
        assert isinstance(work, SecureWork)
        if stage == "mask":
            weight = self._plan.weight(member)
            update = Update.of(self._plan.update(member) * weight, weight, examples=weight)
            client._train = lambda _: update  # made before, so that it takes no time
        began, started = time.perf_counter(), time.process_time()
        answer = client.answer(assignment, work)
        spent, wall = time.process_time() - started, time.perf_counter() - began
        reply = Reply(assignment.run, assignment.round, member, assignment.fingerprint, answer)
        size = reply_to_frame(reply).size_bytes
        if member in self._measured:
            costs = self.costs
            costs.client_wall_s += wall / len(self._measured)
            costs.client[stage] = costs.client.get(stage, 0.0) + spent / len(self._measured)
        if member == 0:
            self.costs.upload_bytes += size
            self.costs.download_bytes += assignment_to_frame(assignment).size_bytes
        return Arrival(member, reply, size)

    def clients(self, round_number: int) -> list[int]:
        """Return everybody."""
        return list(range(self._plan.clients))

    def exchange(self, assignment: Assignment, cohort: object, timeout_s: float | None) -> Iterator[Arrival]:
        """Refuse: nothing is sent in the clear."""
        raise SecureAggregationError("this channel carries secure sums only")

    def virtual_time(self) -> tuple[None, None]:
        """Return that there is none."""
        return None, None

    def finish(self) -> None:
        """Take the server's last seconds, and the roofline once more."""
        self.stop()
        self._compare("unmask")


def take(plan: SecureSum) -> dict[str, Any]:
    """Return the figures of one secure sum.

    Raises: SecureAggregationError: if it stops, or its result is not what the encoding promises.
    """
    strategy = SecureAggregation(FedAvg(), plan.protocol, clip=_CLIP, max_weight=_MAX_WEIGHT)
    spec = ModelSpec.of_size(plan.parameters)
    channel = TimedChannel(plan)
    gathering = SecureGathering(
        strategy, spec, ("examples",), lambda: Witnesses(channel.roster, _DIGEST), threads=plan.threads
    )
    assignment = Assignment("benchmark", 1, spec.fingerprint, torch.zeros(plan.parameters), TrainWork(Training()))
    order = Order(assignment, range(plan.clients), strategy.init(spec))
    started = time.perf_counter()
    channel.start()
    gathered = gathering.gather(channel, order)
    channel.finish()
    if gathered.why:
        raise SecureAggregationError(gathered.why)
    seconds = time.perf_counter() - started
    mean, count = gathered.total.values.double() / gathered.total.weight, len(gathered.accepted)
    error = float((mean - _mean(plan, gathered.accepted)).abs().max())
    return _row(plan, channel.costs, gathered.facts, count) | {"max_abs_error": error, "seconds": round(seconds, 2)}


def _mean(plan: SecureSum, clients: Any) -> Tensor:
    """Return the weighted mean of the clipped updates, in float64."""
    total = torch.zeros(plan.parameters, dtype=torch.float64)
    for client in clients:
        total += plan.update(client).clamp_(-_CLIP, _CLIP).double() * plan.weight(client)
    return total / sum(plan.weight(client) for client in clients)


def _row(plan: SecureSum, costs: Costs, facts: Mapping[str, Any], survivors: int) -> dict[str, Any]:
    degree, client_s, server_s = facts["degree"], sum(costs.client.values()), sum(costs.server.values())
    own = float(np.median(costs.client_mask_s)) * (degree + 1)
    # A lost client's masks are those with its surviving neighbours: the last clients are lost.
    expansions = survivors + plan.dropouts * (survivors if degree >= plan.clients - 1 else degree)
    all_masks = float(np.median(costs.server_mask_s)) * expansions
    return {
        "degree": degree,
        "threshold": facts["threshold"],
        "threads": plan.threads,
        "client_s": round(client_s, 4),
        "server_s": round(server_s, 4),
        "client_wall_s": round(costs.client_wall_s, 4),
        "server_wall_s": round(costs.server_wall_s, 4),
        "client_stage_s": {stage: round(spent, 5) for stage, spent in costs.client.items()},
        "server_stage_s": {stage: round(spent, 5) for stage, spent in costs.server.items()},
        "upload_bytes": costs.upload_bytes,
        "upload_bytes_allowed": 4 * plan.parameters + 200 * degree + 4096,
        "download_bytes": costs.download_bytes,
        "client_masks": degree + 1,
        "client_roofline_s": round(own, 4),
        "client_over_roofline": round(client_s / own, 3),
        "server_masks": expansions,
        "server_roofline_s": round(all_masks, 4),
        "server_over_roofline": round(server_s / all_masks, 3),
    }

"""Secure aggregation in an ordinary Flower `ServerApp`: the exchanges of `server.secagg` over Flower's grid.

Its twin is `clients/flower.py`, the mod that answers. It stands here and not beside `strategies.flower`, because it
runs the server's half of a protocol.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fedml_core import engine_guard  # noqa: F401 - its import sets Flower's switches, before Flower reads them
from fedml_core.errors import ReplyError, RunError, StrategyError
from fedml_core.flower_secure import Lesson, introduction
from fedml_core.messages import Assignment, TrainWork
from fedml_core.model import ModelSpec
from fedml_core.pinned_roster import PinnedRoster
from fedml_core.training import Training
from fedml_core.update import Total
from server.flower_channel import GridChannel, answers, number_in
from server.flower_runs import FlowerRuns
from server.gathering import Gathered, Order
from server.secagg import SecureGathering
from server.secure_exchange import Witnesses
from server.validation import averages
from strategies.secure import SecAggPlus, SecureAggregation
from strategies.strategy import Strategy

# isort: split
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid

__all__ = ["SecureFlowerStrategy"]

_log = logging.getLogger(__name__)
_TIMEOUT_S = 3600.0


class SecureFlowerStrategy(FlowerRuns):
    """A Flower strategy whose server learns the sum of its nodes' updates, and no update.

    `SecureFlowerStrategy(SecureAggregation(FedAvg(), clip=0.5, max_weight=200), roster=roster).start(...)`; the
    ClientApp needs `ClientApp(mods=[clients.flower.secure_mod()])`.

    Guarantees: the exchanges of a round are all in `configure_train`, which returns no message; what a node does wrong
    is logged with the node and the reason, and the round goes on without it as long as the protocol allows. A round
    without a sum returns the model as it was, and `gathered` says why. Of training, metrics other than `metrics` never
    leave a node; those are means by examples over the sum.
    Differs from FlowerStrategy: evaluation, whose metrics the server would see node by node, is off unless
    `fraction_evaluate` is set and the mod allows it. A node is asked once in a run under which number it takes part.
    Trust: server sees only sums; against whom, `strategy.protocol` says. Flower sends the app's code to the nodes: that
    holds as long as the app that runs there has the mod.
    Args: strategy: a secure sum of a strategy that protects nothing by itself. roster: whom the sums are of, in active
        mode; `fedml_core.pinned_roster.pin_roster` reads it. metrics: the names of the metrics to sum; every node must
        report each. settings: as FlowerStrategy's.
    Raises: StrategyError: if the strategy is none that can run so.
    """

    def __init__(
        self,
        strategy: SecureAggregation,
        *,
        roster: PinnedRoster | None = None,
        metrics: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        super().__init__(strategy, **{"fraction_evaluate": 0.0, **settings})
        self._secure, self._active = strategy, _protocol(strategy).active
        self._most_examples = float(strategy.max_examples)
        if self._active and roster is None:
            raise StrategyError(
                "the active mode needs the roster of the members: roster=pin_roster(path, operator); or use "
                "SecAggPlus(active=False), which trusts the server to follow the protocol"
            )
        self._witnesses = Witnesses(roster.keys, roster.digest) if roster and self._active else Witnesses()
        self._summed = tuple(metrics)
        self._timeout_s, self._last_round = _TIMEOUT_S, 0
        self._run = _Run(secrets.token_hex(8))
        self._gathering: tuple[ModelSpec, SecureGathering] | None = None
        self.gathered: Gathered | None = None
        """What came of the last round's exchanges: who counted, who did not, why there was no sum, what it cost."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Take the round's secure sum; `aggregate_train` makes the step. There is no message left to send."""
        self.gathered = None
        self._hold(arrays)
        if self._fractions[MessageType.TRAIN] == 0:
            return []
        layout, _, state = self._held()
        lesson = Lesson(
            arrays,
            self._train_config(server_round, config),
            tuple(row.name for row in (*layout.spec.parameters, *layout.spec.buffers)),
            self._weight_key,
            self._summed,
        )
        nodes = self._connected(grid)
        self._run.forget_all_but(nodes)
        cohort = self._members(grid, server_round, self._drawn(MessageType.TRAIN, server_round, nodes))
        channel = GridChannel(grid, cohort, lesson, self._active)
        gathering = self._gathering_for(layout.spec)
        train = TrainWork(Training(), self.strategy.client_half(), self.strategy.told(state), self._seed)
        # The model travels as Flower's records; its digest, to which masks are bound, is the fingerprint.
        assignment = Assignment(self._run.name, server_round, lesson.fingerprint, torch.empty(0), train)
        following = () if server_round == self._last_round else self._following(server_round, nodes)
        order = Order(assignment, sorted(cohort), state, following, self._timeout_s)
        gathered = gathering.gather(channel, order)
        self.gathered = replace(gathered, bytes_down=gathered.bytes_down + channel.model_bytes)
        self._report(server_round, self.gathered, cohort)
        return []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the next model, or the same where there was no sum, and the mean training metrics."""
        size = self._held()[0].spec.size
        total = self.gathered.total if self.gathered else Total(torch.zeros(size), 0.0, 0)
        means = {name: value for name, value in averages(total.sums).items() if name != "examples"}
        return self._stepped(server_round, lambda: total), (MetricRecord({**means}) if means else None)

    def summary(self) -> None:
        """Log the strategy and who is protected from whom."""
        _log.info("%r; protection: %s", self.strategy, self.strategy.protection())

    @staticmethod
    def _require_sendable(strategy: Strategy) -> None:
        if not isinstance(strategy, SecureAggregation):
            raise StrategyError(
                f"SecureFlowerStrategy takes a SecureAggregation, got {type(strategy).__name__}; wrap the strategy"
            )
        _protocol(strategy)
        if strategy.privacy() is not None:
            raise StrategyError(
                f"{type(strategy.strategy).__name__} costs privacy, which every site must count in its own ledger, and "
                "no site does in a Flower app; run it with fedveil's own clients"
            )
        if strategy.strategy.protection() != "none":
            raise StrategyError(
                f"{type(strategy.strategy).__name__} needs clients that are fedveil's own; run it with the fleet"
            )
        if not strategy.draw_masks:
            raise StrategyError("draw_masks=False protects nothing, and is for fedveil's own simulations; leave it out")

    def _begin(self, rounds: int, timeout_s: float) -> None:
        # Another name: members refuse a round that they took part in before.
        self._run, self._gathering = _Run(secrets.token_hex(8)), None
        self._timeout_s, self._last_round = timeout_s, rounds

    def _members(self, grid: Grid, server_round: int, nodes: Sequence[int]) -> dict[int, int]:
        """Return the nodes of a cohort by member, having asked those that are new who they are."""
        strangers = [node for node in nodes if node not in self._run.numbers]
        failed = {}
        sent = [
            Message(
                introduction(self._run.propose(node), self._active),
                node,
                MessageType.TRAIN,
                group_id=str(server_round),
            )
            for node in strangers
        ]
        for node, answer in answers(grid, sent, self._timeout_s):
            try:
                self._run.admit(node, number_in(answer), self._witnesses.keys if self._active else None)
            except ReplyError as error:
                failed[node] = error
                _log.warning("round %d: node %d takes no part (%s): %s", server_round, node, error.rule, error)
        if nodes and not self._run.numbers:
            why = next(iter(failed.values()), "none of them answered")
            raise RunError(f"none of {len(nodes)} nodes can take part in a secure sum: {why}")
        return {self._run.numbers[node]: node for node in nodes if node in self._run.numbers}

    def _following(self, server_round: int, nodes: Sequence[int]) -> list[int]:
        drawn = self._drawn(MessageType.TRAIN, server_round + 1, nodes)
        return sorted(self._run.numbers[node] for node in drawn if node in self._run.numbers)

    def _gathering_for(self, spec: ModelSpec) -> SecureGathering:
        if self._gathering is None or self._gathering[0] != spec:
            summed = ("examples", *self._summed)
            self._gathering = spec, SecureGathering(self._secure, spec, summed, lambda: self._witnesses)
        return self._gathering[1]

    def _report(self, server_round: int, gathered: Gathered, cohort: Mapping[int, int]) -> None:
        for row in gathered.excluded:
            node = cohort.get(row.client)
            _log.warning("round %d: node %s does not count (%s): %s", server_round, node, row.rule, row.reason)
        for member in gathered.missing:
            _log.warning("round %d: node %s was lost", server_round, cohort.get(member))
        if not gathered.accepted:
            _log.error("round %d changed nothing: %s", server_round, gathered.why or "nobody took part")


class _Run:
    """Whom a run's nodes are, as members."""

    def __init__(self, name: str) -> None:
        self.name = f"flower-{name}"
        self.numbers: dict[int, int] = {}
        self._proposed: dict[int, int] = {}

    def propose(self, node: int) -> int:
        """Return the number of a node that has none of its own."""
        return self._proposed.setdefault(node, len(self._proposed))

    def forget_all_but(self, nodes: Iterable[int]) -> None:
        """Free the numbers of nodes that are gone: a site that was started again comes back as another node."""
        connected = frozenset(nodes)
        self.numbers = {node: number for node, number in self.numbers.items() if node in connected}

    def admit(self, node: int, member: int, roster: Mapping[int, bytes] | None) -> None:
        """Keep a node's number.

        Raises: ReplyError: if it is another node's, or not one that the node may have.
        """
        if roster is not None and member not in roster:
            raise ReplyError("member", f"it says that it is member {member}, whom the roster does not admit")
        if roster is None and member != self._proposed.get(node):
            raise ReplyError("member", f"it says that it is member {member}, and was asked to be another")
        taken = [other for other, number in self.numbers.items() if number == member]
        if taken:
            raise ReplyError("member", f"it says that it is member {member}, as node {taken[0]} does")
        self.numbers[node] = member


def _protocol(strategy: SecureAggregation) -> SecAggPlus:
    if not isinstance(strategy.protocol, SecAggPlus):
        name = type(strategy.protocol).__name__
        raise StrategyError(
            f"inside a Flower app the protocol must be SecAggPlus, got {name}; run {name} with the fleet"
        )
    return strategy.protocol

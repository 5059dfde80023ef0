"""Any strategy of ours in an ordinary Flower `ServerApp`, with every reply checked before it counts."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
from torch import Tensor

from fedml_core import engine_guard  # noqa: F401 - its import sets Flower's switches, before Flower reads them

# isort: split
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    MetricRecordValues,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerContract

from fedml_core.checks import require_number, require_whole
from fedml_core.errors import ReplyError, RunError, StrategyError
from fedml_core.model import ModelSpec
from fedml_core.randomness import seeded
from fedml_core.transform import Draws, Guide, State
from fedml_core.update import Total, Update, flaw_in_name
from strategies.array_layout import ArrayLayout, NDArray
from strategies.reported import Metrics, mean_metrics, read_metrics
from strategies.strategy import Strategy, counted

_log = logging.getLogger(__name__)
_NUMPY = "numpy.ndarray"
_POLL_S = 0.2

Record = TypeVar("Record")
Row = tuple[float, Metrics]


class FlowerStrategy(FlowerContract):
    """A Flower strategy that aggregates as one of ours does; everything else is as with Flower's own.

    `FlowerStrategy(FedAdam(learning_rate=0.01)).start(grid=grid, initial_arrays=arrays, num_rounds=3)`

    Guarantees: a reply that is an error, a second one of its node, from a node that was not asked, without exactly the
    model's arrays in their shapes as finite floats, or without a number of examples in (0, max_weight], does not count
    and stops nothing: it is logged, with the node and the reason. A round without any good reply, or whose step is
    refused, returns the model as it was. Arrays of integers stay the server's own. Training metrics are means over the
    good replies that report them, by examples.
    Differs from Flower's FedAvg: cohorts are drawn from `seed`, and too few nodes are an error after `wait_s`.
    Trust: the server sees every client's model; a strategy that promises more is refused.
    Args: strategy: one whose clients keep nothing between rounds, because Flower's ClientApps do not run our client
        half; FedProx's mu is sent in the train config as `proximal-mu`, as Flower's FedProx does, for the ClientApp to
        apply. fraction_train, fraction_evaluate: the share of connected nodes that is asked, rounded down, but at least
        min_nodes; 0 for none. weight_key: the metric that counts examples. buffers: names of arrays that take the mean
        and no server optimizer, such as BatchNorm's running statistics; Flower's own make no difference.
    Raises: StrategyError: for a strategy that needs more than Flower's clients do.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_nodes: int = 2,
        weight_key: str = "num-examples",
        buffers: Collection[str] = (),
        seed: int = 0,
        wait_s: float = 600.0,
    ) -> None:
        require_number("fraction_train", fraction_train, at_least=0, at_most=1)
        require_number("fraction_evaluate", fraction_evaluate, at_least=0, at_most=1)
        require_whole("min_nodes", min_nodes, at_least=1)
        require_number("wait_s", wait_s, at_least=0)
        self.strategy = strategy
        self.state: State | None = None
        """The strategy's state: read it to save it, set it to go on from there. It outlives `start`."""
        self._require_sendable(strategy)
        self._mu = _guide(strategy).mu
        self._fractions = {MessageType.TRAIN: fraction_train, MessageType.EVALUATE: fraction_evaluate}
        self._min_nodes = min_nodes
        self._weight_key, self._most_examples = weight_key, strategy.max_weight
        self._buffers = frozenset(buffers)
        self._seed = seed
        self._wait_s = wait_s
        self._asked: dict[str, list[Message]] = {}
        self._arrays: dict[str, NDArray] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return one message for each node of the cohort, with the model and the round's config."""
        self._hold(arrays)
        return self._messages(MessageType.TRAIN, server_round, arrays, self._train_config(server_round, config), grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the next model, or the same where there was nothing to learn from, and the mean training metrics."""
        layout, parameters, state = self._held()
        draws, told = Draws.of(self._seed, "flower", server_round), self.strategy.told(state)
        accumulator, reported = self.strategy.accumulator(layout.spec), []
        for node, content in self._answers(MessageType.TRAIN, server_round, replies):
            try:
                update, row = self._update(content, layout, parameters)
                accumulator.add(self.strategy.encode_for(update, told, draws.within(node)))
                reported.append(row)
            except ReplyError as error:
                _excluded(server_round, node, error)
        return self._stepped(server_round, accumulator.total), _means(reported)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return one message for each node that is asked to evaluate."""
        sent = ConfigRecord({**config, "server-round": server_round})
        return self._messages(MessageType.EVALUATE, server_round, arrays, sent, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the mean metrics of the good replies, by examples, or None if there are none."""
        reported = []
        for node, content in self._answers(MessageType.EVALUATE, server_round, replies):
            try:
                reported.append(self._metrics(content))
            except ReplyError as error:
                _excluded(server_round, node, error)
        return _means(reported)

    def summary(self) -> None:
        """Log the strategy and who is protected from whom."""
        _log.info("%r; protection: %s, the server sees every update", self.strategy, self.strategy.protection())

    @staticmethod
    def _require_sendable(strategy: Strategy) -> None:
        """Refuse a strategy that promises what clients without our code cannot keep."""
        if not isinstance(strategy, Strategy):
            raise StrategyError(f"FlowerStrategy takes one of fedveil's strategies, got {type(strategy).__name__}")
        if strategy.privacy() is not None or strategy.protection() != "none":
            name, promised = type(strategy).__name__, strategy.protection()
            raise StrategyError(
                "Flower's clients send their models in the clear, and nothing counts what a round costs, so "
                f"{name} cannot give {promised!r} here; run it with fedveil's own clients, with "
                "server.PrivateFlowerStrategy for noise at the server, or server.SecureFlowerStrategy for secure sums"
            )

    def _hold(self, arrays: ArrayRecord) -> None:
        """Keep the model that a round begins with."""
        self._arrays = {name: array.numpy() for name, array in arrays.items()}
        ArrayLayout.of(self._arrays, self._buffers)

    def _held(self) -> tuple[ArrayLayout, Tensor, State]:
        """Return the layout and the vector of the model that the round began with, and the strategy's state."""
        if not self._arrays:
            raise StrategyError("aggregate_train has no model to add to; call configure_train before it")
        layout = ArrayLayout.of(self._arrays, self._buffers)
        state = self.strategy.init(layout.spec) if self.state is None else self.state
        _require_fit(state, self.strategy.init(layout.spec))
        return layout, layout.flatten(self._arrays), state

    def _stepped(self, server_round: int, taken: Callable[[], Total]) -> ArrayRecord:
        """Return the model after the strategy's step, or as it was where there is none."""
        layout, parameters, state = self._held()
        arrays, draws = self._arrays, Draws.of(self._seed, "flower", server_round).within("decode")
        try:
            total = taken()
            stepped, after = self.strategy.step(parameters, total, state, draws)
            arrays = arrays if stepped is parameters else layout.merge(stepped, arrays)
            self.state = after
        except StrategyError as error:
            _log.error("round %d changed nothing: %s", server_round, error)
        return _record(arrays)

    def _train_config(self, server_round: int, config: ConfigRecord) -> ConfigRecord:
        proximal = {"proximal-mu": self._mu} if self._mu > 0 else {}
        return ConfigRecord({**config, "server-round": server_round, **proximal})

    def _update(self, content: RecordDict, layout: ArrayLayout, parameters: Tensor) -> tuple[Update, Row]:
        """Return a reply's update, and its number of examples with all its metrics."""
        arrays = {name: _numpy(array) for name, array in _only(content.array_records, "arrays").items()}
        examples, metrics = self._metrics(content)
        # A name that our reports cannot hold, such as "train/loss", is still in the means that Flower is given.
        scalars = {n: value for n, value in metrics.items() if isinstance(value, float) and flaw_in_name(n) is None}
        delta = layout.flatten(arrays) - parameters
        return counted(delta, examples, self.strategy.max_weight, scalars), (examples, metrics)

    def _metrics(self, content: RecordDict) -> Row:
        record = _only(content.metric_records, "metrics")
        return read_metrics(record, self._weight_key, self._most_examples)

    def _messages(
        self, kind: str, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        self._asked[kind] = []
        if self._fractions[kind] == 0:
            return []
        content = RecordDict({"arrays": arrays, "config": config})
        picked = self._drawn(kind, server_round, self._connected(grid))
        self._asked[kind] = [Message(content, node, kind, group_id=str(server_round)) for node in picked]
        return self._asked[kind]

    def _drawn(self, kind: str, server_round: int, nodes: Sequence[int]) -> list[int]:
        """Return the cohort of a round, from the connected nodes."""
        count = max(int(self._fractions[kind] * len(nodes)), self._min_nodes)
        picked = seeded(self._seed, "sample", kind, server_round).choice(len(nodes), size=count, replace=False)
        return [nodes[place] for place in sorted(picked)]

    def _connected(self, grid: Grid) -> list[int]:
        """Return the connected nodes, as soon as there are enough."""
        deadline = time.monotonic() + self._wait_s
        while len(nodes := sorted(grid.get_node_ids())) < self._min_nodes:
            if time.monotonic() >= deadline:
                raise RunError(
                    f"{len(nodes)} nodes connected within {self._wait_s:g} s, {self._min_nodes} are needed; "
                    "start more, or lower min_nodes"
                )
            time.sleep(_POLL_S)
        return nodes

    def _answers(self, kind: str, server_round: int, replies: Iterable[Message]) -> Iterator[tuple[int, RecordDict]]:
        """Yield node and content of each first reply with content of a node that was asked; log the others."""
        sent = self._asked.get(kind, [])
        asked = {message.metadata.dst_node_id for message in sent}
        # An error that Flower itself reports names the server as its source; the message's id tells the node.
        by_id = {message.metadata.message_id: message.metadata.dst_node_id for message in sent}
        seen: set[int] = set()
        for reply in replies:
            node = reply.metadata.src_node_id
            if reply.has_error():
                node = by_id.get(reply.metadata.reply_to_message_id, node)
                _excluded(server_round, node, ReplyError("error", f"it failed: {str(reply.error.reason)[:200]!r}"))
            elif node not in asked:
                _excluded(server_round, node, ReplyError("unknown", "it was not asked in this round"))
            elif node in seen:
                _excluded(server_round, node, ReplyError("duplicate", "it replied before"))
            else:
                seen.add(node)
                yield node, reply.content


def _guide(strategy: Strategy) -> Guide:
    """Return the guide of a strategy that Flower's clients can follow, knowing nothing of pipelines."""
    name, half, probe = type(strategy).__name__, strategy.client_half(), ModelSpec.of_size(1)
    if half.memory(probe):
        raise StrategyError(
            f"{name}'s clients remember something between rounds, which Flower's ClientApps do not do for it; "
            "run it with fedveil's own clients"
        )
    guide = half.guide(strategy.told(strategy.init(probe)), {})
    if guide.offset is not None:
        raise StrategyError(f"{name} steers each local step, which Flower's config cannot say; use fedveil's clients")
    return guide


def _require_fit(state: State, fresh: State) -> None:
    if _shapes(state) != _shapes(fresh):
        raise StrategyError("the strategy's state is of another model; set state to None to start anew")


def _shapes(tree: object) -> object:
    if isinstance(tree, Mapping):
        return {key: _shapes(value) for key, value in tree.items()}
    return tree.shape if isinstance(tree, Tensor) else None


def _only(records: Mapping[str, Record], what: str) -> Record:
    if len(records) != 1:
        raise ReplyError(what, f"it must hold exactly one record of {what}, got {len(records)}")
    return next(iter(records.values()))


def _numpy(array: Array) -> NDArray:
    if array.stype != _NUMPY:
        raise ReplyError("malformed", f"its arrays must be of type {_NUMPY}, got {array.stype[:40]!r}")
    try:
        # Array.numpy() would read zip files, too.
        return np.lib.format.read_array(io.BytesIO(array.data))
    except Exception as error:  # there is no closed list of what a client's bytes make NumPy's parser raise
        raise ReplyError("malformed", f"its arrays cannot be read: {type(error).__name__}") from error


def _record(arrays: Mapping[str, NDArray]) -> ArrayRecord:
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def _means(reported: Iterable[tuple[float, Metrics]]) -> MetricRecord | None:
    means: dict[str, MetricRecordValues] = {**mean_metrics(reported)}
    return MetricRecord(means) if means else None


def _excluded(server_round: int, node: int, error: ReplyError) -> None:
    _log.warning("round %d: the reply of node %d does not count (%s): %s", server_round, node, error.rule, error)

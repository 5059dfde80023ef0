"""Flower's own strategies, driven with prepared replies, as an oracle for ours; and clients to tamper with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from simulations.flower_grid import LocalGrid
from simulations.flower_nodes import FIRST_NODE_ID
from strategies import FlowerStrategy

# isort: split
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy as FlowerContract

Vector = np.ndarray[Any, np.dtype[np.float32]]
Reply = tuple[Vector, int]

SHAPES = {"weight": (3, 4), "bias": (3,)}
SIZE = 15
START = np.linspace(-1, 1, SIZE, dtype=np.float32)


def record_of(vector: Vector) -> ArrayRecord:
    """Return the vector as two named arrays, in their own dtype."""
    weight, bias = vector[:12].reshape(3, 4), vector[12:]
    return ArrayRecord({"weight": Array(weight), "bias": Array(bias)})


def vector_of(record: ArrayRecord) -> Vector:
    return np.concatenate([record[name].numpy().reshape(-1) for name in SHAPES])


def prepared(rounds: int, clients: int, seed: int = 3) -> list[list[Reply]]:
    """Return each round's replies: whole models around the start, with uneven example counts."""
    generator = np.random.default_rng(seed)
    return [
        [
            ((START + generator.normal(0.1, 0.5, SIZE)).astype(np.float32), int(generator.integers(1, 50)))
            for _ in range(clients)
        ]
        for _ in range(rounds)
    ]


def reply_to(message: Message, vector: Vector, examples: int, **metrics: float) -> Message:
    record = MetricRecord({"num-examples": examples, **metrics})
    return Message(RecordDict({"arrays": record_of(vector), "metrics": record}), reply_to=message)


def theirs(strategy: FlowerContract, rounds: list[list[Reply]]) -> list[Vector]:
    """Return the model after each round of a Flower strategy."""

    def client(message: Message, context: Context) -> Message:
        number = int(str(message.content.config_records["config"]["server-round"]))
        vector, examples = rounds[number - 1][message.metadata.dst_node_id - FIRST_NODE_ID]
        return reply_to(message, vector, examples)

    models, arrays = [], record_of(START)
    with LocalGrid(client, clients=len(rounds[0])) as grid:
        for number in range(1, len(rounds) + 1):
            messages: Iterable[Message] = strategy.configure_train(number, arrays, ConfigRecord(), grid)
            aggregated, _ = strategy.aggregate_train(number, grid.send_and_receive(messages))
            assert aggregated is not None
            arrays = aggregated
            models.append(vector_of(arrays))
    return models


def ours(strategy: Any, rounds: list[list[Reply]]) -> list[Vector]:
    """Return the model after each round of one of our strategies, from the same replies."""
    models, parameters, state = [], START, None
    for replies in rounds:
        deltas = [(vector - parameters, examples) for vector, examples in replies]
        parameters, state = strategy.aggregate(parameters, deltas, state)
        models.append(parameters)
    return models


def assert_same(mine: list[Vector], other: list[Vector]) -> None:
    """Five rounds of float32 sums in different orders stay within 1e-6 for values around 1."""
    assert len(mine) == len(other) > 0
    for ours_now, theirs_now in zip(mine, other, strict=True):
        np.testing.assert_allclose(ours_now, theirs_now, rtol=0, atol=1e-6)


CLIENTS = 4
EXAMPLES = (10, 20, 30, 40)
DELTAS = [np.full(SIZE, value, np.float32) for value in (1.0, 2.0, 3.0, 4.0)]
EVERYBODY = 3.0  # the mean of DELTAS by EXAMPLES
BUT_THE_LAST = 140 / 60  # the same without the last client

Tamper = Callable[[Message, Message], Message]


def honest(message: Message, context: Context) -> Message:
    """Move by the client's own delta, and report."""
    place = int(str(context.node_config["partition-id"]))
    vector = vector_of(message.content.array_records["arrays"]) + DELTAS[place]
    return reply_to(message, vector, EXAMPLES[place], accuracy=place / 10)


def last_does(tamper: Tamper) -> Callable[[Message, Context], Message]:
    """Return clients of which the last answers what `tamper` makes of its instruction and its honest reply."""

    def client(message: Message, context: Context) -> Message:
        reply = honest(message, context)
        return tamper(message, reply) if context.node_config["partition-id"] == CLIENTS - 1 else reply

    return client


def one_round(
    strategy: FlowerStrategy,
    client: Callable[[Message, Context], Message] = honest,
    arrays: ArrayRecord | None = None,
    more: Callable[[list[Message]], Iterable[Message]] = list,
) -> tuple[ArrayRecord, MetricRecord | None]:
    """Return the outcome of one round of training; `more` tampers with the list of replies."""
    with LocalGrid(client, clients=CLIENTS) as grid:
        messages = strategy.configure_train(1, arrays or record_of(START), ConfigRecord(), grid)
        outcome, metrics = strategy.aggregate_train(1, more(grid.send_and_receive(messages)))
    assert outcome is not None
    return outcome, metrics


def moved(outcome: ArrayRecord) -> Vector:
    return vector_of(outcome) - START


MATRICES = [np.random.default_rng(place).normal(size=(8 + place, SIZE)) for place in range(CLIENTS)]


def least_squares() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        place = int(str(context.node_config["partition-id"]))
        inputs = MATRICES[place].astype(np.float32)
        vector = vector_of(message.content.array_records["arrays"])
        for _ in range(3):
            slope = inputs.T @ (inputs @ vector - place) / len(inputs)
            vector = (vector - 0.05 * slope).astype(np.float32)
        return reply_to(message, vector, len(inputs), residual=float(np.abs(inputs @ vector - place).mean()))

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        place = int(str(context.node_config["partition-id"]))
        vector = vector_of(message.content.array_records["arrays"])
        loss = float(np.mean((MATRICES[place] @ vector - place) ** 2))
        report = MetricRecord({"num-examples": len(MATRICES[place]), "loss": loss})
        return Message(RecordDict({"metrics": report}), reply_to=message)

    return app

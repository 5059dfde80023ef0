"""Flower's own strategies, driven round by round with prepared replies, as an oracle for ours."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from simulations.flower_grid import FIRST_NODE_ID, LocalGrid

# isort: split
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
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

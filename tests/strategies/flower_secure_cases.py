"""A Flower app with the mod, a secure strategy, and what their tests ask of a round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from clients.flower import secure_mod
from fedml_core.flower_secure import Asked
from fedml_core.messages import SecureWork
from server.flower import SecureFlowerStrategy
from simulations.flower_grid import LocalGrid
from strategies import FedAvg, FlowerStrategy, SecAggPlus, SecureAggregation
from tests.strategies.flower_cases import (
    CLIENTS,
    START,
    Vector,
    honest,
    record_of,
    reply_to,
    vector_of,
)

# isort: split
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

LAST = 1000 + CLIENTS - 1
Train = Callable[[Message, Context], Message]


def secure(active: bool = False, **settings: Any) -> SecureAggregation:
    return SecureAggregation(FedAvg(), SecAggPlus(active=active), clip=5.0, max_weight=100, **settings)


def strategy_of(sum_: SecureAggregation | None = None, **settings: Any) -> SecureFlowerStrategy:
    return SecureFlowerStrategy(sum_ or secure(), **{"min_nodes": CLIENTS, **settings})


def app_of(train: Train = honest, **settings: Any) -> ClientApp:
    app = ClientApp(mods=[secure_mod(**settings)])
    app.train()(train)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return reply_to(message, START, 5, loss=0.5)

    return app


def run(strategy: FlowerStrategy, app: Train, rounds: int = 1, **grid_settings: Any) -> tuple[Vector, Any]:
    """Return how far the model moved from START, and Flower's own result."""
    with LocalGrid(app, **{"clients": CLIENTS, **grid_settings}) as grid:
        result = strategy.start(grid, record_of(START), num_rounds=rounds)
    return vector_of(result.arrays) - START, result


def stage_of(message: Message) -> str:
    asked = Asked.read(message.content).assignment
    return asked.work.stage if asked is not None and isinstance(asked.work, SecureWork) else "introduce"


def excluded(strategy: SecureFlowerStrategy) -> dict[int, tuple[str, str]]:
    assert strategy.gathered is not None
    return {row.client: (row.rule, row.reason) for row in strategy.gathered.excluded}


def assert_moved(moved: Vector, by: float) -> None:
    """A ring of 32 bits holds a clip of 5 in steps of 1e-8, and float32 a value of 3 in steps of 2e-7."""
    np.testing.assert_allclose(moved, by, rtol=0, atol=1e-6)

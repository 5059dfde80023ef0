"""What our strategies in a Flower `ServerApp` do at the start of each of their runs, before Flower's rounds begin."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

from fedml_core import engine_guard  # noqa: F401 - its import sets Flower's switches, before Flower reads them
from strategies.flower import FlowerStrategy

# isort: split
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

__all__ = ["FlowerRuns"]


class FlowerRuns(FlowerStrategy):
    """A Flower strategy each of whose `start`s is a run of its own, with a name that is never used twice."""

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds as Flower's `start` does, as a new run; `timeout` is of each exchange, in seconds.

        Raises: what a round may raise, as the class says.
        """
        self._begin(num_rounds, timeout)
        return super().start(grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn)

    @abstractmethod
    def _begin(self, rounds: int, timeout_s: float) -> None:
        """Forget the last run, and begin another of so many rounds."""

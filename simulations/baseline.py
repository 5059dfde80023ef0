"""What the same model reaches on the pooled data: the mark to hold a federated run against."""

from __future__ import annotations

from collections.abc import Mapping

from clients.torch_trainer import TorchTrainer
from fedml_core.errors import ConfigError
from fedml_core.task import Task
from fedml_core.training import Training
from server.validation import averages


def passes_of(training: Training, rounds: int, share: float) -> int:
    """Return how many passes over the pool equal the example-passes of a federated run, at least 1.

    Args: share: the mean cohort as a share of the population. With `steps`, an epoch is taken for one pass.
    """
    return max(1, round(rounds * share * (training.epochs if training.steps is None else 1)))


def train_centrally(
    task: Task, training: Training, *, passes: int, seed: int, device: str = "auto"
) -> Mapping[str, float]:
    """Return the test metrics of the task's model after `passes` passes over all training examples in one place.

    The initial weights, the optimizer and the batch size are those of the federated run with this seed.
    Raises: ConfigError: if the task has no pooled training data or no test data to compare on.
    """
    if task.train_data is None or task.test_data is None:
        raise ConfigError("a central baseline needs the task's train_data and test_data; leave --central out")
    trainer = TorchTrainer(task, seed, device=device)
    start = trainer.initial()
    length = training.model_copy(update={"epochs": passes, "steps": None, "learning_rate_decay": 1.0})
    update = trainer.train(start, task.train_data(), length, round_number=1, key=(seed, "central"))
    metrics = averages(trainer.evaluate(start + update.values, task.test_data()))
    return {**metrics, **task.derive(metrics)} if task.derive else metrics

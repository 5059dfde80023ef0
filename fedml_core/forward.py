"""The forward pass of a user's task, and the sums that it leaves behind; training and evaluation alike."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fedml_core.errors import FedveilError, TaskError
from fedml_core.minibatches import Batch
from fedml_core.task import Task

__all__ = ["Forward", "Tally", "guarded"]

# How many numbers on the device wait to be added up; a list costs less than an addition at every step.
_WAITING = 512

_REMEDIES = {
    "Expected more than 1 value per channel": "BatchNorm cannot train on a single example: give the client at least 2 "
    "and a batch_size of at least 2, or use GroupNorm",
    "does not require grad": "the loss must depend on the model's trainable parameters, through torch alone",
    "view size is not compatible": "let the task call .reshape instead of .view, or set memory_layout to contiguous",
    "must have the same dtype": "give the model inputs of its own dtype, or convert them in its forward",
}


def guarded(call: Callable[..., Any], what: str, when: str, kind: type[FedveilError] = TaskError) -> Callable[..., Any]:
    """Return `call`, changed so that whatever user code raises becomes one line of `kind`, with its cause chained."""

    def run(*arguments: Any) -> Any:
        try:
            return call(*arguments)
        except FedveilError:
            raise
        except Exception as error:
            line = " ".join(str(error).split())
            remedy = next((f"; {text}" for sign, text in _REMEDIES.items() if sign in line), "")
            raise kind(f"{what} failed {when}: {type(error).__name__}: {line}{remedy}") from error

    return run


class Tally:
    """Sums of per-example values by name. They stay on the device until `read`, so that no step waits for it."""

    def __init__(self, device: torch.device) -> None:
        # Apple's GPUs have no float64.
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._waiting: dict[str, list[Tensor]] = {}

    def add(self, name: str, values: Tensor, weights: Tensor | None = None) -> None:
        """Add `values` (n,), each times its weight."""
        # Summed at once: the values could be a view of the weights that the next step changes.
        if weights is not None:
            values = values.to(self._dtype) * weights
        waiting = self._waiting.setdefault(name, [])
        waiting.append(values.sum(dtype=self._dtype))
        if len(waiting) == _WAITING:
            waiting[:] = [torch.stack(waiting).sum()]

    def read(self) -> dict[str, float]:
        """Return the sums."""
        return {name: torch.stack(waiting).sum().item() for name, waiting in self._waiting.items()}


class Forward:
    """The user's model, loss and metrics; each is called so that its failure names it and the round."""

    def __init__(self, task: Task, module: nn.Module, when: str, precision: AbstractContextManager[object]) -> None:
        self._model = guarded(module, "the task's model", when)
        self._loss = guarded(task.loss, "the task's loss", when)
        self._metrics = {
            name: guarded(metric, f"the task's metric {name}", when) for name, metric in task.metrics.items()
        }
        self._precision = precision

    def __call__(self, batch: Batch) -> tuple[Tensor, Any]:
        """Return the losses, of shape (batch,) or for the whole batch (), and the outputs.

        Raises: TaskError: for any other shape, or for a scalar loss of weighted examples.
        """
        inputs, targets, weights = batch
        with self._precision:
            outputs = self._model(*inputs)
            losses = self._loss(outputs, targets)
        if not isinstance(losses, Tensor) or losses.shape != (len(targets),) or not losses.is_floating_point():
            _require_scalar(losses, len(targets), weights)
        return losses, outputs

    @torch.no_grad()
    def tally(self, tally: Tally, losses: Tensor, outputs: Any, batch: Batch) -> None:
        """Add the batch's losses, metrics and, as `examples`, weights to `tally`.

        Raises: TaskError: if a metric is not of shape (batch,).
        """
        _, targets, weights = batch
        count = len(targets)
        if weights is not None:
            tally.add("examples", weights)
        tally.add("loss", losses if losses.dim() else losses.expand(count), weights)
        for name, metric in self._metrics.items():
            values = metric(outputs, targets)
            if not isinstance(values, Tensor) or values.shape != (count,):
                raise TaskError(f"the task's metric {name} must return shape ({count},), {_got(values)}")
            tally.add(name, values, weights)


def _require_scalar(losses: object, count: int, weights: Tensor | None) -> None:
    if not isinstance(losses, Tensor) or losses.dim() or not losses.is_floating_point():
        raise TaskError(f"the task's loss must return shape ({count},), one loss an example, or (); {_got(losses)}")
    if weights is not None:
        raise TaskError("a scalar loss cannot weigh its examples; return one loss an example, of shape (batch,)")


def _got(value: object) -> str:
    return f"got {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else f"got {type(value).__name__}"

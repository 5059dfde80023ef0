"""The task: what a user writes once and every runner uses: model, loss, metrics, and how a site loads its data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedml_core.data import ClientData, Data, Examples
from fedml_core.errors import TaskError
from fedml_core.randomness import seed_of

Loss = Callable[[Any, Tensor], Tensor]
Metric = Callable[[Any, Tensor], Tensor]
Averages = Mapping[str, float]

# Numbers in a processor's vector, and examples from which it pays.
_VECTOR, _MANY = 16, 256


@dataclass(frozen=True, kw_only=True)
class Task:
    """A learning problem, independent of who trains it and where.

    `model`: makes the module; called under a seed, so that both sides start from equal weights.
    `loss(outputs, targets)`: one loss an example, shape (batch,); or a scalar, taken as the batch's mean (then example
        weights and per-example privacy are refused).
    `metrics`: by name, `metric(outputs, targets)` with one value an example, shape (batch,). Averages over clients are
        exact, because clients report sums. What is not an average is derived from averages by `derive`.
    `train_data`: the pooled examples that a simulation partitions; `groups` gives each one's natural key, shape (n,).
    `client_data(i)`: virtual client i's own data, loaded when it is sampled; instead of `train_data`.
    `test_data`: held-out examples for evaluation at the server and for the central baseline.
    `site_data(settings)`: what a real site holds; `settings` is the `[data]` table of its site.toml.
    `classes`: the number of classes; integer targets are checked against it.
    """

    model: Callable[[], nn.Module]
    loss: Loss
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    derive: Callable[[Averages], Averages] | None = None
    train_data: Callable[[], Data] | None = None
    client_data: Callable[[int], ClientData] | None = None
    test_data: Callable[[], Data] | None = None
    site_data: Callable[[Mapping[str, Any]], ClientData] | None = None
    groups: Callable[[], Any] | None = None
    classes: int | None = None
    class_names: tuple[str, ...] = ()

    @classmethod
    def classification(cls, *, model: Callable[[], nn.Module], classes: int, **rest: Any) -> Task:
        """Return a task with cross-entropy, accuracy, and integer targets of shape (n,) in [0, classes)."""
        metrics = {"accuracy": accuracy, **rest.pop("metrics", {})}
        return cls(model=model, classes=classes, **{"loss": cross_entropy, **rest, "metrics": metrics})

    @classmethod
    def regression(cls, *, model: Callable[[], nn.Module], **rest: Any) -> Task:
        """Return a task with squared error; reports its mean as `loss`, its root as `rmse`, and `mae`."""
        metrics = {"mae": absolute_error, **rest.pop("metrics", {})}
        return cls(model=model, **{"loss": squared_error, "derive": _root_mean_square, **rest, "metrics": metrics})

    @property
    def reported(self) -> tuple[str, ...]:
        """Return the names of what every client's training reports as sums."""
        return ("examples", "loss", *self.metrics)

    def build(self, seed: int) -> nn.Module:
        """Return the model with the initial weights of `seed`; the caller's random state is not touched.

        Raises: TaskError: if the user's function fails or returns something else than a module.
        """
        awake = _awake_gpus()
        module = self._built(seed, awake)
        if _awake_gpus() != awake:
            # model() itself woke CUDA up, and drew there without our seed.
            module = self._built(seed, _awake_gpus())
        if not isinstance(module, nn.Module):
            raise TaskError(f"the task's model() must return a torch module, got {type(module).__name__}")
        return module

    def _built(self, seed: int, gpus: list[int]) -> Any:
        with torch.random.fork_rng(devices=gpus):
            torch.default_generator.manual_seed(seed_of(seed, "model"))
            if gpus:
                torch.cuda.manual_seed_all(seed_of(seed, "model"))
            try:
                return self.model()
            except Exception as error:
                raise TaskError(f"the task's model() failed: {type(error).__name__}: {error}") from error

    def check(self, data: Data, whose: str) -> None:
        """Check what can be checked before any work: labels in memory, not those of a map-style data set.

        Raises: TaskError: naming `whose` data it is, if no example counts or a label is out of range.
        """
        if len(data) == 0:
            raise TaskError(f"{whose}: no examples; give it data or leave it out")
        if not isinstance(data, Examples):
            return
        if data.weights is not None and not bool(data.weights.any()):
            raise TaskError(f"{whose}: every example weighs 0; weigh one at least, or leave it out")
        if self.classes is None:
            return
        targets = data.targets
        if targets.is_floating_point():
            raise TaskError(f"{whose}: labels must be integers for classification, got {targets.dtype}")
        wrong = ((targets < 0) | (targets >= self.classes)).nonzero()
        if len(wrong):
            first = tuple(int(i) for i in wrong[0])
            raise TaskError(
                f"{whose}: label {int(targets[first])} of example {first[0]} is out of range; "
                f"labels must be 0 to {self.classes - 1}"
            )


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return each example's cross-entropy, averaged over further dimensions (pixels, tokens): shape (batch,)."""
    if _narrow(outputs) and targets.dim() == 1 and targets.dtype == torch.int64:
        return F.cross_entropy(outputs.t().unsqueeze(0), targets.unsqueeze(0), reduction="none").squeeze(0)
    return _per_example(F.cross_entropy(outputs, targets, reduction="none"))


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return 1 where the largest logit (dimension 1) is the target's, else 0: shape (batch,)."""
    return _per_example((outputs.argmax(dim=1) == targets).float())


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return each example's mean squared error: shape (batch,)."""
    return _per_example((_aligned(outputs, targets) - targets) ** 2)


def absolute_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return each example's mean absolute error: shape (batch,)."""
    return _per_example((_aligned(outputs, targets) - targets).abs())


def _awake_gpus() -> list[int]:
    # Those that sleep are left asleep: a process that woke CUDA up can no longer fork workers that use it.
    awake = torch.cuda.is_initialized()
    return list(range(torch.cuda.device_count())) if awake else []


def _aligned(outputs: Tensor, targets: Tensor) -> Tensor:
    # (batch, 1) against (batch,) would broadcast to (batch, batch), silently.
    if outputs.numel() != targets.numel():
        raise TaskError(
            f"outputs of shape {tuple(outputs.shape)} do not fit targets of shape {tuple(targets.shape)}; "
            "a regression gives one number for each target"
        )
    return outputs.reshape(targets.shape)


def _narrow(outputs: Tensor) -> bool:
    """Return whether torch's loop over these examples is four times as fast with the classes first, on a CPU."""
    fits = outputs.dim() == 2 and outputs.shape[1] < _VECTOR and len(outputs) >= _MANY
    return fits and outputs.device.type == "cpu"


def _per_example(values: Tensor) -> Tensor:
    return values.flatten(1).mean(dim=1) if values.dim() > 1 else values


def _root_mean_square(averages: Averages) -> Averages:
    return {"rmse": max(averages["loss"], 0.0) ** 0.5} if "loss" in averages else {}

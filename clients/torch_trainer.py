"""Local training and evaluation of a torch module on one device: the one piece of a client that every runner uses."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from clients.around_steps import optimizer_of, steering_of, update_of
from clients.local_step import LocalStep, Steering
from clients.optimizers import OptimizerFactory
from fedml_core.data import Data
from fedml_core.dense import quick_dense
from fedml_core.devices import deterministic_torch, gradient_scaler, precision_context, seeded_torch
from fedml_core.dropout import KeyedDropout, purpose_and_stream
from fedml_core.evaluation import Evaluator
from fedml_core.forward import Forward, Tally
from fedml_core.memory_layout import MemoryLayout, ordered_gradients
from fedml_core.minibatches import training_order
from fedml_core.randomness import Key, seed_of
from fedml_core.task import Task
from fedml_core.training import Training
from fedml_core.transform import Guide
from fedml_core.update import Update

__all__ = ["OptimizerFactory", "TorchTrainer", "has_batch_norm"]

_log = logging.getLogger(__name__)
_NO_GUIDE = Guide()
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class TorchTrainer:
    """Trains and evaluates a task's model, one client after the other, in one module that it keeps.

    Guarantees: as `fedml_core.evaluation.Evaluator`. One trainer serves one thread at a time.

    Args: seed: of the initial weights. device: see `fedml_core.devices.choose_device`. optimizer: replaces
        `Training.optimizer`, its arguments and the first round's learning rate, which decays as `Training` says.
        memory_layout: see `fedml_core.memory_layout.MemoryLayout`; "auto" says in the log where the model does not bear
        channels-last. deterministic: see `fedml_core.devices.deterministic_torch`.
    Raises: TaskError: if the model cannot be built or a metric takes a reserved name; ConfigError: for the device or
        the memory layout.
    """

    def __init__(
        self,
        task: Task,
        seed: int = 0,
        *,
        device: str = "auto",
        optimizer: OptimizerFactory | None = None,
        memory_layout: MemoryLayout = "auto",
        deterministic: bool = False,
    ) -> None:
        self._bench = Evaluator(task, seed, device=device, memory_layout=memory_layout, tell=_log.warning)
        self._dropout = KeyedDropout(self._bench.module)
        self._optimizer = optimizer
        self._deterministic = deterministic
        self.spec = self._bench.spec

    def configure(
        self, memory_layout: MemoryLayout, *, deterministic: bool = False, tell: Callable[[str], None] = _log.warning
    ) -> None:
        """Take other values for the constructor's arguments of these names; `tell` takes the place of the log.

        Raises: ConfigError: for an unknown layout.
        """
        self._bench.lay_out(memory_layout, tell)
        self._deterministic = deterministic

    @property
    def device(self) -> torch.device:
        """Return the device that this trainer computes on."""
        return self._bench.device

    def initial(self) -> Tensor:
        """Return the built model as a new float32 vector of shape (d,) on the CPU."""
        return self._bench.initial()

    def train(
        self,
        parameters: Tensor,
        data: Data,
        training: Training,
        *,
        round_number: int,
        key: tuple[Key, ...],
        guide: Guide = _NO_GUIDE,
    ) -> Update:
        """Return what training on `data` adds to `parameters`, buffers included, as float32 (d,) on the CPU.

        `sums`: `examples`, the data's total weight, each example once; `loss` and each metric, times `examples`, their
        means over all that was processed while the model changed. `facts`: `steps`, and `step_size`, the sum of their
        learning rates (of the optimizer's first group). Divergence is not an error: the update is then not finite.

        Epoch e (from 0) visits the examples in `fedml_core.minibatches.epoch_order(key, e, n)`; dropout layers draw
        as `fedml_core.dropout` says, and other draws from torch follow `key` too. A model with BatchNorm skips a last
        batch of one example, unless the client has no other.

        Raises: TaskError: if the data does not fit the task, or the user's code fails; ConfigError: for an optimizer,
            argument or precision that torch does not know; SpecMismatchError: if `parameters` is not (d,).
        """

        def train() -> Update:
            return self._train(parameters, data, training, round_number, key, guide)

        with deterministic_torch(self._deterministic):
            return self._bench.adapting(train)

    def _train(
        self,
        parameters: Tensor,
        data: Data,
        training: Training,
        round_number: int,
        key: tuple[Key, ...],
        guide: Guide,
    ) -> Update:
        when = f"at round {round_number}"
        purpose, stream = purpose_and_stream(key)
        seeded = seeded_torch(seed_of(*key, "train"), self._bench.device, self._bench.threads)
        quick = quick_dense(self._bench.module, self._bench.device)
        with seeded, quick, self._dropout.drawing(purpose), self._ordered():
            source, total = self._bench.source(data, when)
            start = self._bench.load(parameters, when)
            self._bench.module.train()
            tally = Tally(self._bench.device)
            steering = steering_of(self._bench.module, self.spec, start, guide, training.max_gradient_norm)
            step = self._local_step(training, round_number, steering, tally)
            orders = training_order(training, key, len(data), skip_single=has_batch_norm(self._bench.module))
            processed = 0
            try:
                for number, batch in enumerate(self._bench.batches(source, orders, training.batch_size)):
                    self._dropout.at(number, stream)
                    step.take(batch)
                    processed += len(batch[1])
            finally:
                self._bench.module.zero_grad()
            values = self._bench.moved(start, when)
        sums = tally.read()
        # All processed examples can weigh 0 where `steps` ends before the others come: their mean is then 0.
        scale = total / (sums.pop("examples", float(processed)) or 1.0)
        sums = {"examples": total, **{name: value * scale for name, value in sums.items()}}
        return update_of(values, sums, {"steps": step.steps, "step_size": step.step_size})

    def evaluate(self, parameters: Tensor, data: Data, batch_size: int = 256) -> dict[str, float]:
        """Return summed metrics, as `fedml_core.evaluation.Evaluator` does."""
        with deterministic_torch(self._deterministic):
            return self._bench.evaluate(parameters, data, batch_size)

    def _ordered(self) -> AbstractContextManager[object]:
        return ordered_gradients(self._bench.module) if self._bench.channels_last else nullcontext()

    def _local_step(self, training: Training, round_number: int, steering: Steering, tally: Tally) -> LocalStep:
        when = f"at round {round_number}"
        forward = Forward(
            self._bench.task, self._bench.module, when, precision_context(training.precision, self._bench.device)
        )
        optimizer = optimizer_of(training, round_number, steering.parameters, self._optimizer)
        scaler = gradient_scaler(training.precision, self._bench.device)
        return LocalStep(forward, optimizer, steering, tally=tally, when=when, scaler=scaler)


def has_batch_norm(module: nn.Module) -> bool:
    """Return whether `module` has a BatchNorm that normalises by its batch, which one example alone has not."""
    return any(isinstance(part, _BATCH_NORMS) and part.training for part in module.modules())

"""Local training and evaluation of a torch module on one device: the one piece of a client that every runner uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn

from clients.devices import choose_device, gradient_scaler, precision_context, seeded_torch
from clients.local_step import Forward, LocalStep, Steering, Tally, guarded
from clients.minibatches import Fetch, ordered_batches, training_order
from clients.optimizers import OptimizerFactory, make_optimizer
from fedml_core.data import Data, Examples, batch_of
from fedml_core.errors import ConfigError, StrategyError, TaskError
from fedml_core.model import ModelSpec
from fedml_core.randomness import Key, seed_of
from fedml_core.task import Task
from fedml_core.training import Training
from fedml_core.transform import Guide
from fedml_core.update import Update

__all__ = ["OptimizerFactory", "TorchTrainer"]

_NO_GUIDE = Guide()
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class TorchTrainer:
    """Trains and evaluates a task's model, one client after the other, in one module that it keeps.

    Guarantees: what a call returns depends on its arguments, the task, the seed and the kind of device, never on which
    client came before: everything of the module that does not travel in the vector (frozen parameters, integer buffers
    such as BatchNorm's batch counter, buffers that are not persistent) starts each call as it was built. Torch's global
    random state is left as it was. One trainer serves one thread at a time.

    Args: seed: of the initial weights. device: see `clients.devices.choose_device`. optimizer: replaces
        `Training.optimizer`, its arguments and the first round's learning rate, which decays as `Training` says.
    Raises: TaskError: if the model cannot be built or a metric takes a reserved name; ConfigError: for the device.
    """

    def __init__(
        self, task: Task, seed: int = 0, *, device: str = "auto", optimizer: OptimizerFactory | None = None
    ) -> None:
        taken = [name for name in ("examples", "loss") if name in task.metrics]
        if taken:
            raise TaskError(f"a metric may not be called {taken[0]}, which every report has; rename it")
        self._task, self._seed, self._optimizer = task, seed, optimizer
        self._device = choose_device(device)
        self._module = task.build(seed)
        self.spec = ModelSpec.of(self._module)
        self._initial = self.spec.flatten(self._module).cpu()
        self._module.to(self._device)
        self._rest = _Rest.of(self._module, self.spec)

    def initial(self) -> Tensor:
        """Return the built model as a new float32 vector of shape (d,) on the CPU."""
        return self._initial.clone()

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

        Epoch e (from 0) visits the examples in `clients.minibatches.epoch_order(key, e, n)`; dropout and other draws
        from torch follow `key` too. A model with BatchNorm skips a last batch of one example, unless the client has no
        other.

        Raises: TaskError: if the data does not fit the task, or the user's code fails; ConfigError: for an optimizer,
            argument or precision that torch does not know; SpecMismatchError: if `parameters` is not (d,).
        """
        when = f"at round {round_number}"
        with seeded_torch(seed_of(*key, "train"), self._device):
            source, total = self._source(data, when)
            start = self._load(parameters, when)
            self._module.train()
            tally = Tally(self._device)
            step = self._local_step(training, round_number, self._steering(start, guide, training), tally)
            orders = training_order(training, key, len(data), skip_single=self._has_batch_norm())
            processed = 0
            try:
                for batch in ordered_batches(source, orders, training.batch_size, self._device):
                    step.take(batch)
                    processed += len(batch[1])
            finally:
                self._module.zero_grad()
            values = guarded(lambda: self.spec.flatten(self._module) - start, "reading the task's model", when)()
        sums = tally.read()
        # All processed examples can weigh 0 where `steps` ends before the others come: their mean is then 0.
        scale = total / (sums.pop("examples", float(processed)) or 1.0)
        sums = {"examples": total, **{name: value * scale for name, value in sums.items()}}
        return Update(
            values.cpu(), _number(1.0), _numbers(sums), _numbers({"steps": step.steps, "step_size": step.step_size})
        )

    def evaluate(self, parameters: Tensor, data: Data, batch_size: int = 256) -> dict[str, float]:
        """Return `examples`, the data's total weight, and the weighted sums of the loss and of each metric over it.

        Divided by `examples` they are exact averages; sums of several clients, or of parts of the data, add up.

        Raises: as `train`.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be >= 1, got {batch_size}")
        when = "in evaluation"
        with seeded_torch(seed_of(self._seed, "evaluate"), self._device), torch.no_grad():
            source, total = self._source(data, when)
            self._load(parameters, when)
            self._module.eval()
            tally = Tally(self._device)
            forward = Forward(self._task, self._module, when, precision_context("float32", self._device))
            for batch in ordered_batches(source, [torch.arange(len(data))], batch_size, self._device):
                losses, outputs = forward(batch)
                forward.tally(tally, losses, outputs, batch)
        return {"examples": total, **{name: value for name, value in tally.read().items() if name != "examples"}}

    def _source(self, data: Data, when: str) -> tuple[Examples | Fetch, float]:
        """Return the data on the device, or how to fetch it there, and its total weight."""
        guarded(self._task.check, "the task's data", when)(data, "the client's data")
        if isinstance(data, Examples):
            total = len(data) if data.weights is None else data.weights.cpu().sum(dtype=torch.float64).item()
            return data.to(self._device), float(total)

        def fetch(index: Tensor) -> Examples:
            batch = batch_of(data, index)
            # Out of range, a label would end the process on a GPU.
            self._task.check(batch, "a batch of the client's data")
            return batch

        return guarded(fetch, "the task's data", when), float(len(data))

    def _load(self, parameters: Tensor, when: str) -> Tensor:
        """Return what the module holds after loading, in its own dtypes, as a vector on the device."""

        def load() -> Tensor:
            self._rest.restore(self._module)
            self.spec.load(parameters.to(self._device), self._module)
            return self.spec.flatten(self._module)

        start: Tensor = guarded(load, "loading the task's model", when)()
        return start

    def _local_step(self, training: Training, round_number: int, steering: Steering, tally: Tally) -> LocalStep:
        when = f"at round {round_number}"
        forward = Forward(self._task, self._module, when, precision_context(training.precision, self._device))
        optimizer = make_optimizer(training, round_number, steering.parameters, self._optimizer)
        scaler = gradient_scaler(training.precision, self._device)
        return LocalStep(forward, optimizer, steering, tally=tally, when=when, scaler=scaler)

    def _steering(self, start: Tensor, guide: Guide, training: Training) -> Steering:
        named = dict(self._module.named_parameters())
        parameters = [named[tensor.name] for tensor in self.spec.parameters]
        offset, count = guide.offset, self.spec.parameter_count
        if offset is not None and offset.shape != (count,):
            raise StrategyError(f"a guide's offset must have shape ({count},), got {tuple(offset.shape)}")
        return Steering(
            parameters,
            guide.mu,
            self._parts(start, parameters) if guide.mu or offset is not None else [],
            [] if offset is None else self._parts(offset.to(self._device), parameters),
            training.max_gradient_norm,
        )

    def _parts(self, vector: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
        return [
            vector[tensor.offset : tensor.offset + tensor.size].view(tensor.shape).to(parameter.dtype)
            for tensor, parameter in zip(self.spec.parameters, parameters, strict=True)
        ]

    def _has_batch_norm(self) -> bool:
        return any(isinstance(part, _BATCH_NORMS) and part.training for part in self._module.modules())


@dataclass(frozen=True)
class _Rest:
    """What of a module does not travel in its vector, as it was built."""

    kept: dict[str, Tensor] = field(repr=False)
    names: frozenset[str]

    @classmethod
    def of(cls, module: nn.Module, spec: ModelSpec) -> _Rest:
        travelling = {tensor.name for tensor in (*spec.parameters, *spec.buffers)}
        tensors = dict(chain(module.named_parameters(), module.named_buffers()))
        kept = {name: tensor.detach().clone() for name, tensor in tensors.items() if name not in travelling}
        return cls(kept, frozenset(tensors))

    @torch.no_grad()
    def restore(self, module: nn.Module) -> None:
        """Put it back, also where a forward pass replaced, resized or added a buffer."""
        now: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for name, kept in self.kept.items():
            held = now.get(name)
            if held is not None and held.shape == kept.shape and held.dtype == kept.dtype:
                held.copy_(kept)
            else:
                setattr(*_place(module, name), kept.clone())
        for name in now.keys() - self.names:
            delattr(*_place(module, name))


def _place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return module.get_submodule(owner), leaf


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _numbers(values: Mapping[str, float]) -> dict[str, Tensor]:
    return {name: _number(value) for name, value in values.items()}

"""Local training with differential privacy for every example, by DP-SGD; whoever sees the update learns no more.

Abadi et al. (2016), arXiv:1607.00133. Gradients come from Opacus or from `clients.gradient_modes`; noise and samples
come from the operating system's entropy, and each training is reserved in an account before it sees an example.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from clients.around_steps import optimizer_of, steering_of, update_of
from clients.gradient_choice import choose_mode
from clients.optimizers import OptimizerFactory, needs_closure
from clients.per_example import GradientMode, losses_of
from clients.private_model import check_private_model
from clients.private_noise import GradientNoise, hidden_key
from clients.private_step import PrivateSteps
from clients.private_training import PrivateTraining
from fedml_core.data import Data, Examples
from fedml_core.devices import precision_context, seeded_torch
from fedml_core.dropout import KeyedDropout, purpose_and_stream
from fedml_core.errors import ConfigError, TaskError
from fedml_core.evaluation import Evaluator
from fedml_core.forward import Forward, guarded
from fedml_core.memory_layout import MemoryLayout
from fedml_core.minibatches import Fetch
from fedml_core.randomness import Key, seed_of
from fedml_core.task import Task
from fedml_core.training import Training
from fedml_core.transform import Guide
from fedml_core.update import Update

__all__ = ["PrivateTorchTrainer", "Reserve"]

_log = logging.getLogger(__name__)
_NO_GUIDE = Guide()
_TRIED = 16  # examples that ways of clipping are measured with; more could fill the memory

Reserve = Callable[[Mapping[str, Any]], None]
"""Enters an event into a data holder's account, durably, or raises PrivacyError or RefusalError."""


class PrivateTorchTrainer:
    """Trains a task's model by DP-SGD, one client after the other, and evaluates it; a `clients.Trainer`.

    Guarantees: an update is differentially private as `private.event(training)` says: unit example, adjacency
        add-or-remove-one, Poisson sampling. That holds for what `train` returns, sums and facts included.
    Guarantees: `reserve` is called with that event once a training, before any gradient; if it raises, nothing is
        trained, and nothing that fails afterwards takes it back.
    Trust: whoever runs this process; the server and the other clients need not be trusted.

    What `evaluate` returns is exact: it protects nobody.

    Samples, noise and what the model draws (dropout) are fresh each time: no two trainings are equal. `key`, which the
    server knows, is not used.

    Not covered: a refusal of the data (labels out of range, no example that counts), how long a training takes, which
    way of clipping was found to suit a few examples of the first training, and the rounding of float32 sums, which for
    n examples in parts of p is at worst n p 2^-25 of the norm: 0.8 % for n = p = 512.

    Args: private: see `PrivateTraining`. reserve: see `Reserve`. seed, device, optimizer, memory_layout: as
        `clients.TorchTrainer`; an optimizer sees noised gradients only.
    Raises: TaskError: if the model cannot be private, with what to use instead; otherwise as `clients.TorchTrainer`.
    """

    def __init__(
        self,
        task: Task,
        private: PrivateTraining,
        reserve: Reserve,
        *,
        seed: int = 0,
        device: str = "auto",
        optimizer: OptimizerFactory | None = None,
        memory_layout: MemoryLayout = "auto",
    ) -> None:
        self._bench = Evaluator(task, seed, device=device, memory_layout=memory_layout, tell=_log.warning)
        check_private_model(self._bench.module)
        self._dropout = KeyedDropout(self._bench.module)
        self._private, self._reserve, self._optimizer = private, reserve, optimizer
        self._chosen: GradientMode | None = None
        self.spec = self._bench.spec

    @property
    def device(self) -> torch.device:
        """Return the device that this trainer computes on."""
        return self._bench.device

    def initial(self) -> Tensor:
        """Return the built model as a new float32 vector of shape (d,) on the CPU."""
        return self._bench.initial()

    def event(self, training: Training) -> Mapping[str, Any]:
        """Return what `train` will reserve for such a training."""
        return self._private.event(training)

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
        """Return what private training on `data` adds to `parameters`, as float32 (d,) on the CPU; buffers stay.

        Each step's noised sum is divided by `training.batch_size`. Then the guide is added, g + mu (w - w_start) +
        offset, which depends on no example of this round beyond what was noised. An example's weight multiplies its
        loss before its gradient is cut. `sums`: only `examples`, which is the public batch_size / sampling_rate: true
        counts, losses and metrics would leak. `facts`: as `clients.TorchTrainer`.

        Raises: PrivacyError or RefusalError: if the account refuses; ConfigError: for settings that private training
            has not; TaskError: if the data does not fit the task, the user's code fails, a buffer changes, or no way of
            clipping suits the model; SpecMismatchError: if `parameters` is not (d,).
        """
        self._check(training)
        self._reserve(self.event(training))
        return self._bench.adapting(lambda: self._train(parameters, data, training, round_number, guide))

    def evaluate(self, parameters: Tensor, data: Data, batch_size: int = 256) -> dict[str, float]:
        """Return summed metrics, exact and without protection, as `fedml_core.evaluation.Evaluator` does."""
        return self._bench.evaluate(parameters, data, batch_size)

    def _check(self, training: Training) -> None:
        if training.precision != "float32":
            raise ConfigError(f"private training bounds gradients in float32, got {training.precision}; use float32")
        if training.max_gradient_norm is not None:
            raise ConfigError(
                f"max_gradient_norm {training.max_gradient_norm:g} would clip gradients that are clipped by example "
                "and noised already; leave it out"
            )

    def _train(self, parameters: Tensor, data: Data, training: Training, round_number: int, guide: Guide) -> Update:
        when, bench, private = f"at round {round_number}", self._bench, self._private
        steps = private.steps(training)
        hidden = hidden_key()
        purpose, stream = purpose_and_stream(hidden)
        with ExitStack() as stack:
            stack.enter_context(seeded_torch(seed_of(*hidden, "train"), bench.device, bench.threads))
            stack.enter_context(self._dropout.drawing(purpose))
            source, _ = bench.source(data, when)
            bench.module.train()
            self._dropout.at(0, stream)
            mode = self._mode(source, len(data), when)
            start = bench.load(parameters, when)
            remembered = _buffers(bench.module)
            steering = steering_of(bench.module, self.spec, start, guide)
            step, rate = self._optimizer_step(training, round_number, steering.parameters, when)
            noise = GradientNoise(private.gradient_noise, self.spec.parameter_count)
            stack.enter_context(mode.attached())
            stack.enter_context(noise.ahead(steps))
            taken = PrivateSteps(
                private,
                mode,
                noise,
                steering,
                training.batch_size,
                batch=lambda rows: next(iter(bench.batches(source, [rows], len(rows)))),
                begin=lambda number: self._dropout.at(number, stream),
            )
            try:
                for _ in range(steps):
                    taken.gradients(len(data))
                    step()
            finally:
                bench.module.zero_grad()
            _require_same(remembered, _buffers(bench.module))
            values = bench.moved(start, when)
        sums = {"examples": training.batch_size / private.sampling_rate}
        facts = {"steps": float(steps), "step_size": steps * rate}
        return update_of(values, sums, facts)

    def _mode(self, source: Examples | Fetch, count: int, when: str) -> GradientMode:
        """Return how gradients are clipped, chosen and checked in the first training.

        With the model as it was built: a server could send parameters under which nothing shows, such as zeros.
        """
        if self._chosen is not None:
            return self._chosen
        bench, private = self._bench, self._private
        bench.load(bench.initial(), when)
        forward = Forward(bench.task, bench.module, "in training", precision_context("float32", bench.device))
        few = next(iter(bench.batches(source, [torch.arange(min(count, _TRIED))], _TRIED)))
        clip = private.clipping.clip(private.clipping.clip_norm)
        try:
            self._chosen = choose_mode(
                private.gradients, bench.module, losses_of(forward), few, clip, fingerprint=self.spec.fingerprint
            )
            return self._chosen
        finally:
            bench.module.zero_grad()

    def _optimizer_step(
        self, training: Training, round_number: int, parameters: list[nn.Parameter], when: str
    ) -> tuple[Callable[[], object], float]:
        """Return how to take a step, and the learning rate of one."""
        made = optimizer_of(training, round_number, parameters, self._optimizer)
        if needs_closure(made):
            raise ConfigError(
                f"{type(made).__name__} evaluates the loss as often as it likes, and each time would cost privacy; "
                "use sgd or adam"
            )
        step = guarded(made.step, f"optimizer {type(made).__name__}", when, ConfigError)
        return step, float(made.param_groups[0].get("lr", 0.0))


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in module.named_buffers() if buffer.is_floating_point()}


def _require_same(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Refuse a model whose buffers changed: nothing noises them, and later steps would see earlier examples in them.

    Caches that a model makes, drops or resizes are none of that.
    """
    for name, kept in before.items():
        now = after.get(name, kept)
        if now.shape == kept.shape and not torch.equal(now, kept):
            raise TaskError(
                f"training changed {name}, a buffer that would leave without noise; nothing was sent: keep no "
                "statistics of examples in the model"
            )

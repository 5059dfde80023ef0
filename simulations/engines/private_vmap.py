"""Trains K clients side by side by DP-SGD: every example's gradient by `torch.vmap`, cut, added up, noised by client.

Abadi et al. (2016), arXiv:1607.00133, as `clients.private_trainer` has it for one client. The clients share a forward
and a backward pass and nothing else: each has Poisson batches and noise of its own.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from clients.optimizers import make_optimizer
from clients.private_model import check_private_model
from clients.private_noise import hidden_key
from fedml_core.devices import seeded_torch
from fedml_core.evaluation import Evaluator
from fedml_core.randomness import seed_of
from fedml_core.task import Task
from simulations.engines.batch_trainer import BatchTrainer, BatchWork, UnsupportedError
from simulations.engines.batched_model import OWN_ERRORS, BatchedModel, explained
from simulations.engines.batched_state import BatchedState, Steering
from simulations.engines.batched_trained import BatchedTrained
from simulations.engines.functional_optimizers import functional
from simulations.engines.memory_errors import memory_named
from simulations.engines.private_gradients import ExampleGradients, layers_of_examples
from simulations.engines.private_rows import BatchTable, ClippedSums
from simulations.engines.private_streams import Streams
from simulations.private_clients import PrivateClients

__all__ = ["PrivateVmapTrainer"]

# What the gradients of examples may take at once, of all clients of a chunk; more examples are added up in parts.
_GRADIENT_BYTES, _GRADIENT_BYTES_GPU = 16 << 20, 1 << 30
_TRIED = 3  # examples of each client, on which ways of taking gradients are compared


class PrivateVmapTrainer(BatchTrainer):
    """A `BatchTrainer` for clients that protect their examples, for any model that `torch.vmap` can run.

    Guarantees: row k of the result, its sums and facts included, is differentially private for client k as the event
        says that was charged: unit example, adjacency add-or-remove-one, Poisson sampling.
    Guarantees: but for its samples, its noise and what dropout draws, row k is what `PrivateTorchTrainer` gives client
        k alone, to 1e-5 relative.
    Trust: whoever runs this process.

    Args: gradient_bytes: what examples' gradients may take at once, by default by the device; others as
        `clients.PrivateTorchTrainer`.
    Raises: TaskError: if the model cannot be private; UnsupportedError: for a model that is not float32.
    """

    def __init__(
        self, task: Task, clients: PrivateClients, seed: int = 0, *, device: str = "auto", gradient_bytes: int = 0
    ) -> None:
        self._bench = Evaluator(task, seed, device=device)
        check_private_model(self._bench.module)
        self._model = BatchedModel(self._bench, layers_of_examples)
        self._names = [tensor.name for tensor in self._bench.spec.parameters]
        self._gradients = ExampleGradients(self._model, self._names, task.loss, self._bench.device)
        self._clients = clients
        on_cpu = self._bench.device.type == "cpu"
        self._bytes = gradient_bytes or (_GRADIENT_BYTES if on_cpu else _GRADIENT_BYTES_GPU)
        self._blocks: list[Tensor] | None = None
        self.spec = self._bench.spec

    def initial(self) -> Tensor:
        """Return the built model as a new float32 vector of shape (d,) on the CPU."""
        return self._bench.initial()

    def descend(self, work: BatchWork) -> BatchedTrained:
        """Return the K clients trained, in the order of `work.clients`.

        Raises: PrivacyError: if the training is another one than was charged. UnsupportedError: if this trainer cannot
            do the work, or a client's data or the user's code fails, which training one by one explains better.
        """
        training = work.training
        self._clients.require_charged(self._clients.private.event(training))
        if training.precision != "float32" or training.max_gradient_norm is not None:
            raise UnsupportedError("private training takes float32 and no max_gradient_norm")
        seeded = seeded_torch(seed_of(*work.purpose, "train"), self._bench.device)
        try:
            # Masks go by place in a batch: whoever could draw them again would see who is in it.
            with memory_named(), seeded, self._model.running(hidden_key()):
                return self._descend(work, f"at round {work.round}")
        except OWN_ERRORS:
            raise
        except Exception as error:
            raise explained(error, self._model, "the loss or its gradient") from error

    def _descend(self, work: BatchWork, when: str) -> BatchedTrained:
        private, training, count = self._clients.private, work.training, len(work.clients)
        device, spec = self._bench.device, self.spec
        examples = work.packed.examples.to(device)
        start = self._bench.load(work.parameters, when)
        self._model.begin()
        named = dict(self._bench.module.named_parameters())
        optimizer = functional(make_optimizer(training, work.round, [named[name] for name in self._names]))
        steering = Steering.of(work.guide, spec, start, torch.arange(count, device=device), None)
        state = BatchedState(spec, start, count, self._blocks)
        self._blocks = state.blocks
        streams = Streams(private, count, spec.parameter_count)
        parameters, steps = state.tensors(count)[: self._model.parameters], private.steps(training)
        few = np.minimum(work.packed.counts, _TRIED)
        self._gradients.settle(
            parameters, BatchTable.of([np.arange(n) for n in few], work.packed.offsets).examples(examples)
        )
        sums = ClippedSums(self._gradients, private.clipping.clip(1.0), self._width(count))
        for step in range(steps):
            self._model.begin_step(step)
            rows = BatchTable.of(streams.samples(work.packed.counts), work.packed.offsets)
            total, unclipped = sums.of(parameters, examples, rows, streams.norms)
            noised = streams.noised(total, training.batch_size)
            streams.adapt(unclipped - rows.counts / 2, training.batch_size)
            gradients = [
                noised[:, part.offset : part.offset + part.size].view(count, *part.shape) for part in spec.parameters
            ]
            state.step(optimizer, steering, gradients, step + 1)
        ones = torch.ones(count, dtype=torch.float64)
        reports = {"examples": ones * (training.batch_size / private.sampling_rate)}
        facts = {"steps": ones * steps, "step_size": ones * (steps * optimizer.rate)}
        return BatchedTrained(spec, state, np.arange(count), lambda: reports, facts)

    def _width(self, clients: int) -> int:
        """Return how many examples of each client are differentiated at once."""
        fits = self._bytes // (4 * self._gradients.numbers * clients)
        return max(1, min(fits, self._clients.private.max_physical_batch))

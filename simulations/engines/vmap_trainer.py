"""Trains K clients side by side: one vectorised forward pass, one backward pass, one optimizer step for all of them.

The clients share no parameter, so the gradient of the sum of their losses is each client's own gradient: `torch.vmap`
is needed for the forward pass only, and losses and metrics that treat examples one by one see K batches as one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from clients.optimizers import OptimizerFactory, make_optimizer
from clients.torch_trainer import has_batch_norm
from fedml_core.data import Examples
from fedml_core.devices import deterministic_torch, precision_context, seeded_torch
from fedml_core.errors import TaskError
from fedml_core.evaluation import Evaluator
from fedml_core.randomness import seed_of
from fedml_core.task import Task
from simulations.engines.batch_coupling import Coupling, coupling
from simulations.engines.batch_plan import Batches, Group, Plan, Step
from simulations.engines.batch_tally import BatchTally
from simulations.engines.batch_trainer import BatchTrainer, BatchWork, UnsupportedError
from simulations.engines.batched_linear import Factors, leaves_factors
from simulations.engines.batched_model import OWN_ERRORS, BatchedModel, explained
from simulations.engines.batched_state import BatchedState, Steering
from simulations.engines.batched_trained import BatchedTrained
from simulations.engines.functional_optimizers import FunctionalOptimizer, functional
from simulations.engines.memory_errors import memory_named
from simulations.engines.resident import uploaded
from simulations.engines.step_graphs import Report, StepGraphs
from simulations.packing import visits

__all__ = ["VmapTrainer"]


class VmapTrainer(BatchTrainer):
    """A `BatchTrainer` for any model that `torch.vmap` can run. One trainer serves one thread at a time.

    Args: as `clients.torch_trainer.TorchTrainer`.
    Raises: TaskError, ConfigError: as there; UnsupportedError: for a model that is not float32.
    """

    def __init__(
        self,
        task: Task,
        seed: int = 0,
        *,
        device: str = "auto",
        deterministic: bool = False,
        optimizer: OptimizerFactory | None = None,
    ) -> None:
        self._bench = Evaluator(task, seed, device=device)
        self._model = BatchedModel(self._bench)
        self._deterministic, self._optimizer = deterministic, optimizer
        self._coupling: Coupling | None = None
        self._blocks: list[Tensor] | None = None
        self.graphs = StepGraphs.on(self._bench.device, self._bench.module)
        self.spec = self._bench.spec

    def initial(self) -> Tensor:
        """Return the built model as a new float32 vector of shape (d,) on the CPU."""
        return self._bench.initial()

    def descend(self, work: BatchWork) -> BatchedTrained:
        """Return the K clients trained, in the order of `work.clients`.

        Raises: UnsupportedError: if this trainer cannot do the work, naming the layer or setting, or if a client's data
            or the user's code fails, which training one by one explains better; ConfigError, SpecMismatchError: as
            `TorchTrainer.train`; StrategyError: for a guide of another shape.
        """
        if work.training.precision == "float16":
            raise UnsupportedError(
                "precision float16 scales each client's losses in its own way; use bfloat16 or float32"
            )
        device = self._bench.device
        try:
            seeded = seeded_torch(seed_of(*work.purpose, "train"), device)
            with deterministic_torch(self._deterministic), memory_named(), seeded, self._model.running(work.purpose):
                return self._descend(work, f"at round {work.round}")
        except OWN_ERRORS:
            raise
        except Exception as error:
            raise explained(error, self._model, "the loss, a metric or the backward pass") from error

    def _descend(self, work: BatchWork, when: str) -> BatchedTrained:
        examples, device = uploaded(work.packed.examples, self._bench.device), self._bench.device
        start = self._bench.load(work.parameters, when)
        named = dict(self._bench.module.named_parameters())
        trainable = [named[tensor.name] for tensor in self.spec.parameters]
        optimizer = functional(make_optimizer(work.training, work.round, trainable, self._optimizer))
        coupled = self._coupled(work, examples, when)
        self._model.begin()
        grouped = coupled.model or coupled.loss
        single = has_batch_norm(self._bench.module)
        visited = visits(work.packed, work.training, work.purpose, work.clients, skip_single=single)
        plan = Plan.of(work.packed, visited, grouped=grouped, device=device)
        if not bool((plan.totals > 0).all()):
            raise UnsupportedError("a client has no examples that count; clients side by side need some each")
        order = torch.from_numpy(plan.order).to(device)
        steering = Steering.of(work.guide, self.spec, start, order, work.training.max_gradient_norm)
        state = BatchedState(self.spec, start, len(order), self._blocks)
        self._blocks = state.blocks
        tally = BatchTally(plan)
        streams = torch.as_tensor(work.clients, dtype=torch.int64).to(device)[order]
        precision = precision_context(work.training.precision, device)
        run = _Run(self._model, self._bench.task, plan, state, tally, streams, coupled, precision)
        take = run.take if self.graphs is None else partial(self.graphs.take, run)
        for step, batches in plan.batches(examples):
            take(step, batches, optimizer, steering)
        steps = plan.steps_taken.double()
        facts = {"steps": steps, "step_size": steps * optimizer.rate}
        return BatchedTrained(self.spec, state, plan.order, partial(_sums, plan, tally), facts)

    def _coupled(self, work: BatchWork, examples: Examples, when: str) -> Coupling:
        if self._coupling is not None:
            return self._coupling
        found = coupling(self._bench.task, self._bench.module, self._model.single, examples, work.training.batch_size)
        self._bench.load(work.parameters, when)
        if len(examples) > 1:
            self._coupling = found
        return found


def _sums(plan: Plan, tally: BatchTally) -> dict[str, Tensor]:
    return {"examples": plan.totals, **tally.sums()}


class _Run:
    """The steps of one chunk."""

    def __init__(
        self,
        model: BatchedModel,
        task: Task,
        plan: Plan,
        state: BatchedState,
        tally: Report,
        streams: Tensor,
        coupled: Coupling,
        precision: AbstractContextManager[object],
    ) -> None:
        self._model, self.plan, self.state, self.tally, self.streams = model, plan, state, tally, streams
        self._task, self._loss, self._metrics = task, task.loss, dict(task.metrics)
        self._coupled, self._together, self._precision = coupled, not coupled.loss, precision

    def elsewhere(self, plan: Plan, tally: Report, streams: Tensor) -> _Run:
        """Return steps on the same weights with other memory for what they read and report."""
        return _Run(self._model, self._task, plan, self.state, tally, streams, self._coupled, self._precision)

    def take(self, step: Step, batches: Batches, optimizer: FunctionalOptimizer, steering: Steering) -> None:
        """Take one step of all clients that still train."""
        self._model.begin_step(step.number)
        tensors = self.state.tensors(step.active)
        factors: list[Factors] = []
        if len(step.groups) == 1:
            steered = steering.guided or steering.max_norm is not None
            plain = optimizer.plain and not steered
            gradients, factors = self._gradients(step, step.groups[0], tensors, batches, factored=plain)
        else:
            gradients = [None] * self._model.parameters
            for group in step.groups:
                parts = self.state.parts(step.active, group.places)
                found, _ = self._gradients(step, group, parts, batches, factored=False)
                self.state.put_back(group.places, parts)
                for place, gradient in enumerate(found):
                    if gradient is not None:
                        whole = gradients[place]
                        if whole is None:
                            whole = gradients[place] = torch.zeros_like(tensors[place])
                        whole[group.places] = gradient
        self.state.step(optimizer, steering, gradients, step.number + 1, factors)

    def _gradients(
        self, step: Step, group: Group, tensors: list[Tensor], batches: Batches, *, factored: bool
    ) -> tuple[list[Tensor | None], list[Factors]]:
        places, count = group.places, group.count
        if group.whole:
            places = slice(0, step.active)
        rows = slice(step.first, step.first + step.active)
        inputs = [column[places, :count] for column in batches.inputs]
        targets = batches.targets[places, :count]
        shares = self.plan.shares[rows][places, :count]
        call = self._call_together if self._together else self._call_apart
        with self._precision:
            outputs = self._model(tensors, inputs, self.streams[: step.active][places])
            losses = call(self._loss, outputs, targets, "the task's loss").float()
        if losses.dim() == 1:
            shares = torch.ones_like(losses)
            if self.plan.weighted:
                raise TaskError("a scalar loss cannot weigh its examples")
        with torch.no_grad():
            self.tally.add("loss", step, places, losses.detach(), count)
            for name, metric in self._metrics.items():
                values = call(metric, outputs, targets, f"the task's metric {name}")
                self.tally.add(name, step, places, values.detach(), count)
        linears = self._model.linears
        if linears.able is None:
            linears.able = leaves_factors(losses)
        parameters = tensors[: self._model.parameters]
        with linears.factoring(factored and linears.able) as factors:
            gradients = torch.autograd.grad(losses, parameters, shares, allow_unused=True)
        return list(gradients), factors

    @staticmethod
    def _call_together(call: Any, outputs: Any, targets: Tensor, what: str) -> Tensor:
        """Return (m, B) values of examples that know nothing of each other: of one large batch."""
        shape = targets.shape[:2]
        values = call(tree_map(lambda leaf: leaf.flatten(0, 1), outputs), targets.flatten(0, 1))
        if not isinstance(values, Tensor) or values.shape != (shape.numel(),):
            raise TaskError(f"{what} must return one value an example")
        return values.view(shape)

    @staticmethod
    def _call_apart(call: Any, outputs: Any, targets: Tensor, what: str) -> Tensor:
        """Return (m, B) values, or (m,) for a whole batch each."""
        values = torch.vmap(call, randomness="error")(outputs, targets)
        if values.shape not in (targets.shape[:1], targets.shape[:2]):
            raise TaskError(f"{what} must return one value an example, or one")
        return values  # type: ignore[no-any-return]  # vmap forgets the type

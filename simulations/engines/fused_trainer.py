"""Trains many clients' dense models at once: forward, backward and descent by hand, batched over clients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedml_core.task import Metric, Task
from fedml_core.training import Training
from fedml_core.update import Update
from simulations.engines.batch_trainer import BatchTrainer, BatchWork, UnsupportedError
from simulations.engines.fused_dual import DualRun
from simulations.engines.fused_errors import errors_of
from simulations.engines.fused_network import Bench, Network
from simulations.engines.fused_plan import dual_pays, segments, together
from simulations.engines.fused_products import Threads, threads
from simulations.engines.fused_stack import stack_of
from simulations.engines.fused_steps import SegmentedRun
from simulations.engines.fused_weights import Descent, Workspace
from simulations.engines.memory_errors import memory_named
from simulations.packing import Packed, Visits, visits

__all__ = ["FusedTrainer"]

# Arguments of torch's SGD under which it computes nothing else than without them.
_NEUTRAL = ("momentum", "dampening", "nesterov", "maximize", "differentiable")
_HOW_ONLY = ("foreach", "fused")
_TINY = torch.finfo(torch.float32).tiny


class FusedTrainer(BatchTrainer):
    """A batch trainer of stacks of linear layers under plain SGD, on the CPU.

    It takes `nn.Linear`, `nn.Sequential`, or a module whose forward is such a chain: flatten, linear layers, ReLU,
    LeakyReLU, Tanh, Sigmoid, GELU, SiLU, ELU, Identity; the loss `cross_entropy` or `squared_error`. A metric is called
    once for the examples of many batches, so it must treat each on its own. Clients sorted by their number of steps,
    longest first, save a copy of the result. One trainer serves one thread at a time; it keeps its working memory.

    Args: seed: of the initial weights. together: in how many steps' worth of rows the first layer's weights are
        touched; 0 for never, None for what the shapes suggest.
    Raises: UnsupportedError: naming the layer or the loss that it cannot do; TaskError: if the model cannot be built.
    """

    def __init__(self, task: Task, seed: int = 0, *, together: int | None = None) -> None:
        self._errors = errors_of(task.loss)
        self._stack = stack_of(task.build(seed))
        self._metrics, self._classes = dict(task.metrics), task.classes
        self._together, self._workspace = together, Workspace()

    @torch.no_grad()
    def descend(self, work: BatchWork) -> FusedTrained:
        """Train the K clients; see `BatchTrainer`."""
        most = Threads(torch.get_num_threads())
        with memory_named(), threads(1):
            return self._descend(work, most)

    def _descend(self, work: BatchWork, most: Threads) -> FusedTrained:
        rate = work.training.rate(work.round)
        self._check(work)
        inputs = self._stack.rows(work.packed.examples.inputs[0])
        seen = visits(work.packed, work.training, work.purpose, work.clients)
        descent, space, batch_size = _descent(work, rate, seen.order), self._workspace, work.training.batch_size
        rows = _Rows(work.packed, seen)
        width = self._stack.layers[-1].outputs
        errors = self._errors(rows.targets, rows.shares, width)
        outputs = space.take("outputs", len(rows.targets), width)
        bench = Bench(space, batch_size, most)
        network = Network(self._stack, work.parameters, len(work.packed), descent, bench)
        run: DualRun | SegmentedRun
        if self._never_touches(work.packed, seen):
            run = DualRun(network, inputs, seen, work.packed.counts[seen.order])
            run.train(errors, outputs)
        else:
            run = SegmentedRun(network)
            run.train(inputs, list(segments(seen, self._steps_together(seen))), errors, outputs)
        sums = rows.sums(self._measures(errors.losses(outputs), outputs, rows))
        steps = (seen.counts > 0).sum(dim=1).double()
        return FusedTrained(run, sums, {"steps": steps, "step_size": steps * rate}, seen.order, self._stack.spec.size)

    def _check(self, work: BatchWork) -> None:
        _check_training(work.training)
        packed, spec = work.packed, self._stack.spec
        held = work.parameters
        if held.shape != (spec.size,) or held.dtype != torch.float32 or held.device.type != "cpu":
            got = f"{held.dtype} {tuple(held.shape)} on {held.device}"
            raise UnsupportedError(f"parameters must be float32 ({spec.size},) on the cpu, got {got}")
        for tensor in (*packed.examples.inputs, packed.examples.targets):
            if tensor.device.type != "cpu":
                raise UnsupportedError(f"the fused trainer takes examples on the cpu, got {tensor.device}")
        if len(packed.examples.inputs) != 1:
            raise UnsupportedError(f"the fused trainer takes one input tensor, got {len(packed.examples.inputs)}")
        if len(packed) != len(work.clients) or not len(packed):
            raise UnsupportedError(f"{len(packed)} clients' examples do not fit {len(work.clients)} clients")
        if not packed.counts.all():
            raise UnsupportedError(f"client {work.clients[int(packed.counts.argmin())]} has no examples")
        weights = packed.examples.weights
        if weights is not None:
            totals = np.add.reduceat(weights.double().numpy(), packed.offsets[:-1])
            if not totals.all():
                raise UnsupportedError(f"every example of client {work.clients[int(totals.argmin())]} weighs 0")
        if self._classes is not None:
            _check_labels(packed.examples.targets, self._classes)
        if work.guide.offset is not None:
            _check_offset(work.guide.offset, (len(packed), spec.parameter_count))
        if work.training.max_gradient_norm is not None and (work.guide.mu or work.guide.offset is not None):
            raise UnsupportedError("max_gradient_norm together with a guide is not fused")

    def _never_touches(self, packed: Packed, seen: Visits) -> bool:
        """Return whether the first layer's weights are better never made."""
        if self._together is not None:
            return self._together == 0
        return dual_pays(self._stack.layers[0], packed, seen)

    def _steps_together(self, seen: Visits) -> int:
        if self._together is not None:
            return self._together
        return together(self._stack.layers[0], seen, hidden=len(self._stack.layers) > 1)

    def _measures(self, losses: Tensor, outputs: Tensor, rows: _Rows) -> dict[str, Tensor]:
        """Return the loss and each metric of every real row."""
        measures = {"loss": rows.real(losses)}
        outputs, targets = rows.real(outputs), rows.real(rows.targets)
        for name, metric in self._metrics.items():
            measures[name] = _measured(name, metric, outputs, targets)
        return measures


class FusedTrained:
    """K clients that were trained; see `Trained`. Clients in the order in which they were given."""

    def __init__(
        self,
        run: DualRun | SegmentedRun,
        sums: Mapping[str, Tensor],
        facts: Mapping[str, Tensor],
        order: NDArray[np.int64],
        size: int,
    ) -> None:
        self._run, self._size, self._order = run, size, torch.from_numpy(order)
        back = torch.from_numpy(np.argsort(order))
        self._back = None if (order == np.arange(len(order))).all() else back
        self.reports = Update(
            torch.empty(len(order), 0),
            torch.ones(len(order), dtype=torch.float64),
            {name: value[back] for name, value in sums.items()},
            {name: value[back] for name, value in facts.items()},
        )

    @torch.no_grad()
    def rows(self) -> Update:
        """Return the K updates."""
        with memory_named(), threads(1):
            values = torch.empty(len(self._order), self._size)
            self._run.rows(values)
        return self.reports.replace(values=values if self._back is None else values.index_select(0, self._back))

    @torch.no_grad()
    def total(self, factors: Tensor) -> Tensor:
        """Return the sum of the K updates, each times its factor."""
        with memory_named(), threads(1):
            return self._run.total(factors.float()[self._order])


class _Rows:
    """What belongs to each row that is trained on, step by step and, within a step, client by client."""

    def __init__(self, packed: Packed, seen: Visits) -> None:
        takes_part = (seen.counts > 0).t()
        counts = seen.counts.t()[takes_part]
        places = seen.rows.transpose(0, 1)[takes_part]
        real = torch.arange(places.shape[1]) < counts.unsqueeze(1)
        self.targets = packed.examples.targets.index_select(0, places.flatten())
        self._real = None if bool(real.all()) else real.flatten().nonzero().squeeze(1)
        clients = torch.arange(len(packed)).expand(takes_part.shape)[takes_part]
        self._clients = self.real(clients.repeat_interleave(places.shape[1])).numpy()
        self._count = len(packed)
        weights = packed.examples.weights
        self._weights: NDArray[np.float64] | None = None
        if weights is None:
            self.shares = (real / counts.unsqueeze(1)).flatten()
            totals = packed.counts.astype(np.float64)
        else:
            given = weights.float()[places] * real
            self.shares = (given / given.sum(dim=1, keepdim=True).clamp_min(_TINY)).flatten()
            self._weights = self.real(weights[places].flatten()).double().numpy()
            totals = np.add.reduceat(weights.double().numpy(), packed.offsets[:-1])
        self._totals = totals[seen.order]

    def real(self, values: Tensor) -> Tensor:
        """Return the rows of `values` (R, ...) that stand for an example."""
        return values if self._real is None else values.index_select(0, self._real)

    def sums(self, measures: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return each client's total weight and its means times that, (K,) each, in the order of the visits."""
        processed = self._added(np.ones(len(self._clients)))
        scale = self._totals / np.where(processed == 0, 1.0, processed)
        sums = {name: self._added(values.double().numpy()) * scale for name, values in measures.items()}
        return {name: torch.from_numpy(value) for name, value in {"examples": self._totals, **sums}.items()}

    def _added(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        weighted = values if self._weights is None else values * self._weights
        return np.bincount(self._clients, weights=weighted, minlength=self._count).astype(np.float64, copy=False)


def _measured(name: str, metric: Metric, outputs: Tensor, targets: Tensor) -> Tensor:
    try:
        values = metric(outputs, targets)
    except Exception as error:  # a user's metric may raise anything; alone, its client says so
        raise UnsupportedError(f"the metric {name} failed on many batches at once: {type(error).__name__}") from error
    if not isinstance(values, Tensor) or values.shape != (len(targets),):
        raise UnsupportedError(f"the metric {name} did not return one value an example for many batches at once")
    return values


def _check_training(training: Training) -> None:
    if training.optimizer.lower() != "sgd":
        raise UnsupportedError(f"optimizer {training.optimizer} is not fused; sgd is")
    if training.precision != "float32":
        raise UnsupportedError(f"precision {training.precision} is not fused; float32 is")
    for name, value in training.optimizer_arguments.items():
        if name in _NEUTRAL and value:
            raise UnsupportedError(f"optimizer argument {name} = {value} is not fused; leave it out")
        if name not in (*_NEUTRAL, *_HOW_ONLY, "weight_decay"):
            raise UnsupportedError(f"optimizer argument {name} is not fused")
    decay = training.optimizer_arguments.get("weight_decay", 0.0)
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < math.inf:
        raise UnsupportedError(f"optimizer argument weight_decay = {decay} is not fused; a number >= 0 is")


def _check_labels(targets: Tensor, classes: int) -> None:
    low, high = (-1.0, 0.0) if targets.is_floating_point() else (bound.item() for bound in targets.aminmax())
    if low < 0 or high >= classes:
        raise UnsupportedError(f"targets are not integers from 0 to {classes - 1}")


def _check_offset(offset: Tensor, shape: tuple[int, int]) -> None:
    if offset.shape not in (shape, shape[1:]):
        raise UnsupportedError(f"a guide's offset must have shape {shape} or {shape[1:]}, got {tuple(offset.shape)}")


def _descent(work: BatchWork, rate: float, order: NDArray[np.int64]) -> Descent:
    """Return the descent in which decay and guide are a factor of the weights and a constant drift."""
    mu, offset = work.guide.mu, work.guide.offset
    decay: Any = work.training.optimizer_arguments.get("weight_decay", 0.0)
    drift = work.parameters * mu if mu else None
    if offset is not None:
        held = offset.float() if offset.dim() == 1 else offset.float()[torch.from_numpy(order)]
        drift = -held if drift is None else drift - held
    return Descent(rate, 1 - rate * (mu + decay), drift, work.training.max_gradient_norm)

"""Steps of K clients captured once as a CUDA graph and replayed: a small model's step is mostly its kernels' launches.

A graph repeats its kernels with the same numbers on the same memory. So a step is captured for each of its shapes, on
memory of its own for what a step reads and reports; the clients' weights stay where they are from chunk to chunk.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from clients.torch_trainer import has_batch_norm
from simulations.engines.batch_plan import Batches, Group, Plan, Step
from simulations.engines.batched_state import BatchedState, Steering
from simulations.engines.functional_optimizers import FunctionalOptimizer

__all__ = ["CudaTape", "Report", "StepGraphs", "Steps", "Tape", "repeats"]

_log = logging.getLogger(__name__)
# Each graph keeps the memory of its step; cohorts of ever new sizes would fill the device.
_MOST_GRAPHS = 32

Work = Callable[[], None]


class Report(Protocol):
    """Takes one value an example, or a client, of a step; `BatchTally` does."""

    def add(self, name: str, step: Step, places: slice | Tensor, values: Tensor, count: int) -> None:
        """Keep the values."""
        ...


class Steps(Protocol):
    """The steps of one chunk: what they work on, and the same steps with other memory for what they read and report."""

    plan: Plan
    state: BatchedState
    tally: Report
    streams: Tensor

    def take(self, step: Step, batches: Batches, optimizer: FunctionalOptimizer, steering: Steering) -> None:
        """Take one step of all clients that still train."""
        ...

    def elsewhere(self, plan: Plan, tally: Report, streams: Tensor) -> Steps:
        """Return steps on the same weights that read the shares of `plan` and the clients' numbers `streams`."""
        ...


class Tape(Protocol):
    """What kernels are recorded on."""

    def warm(self, work: Work) -> None:
        """Do the work where what follows is recorded: libraries make themselves at home at the first call."""
        ...

    def record(self, work: Work) -> Work:
        """Return what does the kernels of `work` again, which are recorded and not done."""
        ...


class CudaTape:
    """A CUDA device. Recording and warming up are on a stream of their own, as capture asks."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm(self, work: Work) -> None:
        """Do the work on the stream of the captures, after and before everything else on the device."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def record(self, work: Work) -> Work:
        """Return the replay of a captured graph; graphs share their memory, so they are replayed one at a time."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            work()
        replay: Work = graph.replay
        return replay


def repeats(module: nn.Module) -> bool:
    """Return whether a step of `module` is the same kernels with the same numbers each time.

    Dropout's masks are keyed by the step and the round, and BatchNorm counts; both come to a kernel as numbers.
    """
    draws = any(isinstance(part, _DropoutNd) and part.p > 0 for part in module.modules())
    return not draws and not has_batch_norm(module)


class StepGraphs:
    """Takes steps for a trainer: the first of a shape as it is, the second while it is recorded, all others by replay.

    Guarantees: the result is that of `Steps.take`, by the same kernels. Steps that a graph would not repeat as they are
    go by `Steps.take`: of models for which `repeats` is false, of examples in groups, with a guide, or with an
    optimizer that has memory. Where recording fails, this is said once and every step goes by `Steps.take`.
    """

    def __init__(self, tape: Tape, module: nn.Module) -> None:
        self._tape, self._module = tape, module
        self._able = repeats(module)
        self._warm: set[Hashable] = set()
        self._graphs: dict[Hashable, _Graph] = {}
        self._place: Hashable = None

    @classmethod
    def on(cls, device: torch.device, module: nn.Module) -> Self | None:
        """Return what captures on a CUDA device, and None elsewhere."""
        return cls(CudaTape(device), module) if device.type == "cuda" else None

    def take(
        self, run: Steps, step: Step, batches: Batches, optimizer: FunctionalOptimizer, steering: Steering
    ) -> None:
        """Take one step."""
        if not self._able or steering.guided or optimizer.slots or len(step.groups) != 1 or not step.groups[0].whole:
            run.take(step, batches, optimizer, steering)
            return
        self._keep_to(run.state, optimizer)
        key = _key(step, batches, steering)
        graph = self._graphs.get(key)
        if graph is None and key in self._warm and len(self._graphs) < _MOST_GRAPHS:
            graph = self._recorded(key, run, step, batches, optimizer, steering)
        if graph is not None:
            graph.replay(run, step, batches)
        elif self._able and key not in self._warm:
            self._warm.add(key)
            before = _plain_state(self._module)
            self._tape.warm(lambda: run.take(step, batches, optimizer, steering))
            # A model that counts its own forward passes, or changes by them, would be repeated as it is now.
            self._able = before == _plain_state(self._module)
        else:
            run.take(step, batches, optimizer, steering)

    def _keep_to(self, state: BatchedState, optimizer: FunctionalOptimizer) -> None:
        """Forget every graph if the weights are elsewhere than they were, or descend at another rate."""
        place = (*(block.data_ptr() for block in state.blocks), optimizer)
        if place != self._place:
            self._graphs.clear()
            self._warm.clear()
            self._place = place

    def _recorded(
        self,
        key: Hashable,
        run: Steps,
        step: Step,
        batches: Batches,
        optimizer: FunctionalOptimizer,
        steering: Steering,
    ) -> _Graph | None:
        graph = _Graph.of(run, step, batches)
        try:
            graph.record(self._tape, optimizer, steering)
        except Exception as error:  # noqa: BLE001 - whatever a driver or a library says: the steps go on without,
            # and where graphs were what memory had no room for, their memory is free again.
            self._able = False
            self._graphs.clear()
            line = " ".join(str(error).split())
            _log.warning("steps are not captured as a CUDA graph (%s: %.160s)", type(error).__name__, line)
            return None
        self._graphs[key] = graph
        return graph


class _Kept:
    """A report whose values stay where they were made."""

    def __init__(self) -> None:
        self.values: dict[str, tuple[Tensor, int]] = {}

    def add(self, name: str, step: Step, places: slice | Tensor, values: Tensor, count: int) -> None:
        """Keep a copy: the values could be a view of the parameters that the step changes."""
        self.values[name] = values.clone(), count


@dataclass
class _Graph:
    """One step on memory of its own: `batches`, `shares` and `streams` are filled before each replay."""

    run: Steps
    step: Step
    batches: Batches
    shares: Tensor = field(repr=False)
    streams: Tensor = field(repr=False)
    kept: _Kept
    repeat: Work | None = None

    @classmethod
    def of(cls, run: Steps, step: Step, batches: Batches) -> Self:
        """Return the graph of steps like `step`, not recorded yet."""
        own = Batches(tuple(column.clone() for column in batches.inputs), batches.targets.clone())
        shares, streams = _shares(run, step).clone(), run.streams[: step.active].clone()
        kept, count = _Kept(), step.groups[0].count
        here = Step(step.number, step.active, 0, (Group(slice(0, step.active), count, True),))
        # The rest of the chunk's plan is not read by a step, and need not stay as long as the graph.
        none = torch.empty(0)
        plan = dataclasses.replace(run.plan, shares=shares, steps=(), rows=none, weights=none, who=none)
        return cls(run.elsewhere(plan, kept, streams), here, own, shares, streams, kept)

    def record(self, tape: Tape, optimizer: FunctionalOptimizer, steering: Steering) -> None:
        """Record the step, which is not taken."""
        self.repeat = tape.record(lambda: self.run.take(self.step, self.batches, optimizer, steering))

    def replay(self, run: Steps, step: Step, batches: Batches) -> None:
        """Take the step of `run`."""
        for own, given in zip(self.batches.inputs, batches.inputs, strict=True):
            own.copy_(given)
        self.batches.targets.copy_(batches.targets)
        self.shares.copy_(_shares(run, step))
        self.streams.copy_(run.streams[: step.active])
        assert self.repeat is not None
        self.repeat()
        for name, (values, count) in self.kept.values.items():
            run.tally.add(name, step, slice(0, step.active), values, count)


def _shares(run: Steps, step: Step) -> Tensor:
    return run.plan.shares[step.first : step.first + step.active]


def _key(step: Step, batches: Batches, steering: Steering) -> Hashable:
    shapes = tuple((tuple(t.shape), t.dtype) for t in (*batches.inputs, batches.targets))
    return step.active, step.groups[0].count, shapes, steering.max_norm


def _plain_state(module: nn.Module) -> dict[str, Any]:
    """Return the numbers and words that layers keep as attributes."""
    return {
        f"{name}.{key}": value
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, bool | int | float | str)
    }

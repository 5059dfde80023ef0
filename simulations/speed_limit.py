"""What this machine could do: examples a second of plain centralised SGD, the mark to hold a simulation against."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from time import perf_counter

import torch
from torch import nn

from fedml_core.data import Examples, batch_of
from fedml_core.dense import quick_dense
from fedml_core.devices import choose_device, seeded_torch
from fedml_core.errors import TaskError
from fedml_core.forward import Forward, guarded
from fedml_core.memory_layout import arrange, blames_layout, in_channels_last, ordered_gradients, rearranged
from fedml_core.task import Task
from simulations.population import Population

__all__ = ["BATCH_SIZE", "examples_per_s"]

BATCH_SIZE = 500
_RATE = 1e-3
_MOST_CLIENTS = 200
_BLOCKS = 5


def examples_per_s(task: Task, population: Population, *, device: str = "auto", seconds: float = 1.0) -> float:
    """Return how many examples a second a loop of forward, backward and step makes at batches of 500, at its best.

    The first clients' examples are its data, gathered before the clock starts and used again and again; no metric is
    computed. Half of `seconds` goes to one thread and half to as many as torch uses now: on a busy machine these can be
    far slower. The best tenth counts. Torch's global generators and threads are left as they were.
    Raises: TaskError: if the clients' data cannot be loaded or joined, or the user's model or loss fails.
    """
    chosen = choose_device(device)
    with seeded_torch(0, chosen):
        batch = guarded(_some, "joining the clients' examples", "to measure the limit")(population).to(chosen)
        module = task.build(0).to(chosen)
        module.train()
        if in_channels_last("auto", module, chosen):
            try:
                return _measured(task, module, batch, chosen, seconds, channels_last=True)
            except TaskError as error:
                if not blames_layout(error):
                    raise
        return _measured(task, module, batch, chosen, seconds, channels_last=False)


def _measured(
    task: Task, module: nn.Module, batch: Examples, chosen: torch.device, seconds: float, *, channels_last: bool
) -> float:
    arrange(module, channels_last=channels_last)
    inputs = tuple(rearranged(t) for t in batch.inputs) if channels_last else batch.inputs
    forward = Forward(task, module, "while measuring the limit", nullcontext())
    weights = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def step() -> None:
        losses, _ = forward((inputs, batch.targets, None))
        gradients = torch.autograd.grad(losses.mean(), weights, allow_unused=True)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    weight.sub_(gradient, alpha=_RATE)

    with quick_dense(module, chosen), ordered_gradients(module) if channels_last else nullcontext():
        step()
        return BATCH_SIZE * max(_best(step, chosen, seconds / 2, threads) for threads in {1, torch.get_num_threads()})


def _best(step: Callable[[], None], chosen: torch.device, seconds: float, threads: int) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return max(_per_second(step, chosen, seconds / _BLOCKS) for _ in range(_BLOCKS))
    finally:
        torch.set_num_threads(before)


def _per_second(step: Callable[[], None], chosen: torch.device, seconds: float) -> float:
    steps, passed, started = 0, 0.0, _now(chosen)
    while passed < seconds or steps == 0:
        step()
        steps, passed = steps + 1, _now(chosen) - started
    return steps / passed


def _now(chosen: torch.device) -> float:
    if chosen.type == "cuda":
        torch.cuda.synchronize(chosen)
    return perf_counter()


def _some(population: Population) -> Examples:
    """Return 500 examples of the first clients, repeated where they have fewer."""
    parts: list[Examples] = []
    for client in range(min(len(population), _MOST_CLIENTS)):
        data = population.load(client).train
        if len(data):
            parts.append(batch_of(data, torch.arange(min(len(data), BATCH_SIZE))))
        if sum(len(part) for part in parts) >= BATCH_SIZE:
            break
    if not parts:
        raise TaskError(f"none of the first {_MOST_CLIENTS} clients has an example to measure the machine's limit with")
    inputs = tuple(torch.cat(tensors) for tensors in zip(*(part.inputs for part in parts), strict=True))
    joined = Examples(inputs, torch.cat([part.targets for part in parts]))
    return joined.take(torch.arange(BATCH_SIZE) % len(joined))

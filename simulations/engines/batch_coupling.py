"""Whether a task treats a batch's examples one by one, so that the batch may be filled up with some that weigh 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fedml_core.data import Examples
from fedml_core.randomness import torch_generator
from fedml_core.task import Task

__all__ = ["Coupling", "coupling"]

_EXAMPLES, _TRIALS = 8, 3
_TOLERANCE = 1e-4
# Weights that begin at 0 hide what lies behind them, so the trial is of others, moved by this share of their size.
_MOVED = 0.1


@dataclass(frozen=True)
class Coupling:
    """`model`: an example's outputs, or what the model remembers, depend on the others of its batch.

    `loss`: its loss or a metric does.
    """

    model: bool
    loss: bool


@torch.no_grad()
def coupling(
    task: Task, module: nn.Module, forward: Callable[[tuple[Tensor, ...]], Any], examples: Examples, batch_size: int
) -> Coupling:
    """Return what leaving one example out changes for the others: a trial on a few examples of different targets.

    The module's parameters and buffers are others after it.

    Args: forward: the module's outputs for one client, the same whenever called with the same examples and state.
    """
    count = max(2, min(len(examples), batch_size, _EXAMPLES))
    places = _different(examples.targets, count)
    _move(module.parameters())
    found = Coupling(model=False, loss=False)
    for left_out in range(1, 1 + min(count, _TRIALS)):
        order = [*places[left_out:], *places[:left_out]]
        batch = examples.take(torch.tensor(order, device=examples.targets.device))
        one = _trial(task, module, forward, batch)
        found = Coupling(found.model or one.model, found.loss or one.loss)
    return found


def _trial(task: Task, module: nn.Module, forward: Callable[[tuple[Tensor, ...]], Any], batch: Examples) -> Coupling:
    """Return what leaving out the last example changes."""
    remembered = [buffer.clone() for buffer in module.buffers()]
    outputs = forward(batch.inputs)
    if not all(isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == len(batch) for leaf in tree_leaves(outputs)):
        return Coupling(model=True, loss=True)
    head = tree_map(lambda leaf: leaf[:-1], outputs)
    calls = (task.loss, *task.metrics.values())
    loss = not all(_same(call(outputs, batch.targets), call(head, batch.targets[:-1])) for call in calls)
    after = _exchanged(module, remembered)
    try:
        alone = forward(tuple(column[:-1] for column in batch.inputs))
    except torch.OutOfMemoryError:
        raise  # it says nothing about the model, and whoever asked can go on with fewer clients
    except Exception:  # noqa: BLE001  # user's code may raise anything; refusing a smaller batch is to depend on it
        return Coupling(model=True, loss=loss)
    pairs = zip(tree_leaves(outputs), tree_leaves(alone), strict=False)
    remembers = not all(_close(one, other) for one, other in zip(after, module.buffers(), strict=True))
    _exchanged(module, remembered)
    return Coupling(model=remembers or not all(_same(whole, part) for whole, part in pairs), loss=loss)


def _different(targets: Tensor, count: int) -> list[int]:
    """Return the places of `count` examples, as many different targets as there are among them first."""
    every = list(range(len(targets)))
    if targets.dim() == 1:
        seen: dict[float, int] = {}
        for place, target in enumerate(targets.tolist()):
            seen.setdefault(target, place)
        every = [*dict.fromkeys([*seen.values(), *every])]
    return [every[place % len(every)] for place in range(count)]


def _move(parameters: Iterable[Tensor]) -> None:
    generator = torch_generator("coupling")
    for parameter in parameters:
        if parameter.is_floating_point() and parameter.numel():
            size = float(parameter.square().mean().sqrt()) or 1.0
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(noise, alpha=_MOVED * size)


def _exchanged(module: nn.Module, values: Sequence[Tensor]) -> list[Tensor]:
    """Return what the buffers hold, which then hold `values`."""
    before = [buffer.clone() for buffer in module.buffers()]
    for buffer, value in zip(module.buffers(), values, strict=True):
        buffer.copy_(value)
    return before


def _same(whole: Tensor, part: Tensor) -> bool:
    """Return whether `part` is `whole` without its last row."""
    return whole.dim() > 0 and part.shape == whole[:-1].shape and _close(whole[:-1], part)


def _close(one: Tensor, other: Tensor) -> bool:
    first, second = one.float(), other.float()
    scale = float(first.nan_to_num(posinf=0.0, neginf=0.0).abs().max()) if first.numel() else 0.0
    return torch.allclose(first, second, rtol=_TOLERANCE, atol=_TOLERANCE * scale, equal_nan=True)

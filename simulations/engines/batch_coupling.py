"""Whether a task treats a batch's examples one by one, so that the batch may be filled up with some that weigh 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fedml_core.data import Examples
from fedml_core.task import Task

__all__ = ["Coupling", "coupling"]

_EXAMPLES = 8
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Coupling:
    """`model`: an example's outputs depend on the others of its batch. `loss`: its loss or a metric does."""

    model: bool
    loss: bool


@torch.no_grad()
def coupling(task: Task, forward: Callable[[tuple[Tensor, ...]], Any], examples: Examples, batch_size: int) -> Coupling:
    """Return what leaving one example out changes for the others: a trial on the first examples.

    Args: forward: one client's outputs, the same whenever called with the same examples.
    """
    count = max(2, min(len(examples), batch_size, _EXAMPLES))
    batch = examples.take(torch.arange(count, device=examples.targets.device) % len(examples))
    outputs = forward(batch.inputs)
    if not all(isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == count for leaf in tree_leaves(outputs)):
        return Coupling(model=True, loss=True)
    head = tree_map(lambda leaf: leaf[:-1], outputs)
    calls = (task.loss, *task.metrics.values())
    loss = not all(_same(call(outputs, batch.targets), call(head, batch.targets[:-1])) for call in calls)
    try:
        alone = forward(tuple(column[:-1] for column in batch.inputs))
    except torch.OutOfMemoryError:
        raise  # it says nothing about the model, and whoever asked can go on with fewer clients
    except Exception:  # noqa: BLE001  # user's code may raise anything; refusing a smaller batch is to depend on it
        return Coupling(model=True, loss=loss)
    pairs = zip(tree_leaves(outputs), tree_leaves(alone), strict=False)
    return Coupling(model=not all(_same(whole, part) for whole, part in pairs), loss=loss)


def _same(whole: Tensor, part: Tensor) -> bool:
    """Return whether `part` is `whole` without its last row."""
    if not whole.dim() or part.shape != whole[:-1].shape:
        return False
    first, second = whole[:-1].float(), part.float()
    scale = float(first.abs().max()) if first.numel() else 0.0
    return torch.allclose(first, second, rtol=_TOLERANCE, atol=_TOLERANCE * scale, equal_nan=True)

"""What torch has noted down for a backward pass."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction

__all__ = ["backward_nodes", "users_backward"]


def backward_nodes(losses: Tensor) -> Iterator[object]:
    """Yield each node of the graph behind `losses`, once, in no order."""
    waiting = [losses.grad_fn]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        yield node
        for source, _ in node.next_functions:
            if source is not None and source not in seen:
                seen.add(source)
                waiting.append(source)


def users_backward(losses: Tensor, ours: type[Function]) -> bool:
    """Return whether a function with a backward pass of its own, other than `ours`, has a part in the graph."""
    known = f"{ours.__name__}Backward"
    return any(isinstance(node, BackwardCFunction) and type(node).__name__ != known for node in backward_nodes(losses))

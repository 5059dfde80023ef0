"""A stand-in for CUDA graphs that runs anywhere, and a watch for what would make a GPU's host wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class OpTape:
    """Records torch's operations as a graph records kernels: the same numbers on the same memory at every replay.

    Unlike a capture, recording does the work, so the first replay has nothing left to do.
    """

    def __init__(self, fail: Exception | None = None) -> None:
        self.warmed = self.recorded = self.replayed = 0
        self._fail = fail

    def warm(self, work: Callable[[], None]) -> None:
        self.warmed += 1
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        if self._fail is not None:
            raise self._fail
        self.recorded += 1
        done = _Recording()
        with done:
            work()
        first = [True]

        def replay() -> None:
            self.replayed += 1
            if not first:
                done.repeat()
            first.clear()

        return replay


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        held = {part.untyped_storage().data_ptr() for part in _tensors((args, kwargs))}
        # A view needs no repetition: it is made of the same memory.
        fresh = [part for part in _tensors(found) if part.untyped_storage().data_ptr() not in held]
        if fresh or func._schema.is_mutable:
            self._calls.append((func, args, kwargs or {}, fresh))
        return found

    @torch.no_grad()
    def repeat(self) -> None:
        for func, args, kwargs, fresh in self._calls:
            again = _tensors(func(*args, **kwargs))
            if fresh:
                assert len(again) == len(fresh)
            for own, made in zip(fresh, again, strict=False):
                own.copy_(made)


class Waits(TorchDispatchMode):
    """Counts by name the operations for which a GPU's host would have to wait."""

    _WAITING = (
        aten._local_scalar_dense,
        aten.is_nonzero,
        aten.equal,
        aten.nonzero,
        aten.masked_select,
        aten._unique2,
        aten.unique_dim,
        aten.repeat_interleave,
    )

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.seen: list[str] = []
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        masks = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            part.dtype == torch.bool for part in _tensors(args[1])
        )
        if func.overloadpacket in self._WAITING or masks:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]

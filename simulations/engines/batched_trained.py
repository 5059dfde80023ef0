"""K clients that were trained side by side: their updates, or the sum of them, of which no row is ever made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedml_core.model import ModelSpec
from fedml_core.update import Update
from simulations.engines.batched_state import BatchedState
from simulations.engines.memory_errors import memory_named

__all__ = ["BatchedTrained"]


class BatchedTrained:
    """K clients that were trained; see `Trained`.

    Args: order: which of the clients, as they were given, each row of `state` is. sums, facts: (K,) each, of the rows;
        sums are asked for once, when somebody needs them: up to then nobody has waited for a GPU's steps.
    """

    def __init__(
        self,
        spec: ModelSpec,
        state: BatchedState,
        order: NDArray[np.int64],
        sums: Callable[[], Mapping[str, Tensor]],
        facts: Mapping[str, Tensor],
    ) -> None:
        self._spec, self._state, self._order = spec, state, torch.from_numpy(order)
        self._back = torch.from_numpy(np.argsort(order))
        self._ordered = bool((order == np.arange(len(order))).all())
        self._sums, self._facts = sums, facts

    @cached_property
    def reports(self) -> Update:
        """Return what the clients report."""
        return Update(
            torch.empty(len(self._order), 0),
            torch.ones(len(self._order), dtype=torch.float64),
            {name: column[self._back] for name, column in self._sums().items()},
            {name: column[self._back] for name, column in self._facts.items()},
        )

    @torch.no_grad()
    def rows(self) -> Update:
        """Return the K updates, on the CPU."""
        with memory_named():
            moved = self._state.moved()
            made = torch.empty((len(self._order), self._spec.size), device=moved[0].device)
            for part, view in zip(moved, self._spec.views(made).values(), strict=True):
                view.copy_(part if self._ordered else part[self._back.to(part.device)])
            return self.reports.replace(values=made.cpu())

    @torch.no_grad()
    def total(self, factors: Tensor) -> Tensor:
        """Return the sum of the K updates, each times its factor, on the CPU."""
        with memory_named():
            moved = self._state.moved()
            made = torch.empty(self._spec.size, device=moved[0].device)
            mine = factors.float()[self._order].to(made.device)
            for part, view in zip(moved, self._spec.views(made).values(), strict=True):
                view.copy_((mine @ part.reshape(len(part), -1)).view_as(view))
            return made.cpu()

"""How updates become a total: streaming sums that hold O(d), and collections for rules that need every update.

Workers accumulate what they trained and merge, so traffic grows with the number of workers and not of clients.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from fedml_core.errors import StrategyError
from fedml_core.update import Total, Update, check_update

Rule = Callable[[Tensor, Tensor], Tensor]


class Accumulator(ABC):
    """Takes updates in any order, of one client or of K, and gives their total once.

    Laws, tested for every accumulator: any split over workers and any order gives the same total up to the order of
    float additions (exactly, where sums are integers); an update that `check_update` refuses changes nothing.
    Args: size: length d of the encoded values. max_weight: the largest weight one client may have.
    """

    def __init__(self, size: int, max_weight: float = math.inf) -> None:
        self.size = size
        self.max_weight = max_weight
        self.count = 0
        self.weight = 0.0
        self.sums: dict[str, float] = {}

    def add(self, update: Update, clients: Sequence[int] = ()) -> None:
        """Add an update of one client, or of K, whose numbers are `clients`; few accumulators want to know them.

        Raises: ReplyError: if it must not reach a sum; then nothing has changed.
        """
        check_update(update, self.size, self.max_weight)
        self._take(update.values.detach(), update)

    @property
    def takes_totals(self) -> bool:
        """Return whether the sum of K updates says as much as each of them, so that `add_total` works."""
        return False

    def add_total(self, values: Tensor, reports: Update) -> None:
        """Add the sum `values` (d,) of K updates; `reports` is what came with them, its own values of shape (K, 0).

        A sum that is finite proves every update finite, as NaN and infinity survive addition.
        Raises: ReplyError: if one of them must not reach a sum, or the sum is not finite; then nothing has changed.
        """
        if not self.takes_totals:
            raise StrategyError(f"{type(self).__name__} needs every update by itself; add them one by one")
        check_update(Update(values, torch.ones((), dtype=torch.float64)), self.size, math.inf)
        check_update(reports, 0, self.max_weight)
        self._take(values.detach(), reports)

    def merge(self, other: Self) -> None:
        """Add what another accumulator of the same kind and size has taken."""
        if type(other) is not type(self) or other.size != self.size:
            raise StrategyError(
                f"cannot merge {type(other).__name__}({other.size}) into {type(self).__name__}({self.size})"
            )
        self._merge_values(other)
        self.count += other.count
        self.weight += other.weight
        self._add_sums(other.sums)

    def total(self) -> Total:
        """Return the total of what was added so far; of nothing, zeros."""
        return Total(self._total_values(), self.weight, self.count, dict(self.sums))

    def _take(self, values: Tensor, reports: Update) -> None:
        self._add_values(values)
        self.count += math.prod(reports.lead)
        self.weight += float(reports.weight.sum())
        self._add_sums({name: float(value.sum()) for name, value in reports.sums.items()})

    def _add_sums(self, sums: Mapping[str, float]) -> None:
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    @abstractmethod
    def _add_values(self, values: Tensor) -> None: ...

    @abstractmethod
    def _merge_values(self, other: Self) -> None: ...

    @abstractmethod
    def _total_values(self) -> Tensor: ...


class PlainSum(Accumulator):
    """The sum, streamed: holds d float32 numbers, whatever the cohort.

    Trust: whoever runs it sees every update.
    """

    def __init__(self, size: int, max_weight: float = math.inf) -> None:
        super().__init__(size, max_weight)
        self._sum: Tensor | None = None

    @property
    def takes_totals(self) -> bool:
        """Return whether this is a sum and nothing more, as a subclass may be."""
        return type(self) is PlainSum

    def _add_values(self, values: Tensor) -> None:
        if values.dim() == 1:
            self._add_row(values)
        else:
            self._add_row(values.reshape(-1, self.size).sum(dim=0))

    def _add_row(self, row: Tensor) -> None:
        if self._sum is None:
            self._sum = row.clone()
        else:
            self._sum.add_(row)

    def _merge_values(self, other: Self) -> None:
        if other._sum is not None:
            self._add_values(other._sum)

    def _total_values(self) -> Tensor:
        return torch.zeros(self.size) if self._sum is None else self._sum.clone()


class Collect(Accumulator):
    """Every update, kept until a rule makes one of them: holds n d float32 numbers.

    For rules that are not sums, such as the median. Trust: whoever runs it sees and keeps every update of the round.
    Args: rule: maps values (n, d) and weights (n,) to one vector (d,); must not depend on the order of the rows.
    """

    def __init__(self, rule: Rule, size: int, max_weight: float = math.inf) -> None:
        super().__init__(size, max_weight)
        self._rule = rule
        self._rows: list[Tensor] = []
        self._weights: list[Tensor] = []

    def add(self, update: Update, clients: Sequence[int] = ()) -> None:
        """Add an update of one client, or of K, and keep it."""
        super().add(update, clients)
        self._weights.append(update.weight.detach().reshape(-1).clone())

    def _add_values(self, values: Tensor) -> None:
        self._rows.append(values.reshape(-1, self.size).clone())

    def _merge_values(self, other: Self) -> None:
        self._rows.extend(other._rows)
        self._weights.extend(other._weights)

    def _total_values(self) -> Tensor:
        if not self._rows:
            return torch.zeros(self.size)
        return self._rule(torch.cat(self._rows), torch.cat(self._weights))

"""Strategies that withstand lying clients. Their rules need each update by itself, so secure aggregation refuses them.

Each tolerates at most the stated number of clients that send anything whatever; all take updates alike, whatever number
of examples a client claims. The server holds the whole cohort's updates at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fedml_core.accumulate import Rule
from fedml_core.checks import require_number, require_whole
from fedml_core.errors import StrategyError
from fedml_core.transform import Transform
from strategies.averaging import scaled
from strategies.schedules import Schedule
from strategies.strategy import Strategy

_COLUMNS = 2**16
"""How many columns are sorted or multiplied at a time, so that a rule's own copies stay small beside the updates."""


@dataclass(frozen=True, kw_only=True)
class FedMedian(Strategy):
    """The median of the updates, coordinate by coordinate; of an even number, the mean of the middle two.

    Tolerates fewer than half of the cohort.
    Args: server_learning_rate: scales the step.
    Source: Yin et al. (2018), arXiv:1803.01498, Algorithm 1, option I.
    """

    server_learning_rate: Schedule | float = 1.0

    def pipeline(self) -> Transform:
        """Return the server's step."""
        return scaled(self.server_learning_rate)

    def rule(self) -> Rule:
        """Return the median."""
        return _median


@dataclass(frozen=True, kw_only=True)
class FedTrimmedMean(Strategy):
    """The mean of the updates without the largest and the smallest of them, coordinate by coordinate.

    Args: beta: in [0, 0.5), the share that is cut off at each end (rounded down), which is also the share of the cohort
        that is tolerated. server_learning_rate: scales the step.
    Source: Yin et al. (2018), arXiv:1803.01498, Algorithm 1, option II; Flower 1.41 `FedTrimmedAvg`.
    """

    beta: float = 0.2
    server_learning_rate: Schedule | float = 1.0

    def __post_init__(self) -> None:
        """Check beta."""
        require_number("beta", self.beta, at_least=0, below=0.5)
        super().__post_init__()

    def pipeline(self) -> Transform:
        """Return the server's step."""
        return scaled(self.server_learning_rate)

    def rule(self) -> Rule:
        """Return the trimmed mean."""
        return partial(_trimmed_mean, self.beta)


@dataclass(frozen=True, kw_only=True)
class Krum(Strategy):
    """The one update that is closest to its neighbours.

    Args: malicious: how many lying clients of a cohort are tolerated; a cohort must have at least malicious + 3
        members, and the paper's proof needs 2 malicious + 3. server_learning_rate: scales the step.
    Source: Blanchard et al. (2017), arXiv:1703.02757, section 4.
    """

    malicious: int = 0
    server_learning_rate: Schedule | float = 1.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        require_whole("malicious", self.malicious, at_least=0)
        super().__post_init__()

    def pipeline(self) -> Transform:
        """Return the server's step."""
        return scaled(self.server_learning_rate)

    def rule(self) -> Rule:
        """Return Krum's choice."""
        return partial(_krum, self.malicious, 1)


@dataclass(frozen=True, kw_only=True)
class MultiKrum(Strategy):
    """The mean of the updates that are closest to their neighbours.

    Flower weighs the chosen by the examples that they claim; here they count alike, as in the paper.
    Args: selected: how many updates are chosen. Others: as `Krum`.
    Source: Blanchard et al. (2017), arXiv:1703.02757, section 5.
    """

    malicious: int = 0
    selected: int = 1
    server_learning_rate: Schedule | float = 1.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        require_whole("malicious", self.malicious, at_least=0)
        require_whole("selected", self.selected, at_least=1)
        super().__post_init__()

    def pipeline(self) -> Transform:
        """Return the server's step."""
        return scaled(self.server_learning_rate)

    def rule(self) -> Rule:
        """Return the mean of Krum's choices."""
        return partial(_krum, self.malicious, self.selected)


# Rules are module-level functions, because accumulators that hold them travel between processes.


def _median(rows: Tensor, weights: Tensor) -> Tensor:
    return _middle(rows, (len(rows) - 1) // 2)


def _trimmed_mean(beta: float, rows: Tensor, weights: Tensor) -> Tensor:
    return _middle(rows, int(beta * len(rows)))


def _middle(rows: Tensor, cut: int) -> Tensor:
    """Return the mean (d,) of rows (n, d) without the `cut` largest and smallest of each column."""
    return torch.cat([c.sort(dim=0).values[cut : len(c) - cut].mean(dim=0) for c in _blocks(rows)])


def _krum(malicious: int, selected: int, rows: Tensor, weights: Tensor) -> Tensor:
    count = len(rows)
    if count < malicious + 3:
        raise StrategyError(
            f"Krum needs a cohort of at least malicious + 3 = {malicious + 3}, got {count}; sample more clients"
        )
    if selected > count - malicious:
        raise StrategyError(
            f"selected = {selected} of {count} updates would take in malicious ones; "
            f"at most {count - malicious} can be selected"
        )
    scores = _krum_scores(rows, neighbours=count - malicious - 2)
    # Equal scores are told apart by content, so that the order of arrival decides nothing.
    best = sorted(range(count), key=lambda place: (scores[place], _digest(rows[place])))[:selected]
    return rows[best].mean(dim=0)


def _krum_scores(rows: Tensor, neighbours: int) -> list[float]:
    """Return each row's summed squared distance to its nearest neighbours."""
    # Distances from inner products lose digits where updates are long and close, hence float64.
    inner = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for columns in _blocks(rows):
        inner += columns.double() @ columns.double().T
    squares = inner.diagonal()
    distances = (squares[:, None] + squares[None, :] - 2 * inner).clamp(min=0)
    distances.fill_diagonal_(torch.inf)
    scores: list[float] = distances.topk(neighbours, largest=False).values.sum(dim=1).tolist()
    return scores


def _blocks(rows: Tensor) -> Iterator[Tensor]:
    return (rows[:, start : start + _COLUMNS] for start in range(0, rows.shape[1], _COLUMNS))


def _digest(row: Tensor) -> bytes:
    return hashlib.blake2b(row.numpy(force=True).tobytes(), digest_size=8).digest()

"""What an audit watches while a run goes on: what each release has in common with each canary, and what was counted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.checkpoint import RunState
from server.round import RoundReport
from simulations.audit.canaries import Canaries, Scores

__all__ = ["Live", "facts_of", "most_participations"]


class Live:
    """Watches the rounds: keeps no release. `events`: what the run's state held of its privacy after the last round."""

    def __init__(self, canaries: Canaries, initial: Tensor) -> None:
        self._canaries, self._initial, self._last = canaries, initial, initial
        self._steps = torch.zeros_like(initial)
        self._rounds: list[NDArray[np.float64]] = []
        self.events: Sequence[Mapping[str, Any]] = ()

    def __call__(self, report: RoundReport, state: RunState) -> None:
        """Take the model after a round."""
        parameters = state.parameters
        root = math.sqrt(self._canaries.dimension)
        step = parameters - self._last
        self._rounds.append(root * self._canaries.cosines(step))
        self._steps = self._steps + step / step[: self._canaries.dimension].norm().clamp_min(1e-30)
        self._last, self.events = parameters, state.events

    @property
    def scores(self) -> Scores:
        """Return the scores of all rounds."""
        root = math.sqrt(self._canaries.dimension)
        every, final = self._canaries.cosines(self._steps), self._canaries.cosines(self._last - self._initial)
        return Scores(np.stack(self._rounds), root * every, root * final)


def most_participations(reports: Sequence[RoundReport]) -> int:
    """Return how often the client that took part most often did, as far as reports name clients."""
    counted = Counter(client for report in reports for client in report.participants)
    return max(counted.values(), default=0)


def facts_of(reports: Sequence[RoundReport], population: int, canaries: Canaries) -> dict[str, Any]:
    """Return the numbers of a run that an audit tells besides its findings."""
    return {
        "rounds": len(reports),
        "clients": population,
        "canaries": canaries.count,
        "canaries_included": len(canaries.members),
        "parameters": canaries.dimension,
        "cohort_sizes": [report.cohort for report in reports][:1000],
        "most_participations": most_participations(reports),
        "secure": next((report.secure for report in reversed(reports) if report.secure), None),
    }

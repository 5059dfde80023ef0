"""A model that clients saw in their evaluation is never made a second time, whatever happens to the server then."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fedml_core.messages import Arrival, Assignment, EvaluateWork
from fedml_core.privacy import TreeNoise
from fedml_core.weighting import Uniform
from server import EvaluationPlan, EveryClient, MinimumSeparation, PoissonSampling
from server.checkpoint import RunState
from server.coordinator import Coordinator
from server.history import RunFolder
from server.record import record_rounds
from strategies import CentralDP, FedAvg
from tests.doubles import PullChannel
from tests.server.test_books import CLIENTS, SIZE, Killed, plan_for

EVENLY = FedAvg(weighting=Uniform())
INDEPENDENT = CentralDP(EVENLY, clip_norm=1.0, noise_multiplier=2.0, expected_cohort=4, delta=1e-5)
TREE = dataclasses.replace(INDEPENDENT, noise=TreeNoise(rounds=6, restart_every=3))


class Watched(PullChannel):
    """Keeps the models that clients are given to evaluate, by round; the server may die of the first."""

    def __init__(self, seen: list[tuple[int, bytes]], *, dies: bool) -> None:
        super().__init__(CLIENTS, SIZE)
        self._seen, self._dies = seen, dies

    def exchange(self, assignment: Assignment, cohort: Sequence[int], timeout_s: float | None) -> Iterator[Arrival]:
        """Yield replies."""
        if isinstance(assignment.work, EvaluateWork):
            self._seen.append((assignment.round, assignment.parameters.numpy().tobytes()))
            if self._dies:
                raise Killed
        yield from super().exchange(assignment, cohort, timeout_s)


@pytest.mark.parametrize(
    ("strategy", "sampling"), [(INDEPENDENT, PoissonSampling(0.3)), (TREE, MinimumSeparation(3))], ids=["fresh", "tree"]
)
def test_a_round_whose_model_clients_saw_is_over_for_a_resumed_run(
    tmp_path: Path, strategy: CentralDP, sampling: Any
) -> None:
    plan = dataclasses.replace(plan_for(strategy, sampling), evaluation=EvaluationPlan(clients=EveryClient()))
    folder, seen = RunFolder(tmp_path, plan), list[tuple[int, bytes]]()
    spec = Watched(seen, dies=False).trainer.spec

    def fresh() -> RunState:
        return Coordinator.begin(plan, spec, torch.zeros(spec.size), "run")

    def go(state: RunState, *, dies: bool) -> Coordinator:
        coordinator = Coordinator(plan, spec, state, keep=folder.keep)
        extra = lambda: {"round": torch.tensor(coordinator.state.round + 1)}  # noqa: E731 - what a runner keeps
        record_rounds(coordinator, Watched(seen, dies=dies), 2, folder=folder, extra=extra)
        return coordinator

    with pytest.raises(Killed):
        go(folder.begin(fresh, spec, resume=False, overwrite=False), dies=True)
    state = folder.begin(fresh, spec, resume=True, overwrite=False)
    assert (state.round, int(state.extra["round"])) == (1, 1)
    assert [report.round for report in folder.reports()] == [1]
    coordinator = go(state, dies=False)
    assert [number for number, _ in seen] == [1, 2]
    assert [report.round for report in folder.reports()] == [1, 2]
    # One event covers a whole run of correlated noise.
    assert [each["count"] for each in coordinator.state.events] == [1 if strategy is TREE else 2]

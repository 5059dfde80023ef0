"""Running rounds so that they are kept, watched and told: what every command that runs rounds shares."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fedml_core.console import Console
from fedml_core.data import Data
from fedml_core.errors import ConfigError, RunError
from fedml_core.messages import Channel
from fedml_core.model import ModelSpec
from fedml_core.spans import span
from fedml_core.storage import write_json
from fedml_core.task import Task
from fedml_core.transform import State
from server.checkpoint import FILE_NAME, RunState
from server.coordinator import Coordinator, Reserve
from server.history import PLOTS, SUMMARY, History, RunFolder, read_history, summarise
from server.plan import Plan
from server.progress import Progress
from server.report import read_run, write_report
from server.round import RoundReport

if TYPE_CHECKING:
    from server.secure_exchange import Witnesses
    from server.secure_sums import SecureSums

__all__ = ["Callback", "conclude", "coordinator_for", "finished", "record_rounds", "refuse_both", "watched"]

Callback = Callable[[RoundReport, RunState], object]


class Evaluates(Protocol):
    """What measures a model on the server's test data; `fedml_core.evaluation.Evaluator` does."""

    spec: ModelSpec

    def evaluate(self, parameters: Tensor, data: Data, batch_size: int = ...) -> dict[str, float]:
        """Return summed metrics."""
        ...


def coordinator_for(
    task: Task,
    plan: Plan,
    state: RunState,
    evaluator: Evaluates,
    *,
    witnesses: Callable[[], Witnesses] | None = None,
    folder: RunFolder | None = None,
    reserve: Reserve | None = None,
    reported: Sequence[str] | None = None,
) -> Coordinator:
    """Return a coordinator that evaluates on the task's test data, if it has any and the plan wants it.

    `witnesses`: tells whose signatures count in secure sums. `folder`: keeps what these record. `reserve`: see
    `Coordinator`. `reported`: what clients report beside their updates, if not all that the task measures.
    Raises: TaskError: if the test data are faulty. ConfigError: if there are secure sums and no witnesses.
    """
    held_out = task.test_data() if task.test_data else None
    if held_out is not None:
        task.check(held_out, "the task's test_data")
    evaluate = None if held_out is None else lambda parameters: evaluator.evaluate(parameters, held_out)
    gathering = None
    if plan.strategy.takes_secure_sums:
        names = task.reported if reported is None else reported
        gathering = _secure_gathering(names, plan, evaluator, witnesses, folder)
    return Coordinator(
        plan,
        evaluator.spec,
        state,
        evaluate=evaluate,
        derive=task.derive,
        gathering=gathering,
        reserve=reserve,
        keep=None if folder is None else folder.keep,
    )


def _secure_gathering(
    names: Sequence[str],
    plan: Plan,
    evaluator: Evaluates,
    witnesses: Callable[[], Witnesses] | None,
    folder: RunFolder | None,
) -> SecureSums[Any]:
    from server.secagg import SecureGathering  # loads cryptography, which sums in the clear do without
    from server.secagg_assisted import AssistedGathering
    from strategies.secure import AssistedOneShot, SecureAggregation

    if witnesses is None:
        raise ConfigError(
            "secure aggregation against an active server needs a roster that the operator has signed; give --roster"
        )
    assert isinstance(plan.strategy, SecureAggregation)
    record = None if folder is None else folder.transcribe
    assisted = isinstance(plan.strategy.protocol, AssistedOneShot)
    kind: type[SecureSums[Any]] = AssistedGathering if assisted else SecureGathering
    threads = torch.get_num_threads()
    return kind(plan.strategy, evaluator.spec, names, witnesses, record=record, threads=threads)


def record_rounds(
    coordinator: Coordinator,
    channel: Channel,
    rounds: int,
    *,
    folder: RunFolder | None = None,
    callbacks: Sequence[Callback] = (),
    extra: Callable[[], State] | None = None,
) -> list[RoundReport]:
    """Run until `rounds` rounds are done in all, recording each before the callbacks see it; return every report.

    `extra`: what of the runner belongs into the checkpoint after a round.
    """
    reports = folder.reports() if folder is not None and coordinator.state.round > 0 else []
    for report in coordinator.rounds(channel, rounds, extra=extra):
        reports.append(report)
        if extra is not None:
            coordinator.state = dataclasses.replace(coordinator.state, extra=extra())
        if folder is not None:
            with span("record"):
                folder.record(coordinator.state)
        for callback in callbacks:
            callback(report, coordinator.state)
    return reports


def finished(
    coordinator: Coordinator, reports: Sequence[RoundReport], folder: RunFolder | None, **facts: Any
) -> History:
    """Return a run's history, and write its summary with the caller's `facts` into its folder."""
    out = None if folder is None else str(folder.folder)
    summary = summarise(reports, **facts, out=out)
    if folder is not None:
        folder.finish(summary)
    return History(reports, coordinator.state.parameters, coordinator.spec, summary)


def refuse_both(*, resume: bool, overwrite: bool) -> None:
    """Raise ConfigError if a run is to be resumed and replaced."""
    if resume and overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite deletes it; give one of them")


@contextmanager
def watched(console: Console, rounds: int, folder: Path, again: Callable[[], Sequence[str]]) -> Iterator[Progress]:
    """Show each round as it ends; say what is kept, and the command that goes on with it, if the run is interrupted.

    Raises: RunError: as it came, with the folder in which every round is.
    """
    console.on_interrupt = lambda: _kept(folder, again())
    with Progress(console, rounds) as progress:
        try:
            yield progress
        except RunError as error:
            raise RunError(f"{error}; every round is in {folder}") from error


def conclude(console: Console, folder: Path, summary: Mapping[str, Any], *, plots: bool, next_step: str = "") -> None:
    """Write the summary, the report and unless told otherwise the plots of a finished run, and show them."""
    write_json(folder / SUMMARY, dict(summary))
    recorded = read_run(folder)
    report = write_report(recorded, plots=plots)
    rows = [*recorded.rows, ("report", f"{report}, plots in {folder / PLOTS}" if plots else f"{report}")]
    console.table([*rows, ("next", next_step)] if next_step else rows)
    console.result({**recorded.summary, "report": str(report)})


def _kept(folder: Path, again: Sequence[str]) -> str:
    try:
        rounds = len(read_history(folder))
    except ConfigError:
        rounds = 0
    if rounds == 0:
        if not (folder / FILE_NAME).exists():
            return "; no round was finished, so nothing is kept"
        return f"; no round was finished; what it may have released stays counted; go on with: {shlex.join(again)}"
    return f"; {rounds} rounds are kept in {folder}; go on with: {shlex.join(again)}"

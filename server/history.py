"""What a run leaves behind: a folder with a line for each round as it happens, a checkpoint, a summary and plots."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedml_core.errors import ConfigError
from fedml_core.model import ModelSpec
from fedml_core.storage import write_json
from fedml_core.strict_json import json_text
from server.checkpoint import FILE_NAME, RunState, load_checkpoint, save_checkpoint
from server.plan import Plan
from server.round import RoundReport
from server.uncovered import over_rounds

HISTORY, SUMMARY, PLOTS, TRANSCRIPT = "history.jsonl", "summary.json", "plots", "secagg.jsonl"


@dataclass(frozen=True)
class History:
    """A finished (or stopped) run: its reports, its final parameters (d,), and its summary.

    Example:
        history = simulate(task, FedAvg(), clients=100, rounds=20)
        history.metric("server.accuracy")[-1]
    """

    reports: Sequence[RoundReport] = field(repr=False)
    parameters: Tensor = field(repr=False)
    spec: ModelSpec = field(repr=False)
    summary: Mapping[str, Any]

    def metric(self, path: str) -> list[float]:
        """Return a metric over the rounds that have it, such as "server.accuracy" or "train.loss"."""
        return [value for report in self.reports if (value := report.metric(path)) is not None]

    def load_into(self, module: nn.Module) -> nn.Module:
        """Copy the final parameters into `module` and return it."""
        self.spec.load(self.parameters, module)
        return module


class RunFolder:
    """Records a run in a folder so that it can be read at any time and resumed after any crash.

    Guarantees: after a kill at any moment the history holds whole lines only, and `begin(resume=True)` goes on from
    the last checkpoint with a history that has each round once.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder = folder
        self._plan = plan
        self._history = folder / HISTORY

    def begin(self, fresh: Callable[[], RunState], spec: ModelSpec, *, resume: bool, overwrite: bool) -> RunState:
        """Return the state to start from: `fresh()`, or the checkpoint's.

        Raises: ConfigError: if the folder holds a run and neither `resume` nor `overwrite` was asked for.
            CheckpointError: if there is nothing to resume, or it is another run's.
        """
        if resume:
            state = load_checkpoint(self.folder, self._plan, spec.fingerprint)
            self._complete(state)
            return state
        if (self.folder / FILE_NAME).exists() or self._history.exists():
            if not overwrite:
                raise ConfigError(
                    f"{self.folder} holds a run; go on with --resume, replace it with --overwrite, or name "
                    "another --out"
                )
            for name in (FILE_NAME, HISTORY, SUMMARY, TRANSCRIPT):
                (self.folder / name).unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        return fresh()

    def record(self, state: RunState) -> None:
        """Save the state, then append its report to the history."""
        save_checkpoint(self.folder, state, self._plan)
        if state.report is not None:
            _append(self._history, state.report)

    def keep(self, state: RunState) -> None:
        """Save the state of a round that is not over yet, so that a crash in it gives nothing back."""
        save_checkpoint(self.folder, state, self._plan)

    def transcribe(self, attempt: Mapping[str, Any]) -> None:
        """Append what an attempt at a secure sum recorded, for whoever checks it later."""
        _append(self.folder / TRANSCRIPT, attempt)

    def reports(self) -> list[RoundReport]:
        """Return the history so far."""
        return read_history(self.folder)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary."""
        write_json(self.folder / SUMMARY, dict(summary))

    def _complete(self, state: RunState) -> None:
        # The checkpoint is written first: the history may lack its last line, or end in a line cut short.
        rows = [report.to_json() for report in read_history(self.folder) if report.round <= state.round]
        if state.report is not None and (not rows or rows[-1]["round"] < state.round):
            rows.append(dict(state.report))
        temporary = self._history.with_suffix(".tmp")
        temporary.write_text("".join(_line(row) for row in rows))
        temporary.replace(self._history)


def read_history(folder: Path) -> list[RoundReport]:
    """Return the reports in a run's folder; a last line cut short by a crash is left out.

    Raises: ConfigError: if the folder holds no run, or a line that is not a report.
    """
    path = folder / HISTORY
    if not path.exists():
        if (folder / FILE_NAME).exists():
            return []
        raise ConfigError(f"{folder} holds no run: there is no {HISTORY} in it")
    text = path.read_text()
    reports = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            reports.append(RoundReport.from_json(json.loads(line)))
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise ConfigError(f"{path}, line {number}: not a round report ({type(error).__name__})") from error
    return reports


def summarise(reports: Sequence[RoundReport], **facts: Any) -> dict[str, Any]:
    """Return a run's summary: the last metrics, totals over all rounds, and the caller's `facts`."""
    metrics: dict[str, Mapping[str, float]] = {}
    for report in reports:
        metrics.update(report.metrics)
    last = reports[-1] if reports else None
    return {
        "rounds": len(reports),
        "void_rounds": sum(report.status == "void" for report in reports),
        "metrics": metrics,
        "protection": last.protection if last else "none",
        "epsilon": last.epsilon if last else None,
        "privacy": over_rounds(report.privacy for report in reports),
        "example_privacy": over_rounds(report.example_privacy for report in reports),
        "seconds": round(sum(report.seconds for report in reports), 3),
        "bytes_up": sum(report.bytes_up for report in reports),
        "bytes_down": sum(report.bytes_down for report in reports),
        "excluded_replies": sum(len(report.excluded) for report in reports),
        "missing_replies": sum(report.cohort for report in reports) - sum(r.replies + len(r.excluded) for r in reports),
        **facts,
    }


def _line(row: Mapping[str, Any]) -> str:
    return json_text(row) + "\n"


def _append(path: Path, row: Mapping[str, Any]) -> None:
    # One write call a line: a kill between two calls leaves whole lines.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, _line(row).encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

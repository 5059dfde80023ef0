"""What a run leaves for people: report.md and plots, made from its history at any time, also of an unfinished run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedml_core.errors import ConfigError
from fedml_core.storage import write_atomically
from server.history import PLOTS, SUMMARY, read_history, summarise
from server.round import RoundReport
from server.summary import Row, summary_rows
from server.wording import bytes_text, headline, metrics_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

REPORT, LABELS = "report.md", "labels.json"
_TABLE_ROUNDS = 200


@dataclass(frozen=True)
class Recorded:
    """A run as its folder tells it; `finished` is False if it was interrupted or still goes on."""

    folder: Path
    reports: Sequence[RoundReport] = field(repr=False)
    summary: Mapping[str, Any]
    finished: bool

    @property
    def rows(self) -> list[Row]:
        """Return the summary as people read it."""
        return summary_rows(self.summary, self.reports)


def read_run(folder: Path) -> Recorded:
    """Return the run in `folder`.

    Raises: ConfigError: if there is none, it has not finished a round yet, or a file is damaged.
    """
    reports = read_history(folder)
    if not reports:
        raise ConfigError(f"{folder} holds a run that has not finished a round yet; wait for its first")
    facts = _json(folder / SUMMARY)
    # A summary from before a run was resumed is older than its history.
    finished = facts.get("rounds") == len(reports)
    kept: dict[str, Any] = facts if finished else {key: facts[key] for key in ("clients", "engine") if key in facts}
    return Recorded(folder, reports, {**summarise(reports, out=str(folder)), **kept}, finished)


def write_report(run: Recorded, *, plots: bool = True) -> Path:
    """Write the run's report.md, and unless told otherwise its plots, and return the report's path."""
    names: list[str] = []
    if plots:
        names = _draw(run)
    path = run.folder / REPORT
    write_atomically(path, _markdown(run, names).encode())
    return path


def write_labels(folder: Path, counts: NDArray[np.int64], class_names: Sequence[str]) -> None:
    """Keep how many examples of each class (columns) each simulated client (rows) holds, for the plots."""
    body = {"counts": counts.tolist(), "class_names": list(class_names)}
    write_atomically(folder / LABELS, json.dumps(body).encode())


def _draw(run: Recorded) -> list[str]:
    from server.plots import draw_all

    labels = _json(run.folder / LABELS)
    drawn = draw_all(
        (report.to_json() for report in run.reports),
        run.folder / PLOTS,
        baseline=run.summary.get("central"),
        label_counts=labels.get("counts"),
        class_names=labels.get("class_names") or None,
    )
    return [path.name for path in drawn]


def _json(path: Path) -> dict[str, Any]:
    """Return what a file of the run's folder holds; nothing, if there is no such file."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}; delete it, the history has all that counts") from None
    return found if isinstance(found, dict) else {}


def _markdown(run: Recorded, plots: Sequence[str]) -> str:
    lines = ["# Run report", ""]
    if not run.finished:
        lines += [f"The run has not finished: this is its state after round {run.reports[-1].round}.", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {_cell(text)} |" for name, text in run.rows), ""]
    for name in plots:
        lines += [f"![{name.removesuffix('.png')}]({PLOTS}/{name})", ""]
    lines += ["| round | status | metrics | replies | excluded | up | down |", "|---|---|---|---|---|---|---|"]
    lines += [_round_row(report) for report in run.reports[-_TABLE_ROUNDS:]]
    if len(run.reports) > _TABLE_ROUNDS:
        lines += ["", f"The last {_TABLE_ROUNDS} of {len(run.reports)} rounds; history.jsonl has all."]
    return "\n".join(lines) + "\n"


def _round_row(report: RoundReport) -> str:
    place, metrics = headline(report)
    measured = f"{metrics_text(metrics)} ({place})" if metrics else ""
    status = f"void: {report.why}" if report.status == "void" else report.status
    cells = [
        str(report.round),
        status,
        measured,
        f"{report.replies} of {report.cohort}",
        str(len(report.excluded)),
        bytes_text(report.bytes_up),
        bytes_text(report.bytes_down),
    ]
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

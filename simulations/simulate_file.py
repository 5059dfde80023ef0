"""`fedveil simulate`: a run.toml from its first line to its report."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedml_core.config import load_run
from fedml_core.console import Console
from fedml_core.data import targets_of
from fedml_core.errors import ConfigError, RunError
from fedml_core.loading import load_task
from fedml_core.storage import write_json
from fedml_core.task import Task
from server.history import PLOTS, SUMMARY, History, read_history
from server.progress import Progress
from server.report import LABELS, read_run, write_labels, write_report
from simulations.baseline import passes_of, train_centrally
from simulations.configure import simulation_from
from simulations.population import Partitioned
from simulations.simulate import Simulation

__all__ = ["Request", "simulate_file"]

_PLOTTED_CLIENTS = 1000


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for.

    `path`: the run.toml. `overrides`: `key=value` each. `out`: in the place of the file's. `central`: compare with the
    pooled data.
    """

    path: Path
    overrides: Sequence[str] = ()
    out: Path | None = None
    resume: bool = False
    overwrite: bool = False
    central: bool = False
    plots: bool = True


def simulate_file(console: Console, request: Request) -> None:
    """Run the simulation that a run.toml describes, show it, and leave history, summary, report and plots behind.

    Raises: FedveilError: for whatever is wrong; what was done so far stays readable.
    """
    if request.resume and request.overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite deletes it; give one of them")
    config = load_run(request.path, request.overrides)
    folder = request.out or Path(config.out).expanduser()
    task = load_task(config.task, config.folder)
    simulation = simulation_from(config, task)
    if request.central and (task.train_data is None or task.test_data is None):
        raise ConfigError("--central needs the task's train_data and test_data; give the task both, or leave it out")
    history = _run(console, simulation, request, folder)
    summary = {**history.summary, "stopped_early": len(history.reports) < config.rounds}
    if request.central:
        console.note("training the same model on the pooled data")
        summary["central"] = _central(simulation, task, history)
    write_json(folder / SUMMARY, summary)
    _keep_labels(simulation, task, folder)
    recorded = read_run(folder)
    report = write_report(recorded, plots=request.plots)
    places = f"{report}, plots in {folder / PLOTS}" if request.plots else f"{report}"
    console.table([*recorded.rows, ("report", places), ("next", _next(request, folder))])
    console.result({**recorded.summary, "report": str(report)})


def _run(console: Console, simulation: Simulation, request: Request, folder: Path) -> History:
    again = f"fedveil simulate {shlex.quote(str(request.path))} --resume"
    if request.out is not None:
        again += f" --out {shlex.quote(str(request.out))}"
    console.on_interrupt = lambda: _kept(folder, again)
    with Progress(console, simulation.rounds) as progress:
        try:
            return simulation.run(out=folder, resume=request.resume, overwrite=request.overwrite, callbacks=[progress])
        except RunError as error:
            raise RunError(f"{error}; every round is in {folder}") from error


def _kept(folder: Path, again: str) -> str:
    try:
        rounds = len(read_history(folder))
    except ConfigError:
        rounds = 0
    if rounds == 0:
        return "; no round was finished, so nothing is kept"
    return f"; {rounds} rounds are kept in {folder}; go on with: {again}"


def _central(simulation: Simulation, task: Task, history: History) -> Mapping[str, float]:
    counted = sum(report.replies for report in history.reports)
    share = counted / (len(history.reports) * simulation.clients)
    passes = passes_of(simulation.training, len(history.reports), share)
    return train_centrally(task, simulation.training, passes=passes, seed=simulation.seed, device=simulation.device)


def _keep_labels(simulation: Simulation, task: Task, folder: Path) -> None:
    (folder / LABELS).unlink(missing_ok=True)  # of the run that this one replaced
    population = simulation.population
    if task.classes is None or not isinstance(population, Partitioned) or len(population) > _PLOTTED_CLIENTS:
        return
    targets = targets_of(population.pool)
    if targets.dim() == 1:
        counts = torch.stack([torch.bincount(targets[part], minlength=task.classes) for part in population.parts])
        write_labels(folder, counts.numpy(), task.class_names)


def _next(request: Request, folder: Path) -> str:
    run = shlex.quote(str(request.path))
    if not request.central:
        other = shlex.quote(f"{folder}-central")
        return f"fedveil simulate {run} --central --out {other}  (what the same model reaches on the pooled data)"
    return "fedveil list strategies  (what else [strategy] can name)"

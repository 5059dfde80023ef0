"""`fedveil simulate`: a run.toml from its first line to its report."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from fedml_core.config import load_run
from fedml_core.console import Console
from fedml_core.data import targets_of
from fedml_core.errors import ConfigError, FedveilError
from fedml_core.loading import load_task
from fedml_core.task import Task
from server.history import History
from server.record import Callback, conclude, refuse_both, watched
from server.report import LABELS, write_labels
from simulations.baseline import passes_of, train_centrally
from simulations.configure import simulation_from
from simulations.population import Partitioned
from simulations.profile import Profile, Profiler
from simulations.simulate import Simulation
from simulations.speed_limit import examples_per_s

__all__ = ["Request", "simulate_file"]

_PLOTTED_CLIENTS = 1000


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for.

    `path`: the run.toml. `overrides`: `key=value` each. `out`: in the place of the file's. `central`: compare with the
    pooled data. `profile`: say where the time went. `trace`: write a Chrome trace of the same to this file.
    """

    path: Path
    overrides: Sequence[str] = ()
    out: Path | None = None
    resume: bool = False
    overwrite: bool = False
    central: bool = False
    plots: bool = True
    profile: bool = False
    trace: Path | None = None


def simulate_file(console: Console, request: Request) -> None:
    """Run the simulation that a run.toml describes, show it, and leave history, summary, report and plots behind.

    Raises: FedveilError: for whatever is wrong; what was done so far stays readable.
    """
    refuse_both(resume=request.resume, overwrite=request.overwrite)
    config = load_run(request.path, request.overrides)
    folder = request.out or Path(config.out).expanduser()
    task = load_task(config.task, config.folder)
    simulation = simulation_from(config, task)
    if request.central and (task.train_data is None or task.test_data is None):
        raise ConfigError("--central needs the task's train_data and test_data; give the task both, or leave it out")
    profiler = _profiler(simulation, request)
    with watched(console, simulation.rounds, folder, lambda: _again(request)) as progress, profiler or nullcontext():
        callbacks: list[Callback] = [progress, *([] if profiler is None else [profiler])]
        history = simulation.run(out=folder, resume=request.resume, overwrite=request.overwrite, callbacks=callbacks)
    summary = {**history.summary, "stopped_early": len(history.reports) < config.rounds}
    if request.central:
        console.note("training the same model on the pooled data")
        summary["central"] = _central(simulation, task, history)
    profile = _profile(console, simulation, profiler, request)
    if profile is not None:
        summary["profile"] = profile.to_json()
    _keep_labels(simulation, task, folder)
    conclude(console, folder, summary, plots=request.plots, next_step=_next(request, folder))
    for line in () if profile is None else profile.lines():
        console.say(line)


def _profiler(simulation: Simulation, request: Request) -> Profiler | None:
    """Return what records the run's spans, if that was asked for; what comes before the first round is done first."""
    if not request.profile and request.trace is None:
        return None
    _ = simulation.population, simulation.trainer
    return Profiler(simulation.training, trace=request.trace is not None)


def _profile(console: Console, simulation: Simulation, profiler: Profiler | None, request: Request) -> Profile | None:
    """Write the trace and return the profile, where they were asked for."""
    if profiler is None:
        return None
    if request.trace is not None:
        profiler.write_trace(request.trace)
        console.note(f"wrote {request.trace}: open it in chrome://tracing or ui.perfetto.dev")
    if not request.profile:
        return None
    try:
        limit = examples_per_s(simulation.task, simulation.population, device=simulation.device)
    except FedveilError as error:
        console.note(f"the machine's limit could not be measured: {error}")
        return profiler.profile()
    return profiler.profile(limit)


def _again(request: Request) -> list[str]:
    """Return the command that goes on with an interrupted run."""
    changes = [word for change in request.overrides for word in ("--set", change)]
    out = [] if request.out is None else ["--out", str(request.out)]
    central = ["--central"] if request.central else []
    return ["fedveil", "simulate", str(request.path), "--resume", *changes, *out, *central]


def _central(simulation: Simulation, task: Task, history: History) -> Mapping[str, float]:
    counted = sum(report.replies for report in history.reports)
    share = counted / (len(history.reports) * len(simulation.population))
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

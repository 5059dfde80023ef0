"""`fedveil audit`: a run.toml from its first line to a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedml_core.config import load_run
from fedml_core.console import Console
from fedml_core.errors import ConfigError
from fedml_core.loading import load_task
from server.progress import Progress
from simulations.audit.audit import Audit
from simulations.audit.books import Record
from simulations.audit.findings import Verdict
from simulations.audit.page import JSON, PAGE, rows_of, write_audit
from simulations.audit.shadows import require_shadows
from simulations.configure import simulation_from

__all__ = ["Request", "audit_file"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for.

    `path`: the run.toml. `overrides`: `key=value` each. `out`: in the place of the file's own with "-audit" behind it.
    """

    path: Path
    overrides: Sequence[str] = ()
    out: Path | None = None
    canaries: int | None = None
    shadows: int = 16
    pictures: bool = True


def audit_file(console: Console, request: Request) -> Verdict:
    """Audit the run that a run.toml describes, show and write what was found, and return the verdict.

    Raises: FedveilError: if the run cannot be done.
    """
    require_shadows("--shadow-models", request.shadows)
    config = load_run(request.path, request.overrides)
    configured = Path(config.out).expanduser()
    folder = request.out or configured.with_name(f"{configured.name}-audit")
    if folder.exists() and any(folder.iterdir()) and not (folder / JSON).exists() and not (folder / "run").exists():
        raise ConfigError(f"{folder} holds something that is no audit; give another --out")
    task = load_task(config.task, config.folder)
    simulation = simulation_from(config, task)
    audit = Audit(simulation=simulation, canaries=request.canaries, shadows=request.shadows, record=Record.of(config))
    folder.mkdir(parents=True, exist_ok=True)
    with Progress(console, audit.rounds) as progress:
        audited = audit.run(folder, callbacks=[progress], tell=progress.note)
    page = write_audit(audited, folder, pictures=request.pictures)
    console.table([*rows_of(audited), ("report", f"{page} and {folder / JSON}")])
    console.result({**audited.to_json(), "report": str(folder / PAGE)})
    return audited.verdict

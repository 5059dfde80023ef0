"""A run's whole state as one value, saved after every round: atomic, checksummed, and enough to go on bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fedml_core.errors import CheckpointError
from fedml_core.storage import load_tree, save_tree
from fedml_core.transform import State
from server.plan import Plan

FILE_NAME = "checkpoint.fedveil"


@dataclass(frozen=True)
class RunState:
    """Everything that the next round depends on.

    `round`: rounds done, void ones included. `accepted`: rounds that changed the model. `report`: the last round's, so
    that a history that was cut off can be completed. `best`, `stale`: early stopping's best value and the number of
    evaluations since. `extra`: what the runner keeps, such as the memories of a simulation's clients. `events`: what an
    accountant must be told of the rounds begun so far. `secret`: the seed of cohorts, in hexadecimal, where privacy
    rests on nobody's knowing them; it is never sent, and None where the plan's own seed serves.
    """

    run: str
    fingerprint: str
    parameters: Tensor = field(repr=False)
    strategy: State = field(repr=False)
    round: int = 0
    accepted: int = 0
    best: float = float("nan")
    stale: int = 0
    report: Mapping[str, Any] | None = None
    extra: State = field(default_factory=dict, repr=False)
    events: Sequence[Mapping[str, Any]] = field(default_factory=tuple, repr=False)
    secret: str | None = field(default=None, repr=False)


def save_checkpoint(folder: Path, state: RunState, plan: Plan) -> Path:
    """Write the state to `folder` and return the file's path."""
    path = folder / FILE_NAME
    body = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    mode = 0o644 if state.secret is None else 0o600  # whoever reads secrets or past noise can undo the protection
    save_tree(path, "checkpoint", {**body, "plan": plan.identity()}, mode)
    return path


def load_checkpoint(folder: Path, plan: Plan, fingerprint: str) -> RunState:
    """Return the state saved in `folder`.

    Raises: CheckpointError: if there is none, it is damaged, or it belongs to another model or plan (the first
        difference is named): going on would give a result that neither plan describes.
    """
    tree = load_tree(folder / FILE_NAME, "checkpoint")
    saved = tree.pop("plan")
    for key, value in plan.identity().items():
        if _plain(saved.get(key)) != _plain(value):
            raise CheckpointError(
                f"{folder} holds a run with {key} = {saved.get(key)}, now it is {value}; "
                "restore the old value, or start a new run in another folder"
            )
    if tree["fingerprint"] != fingerprint:
        raise CheckpointError(
            f"{folder} holds a run of model {tree['fingerprint']}, the task's model is now {fingerprint}; "
            "start a new run in another folder"
        )
    return RunState(**tree)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value

"""What `Auto` found fastest before, by model, work and machine: a small file in the user's cache folder.

It only ever saves time: a file that is missing, damaged or cannot be written changes nothing but that.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from fedml_core.errors import FedveilError
from fedml_core.freed_memory import why_not_kept
from fedml_core.messages import Assignment, TrainWork
from fedml_core.storage import write_json
from simulations.engines.engine import Engine, Stage
from simulations.engines.processes import available_processors

__all__ = ["cache_file", "code_version", "key_of", "recall", "remember"]

_VERSION = 2
_MOST = 500
_DECIDING = ("clients", "simulations.engines")


def cache_file() -> Path:
    """Return where choices are kept: `fedveil/engines.json` in XDG_CACHE_HOME or the system's own place for caches."""
    named = os.environ.get("XDG_CACHE_HOME")
    if named and Path(named).is_absolute():
        folder = Path(named)
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        folder = Path(local)
    else:
        folder = Path.home() / ".cache"
    return folder / "fedveil" / "engines.json"


def key_of(stage: Stage, assignment: Assignment, cohort: int, workers: int) -> str:
    """Return what a choice depends on, as one word: model, work, the size of the cohort, and the machine."""
    assert isinstance(assignment.work, TrainWork)
    loss = stage.task.loss
    about = {
        "model": assignment.fingerprint,
        "module": type(stage.task.build(0)).__qualname__,
        "loss": getattr(loss, "__qualname__", type(loss).__qualname__),
        "training": assignment.work.training.model_dump(mode="json", exclude={"learning_rate", "learning_rate_decay"}),
        "strategy": type(stage.strategy).__qualname__,
        "private": None if stage.private is None else repr(stage.private.private),
        "cohort": cohort.bit_length(),  # to a factor of two
        "device": str(stage.trainer.device),
        "workers": workers,
        "threads": torch.get_num_threads(),
        "keeps": why_not_kept() is None,
        "machine": [platform.machine(), platform.node(), os.cpu_count(), available_processors()],
        "versions": [torch.__version__, code_version(), _VERSION],
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:32]


@cache
def code_version() -> str:
    """Return a word that changes with fedveil's code of engines and of local training, which decides who is fastest."""
    files = sorted(file for package in _DECIDING for file in Path(str(resources.files(package))).glob("*.py"))
    # Without files, as in a zipped package, the version of the whole must do.
    parts = [file.read_bytes() for file in files] or [importlib.metadata.version("fedveil").encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def recall(key: str) -> Engine | None:
    """Return the engine that was fastest, or None if nothing that can be used is known."""
    config = _read().get(key)
    if not isinstance(config, Mapping):
        return None
    try:
        return Engine.from_config(config)
    except (FedveilError, TypeError, ValueError):
        return None


def remember(key: str, engine: Engine) -> None:
    """Keep the choice, and of older ones the latest 500; where the folder cannot be written, nothing is kept."""
    choices = {name: config for name, config in _read().items() if name != key}
    kept = dict(list(choices.items())[-(_MOST - 1) :])
    try:
        write_json(cache_file(), {"version": _VERSION, "choices": {**kept, key: engine.to_config()}})
    except OSError:
        return


def _read() -> dict[str, Any]:
    try:
        body = json.loads(cache_file().read_text())
    except (OSError, ValueError, RuntimeError):  # RuntimeError: there is no home folder
        return {}
    known = isinstance(body, dict) and body.get("version") == _VERSION and isinstance(body.get("choices"), dict)
    return dict(body["choices"]) if known else {}

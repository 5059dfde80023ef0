"""What runs in an actor of a Ray cluster: a worker that adds up what its engine did, reached by method calls."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedml_core.bulk import GatheredArrival
from fedml_core.errors import FedveilError, TaskError
from fedml_core.loading import load_task
from fedml_core.messages import Assignment
from fedml_core.spans import Recorder
from simulations.engines.chunk_worker import Chunk, ChunkWorker, Done, Failed, Job

__all__ = ["RayWorker", "load_task_files", "loaded_task_files"]


_TASK_FILE = "fedveil_task_"  # how the module of a task file is named, by `fedml_core.loading`


def loaded_task_files() -> list[str]:
    """Return the task files that this process has loaded: no other finds their modules by name."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(_TASK_FILE)]
    return [str(module.__file__) for module in modules]


def load_task_files(files: Sequence[str]) -> None:
    """Load task files as another process has, so that what is sent from there and names their modules can be read.

    Raises: TaskError: if one does not exist here, or fails.
    """
    for file in files:
        before = set(sys.modules)
        try:
            load_task(file, Path())
        except TaskError:
            # A file of several tasks is loaded all the same; which of them is meant comes with the job.
            if not any(name.startswith(_TASK_FILE) for name in set(sys.modules) - before):
                raise


class RayWorker:
    """The methods of an actor, in the order in which they are called; the first two answer with their error."""

    def __init__(self) -> None:
        self._worker: ChunkWorker | None = None

    def prepare(self, paths: Sequence[str], task_files: Sequence[str], threads: int) -> FedveilError | None:
        """Let modules and task files be found as the driver has found them, and use so many of torch's threads."""
        sys.path.extend(path for path in paths if path not in sys.path)
        torch.set_num_threads(threads)
        try:
            load_task_files(task_files)
        except FedveilError as error:
            return error
        return None

    def open(self, job: Job, device: str, spans: Recorder | None) -> FedveilError | None:
        """Make what the whole run needs, and return why that cannot be."""
        try:
            self._worker = ChunkWorker(job, device, spans)
        except FedveilError as error:
            return error
        return None

    def begin(self, assignment: Assignment, parameters: NDArray[np.float32]) -> None:
        """Begin a round with an assignment, whose parameters come beside it: they lie in memory that is shared."""
        own = torch.from_numpy(parameters.copy())
        self._at_work().begin(dataclasses.replace(assignment, parameters=own))

    def do(self, chunk: Chunk) -> Done | Failed:
        """Do a chunk."""
        return self._at_work().do(chunk)

    def gathered(self) -> GatheredArrival:
        """Return what the round's chunks come to."""
        return self._at_work().gathered()

    def _at_work(self) -> ChunkWorker:
        assert self._worker is not None
        return self._worker

"""What runs in a worker process: chunks come through a pipe, and so does what they came to."""

from __future__ import annotations

import gc
import os
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from fedml_core.freed_memory import keep_freed_memory
from fedml_core.messages import Assignment
from fedml_core.spans import Recorder
from simulations.engines.chunk_worker import Chunk, ChunkWorker, Job
from simulations.engines.parcel import Shelf, packed, unpacked

__all__ = ["Round", "Shelves", "work"]

_LOOK_S = 2.0  # between looks at whether the parent still lives


@dataclass(frozen=True)
class Round:
    """A new round: chunks that follow are of this assignment."""

    assignment: Assignment


@dataclass(frozen=True)
class Shelves:
    """Where large tensors lie on their way: `down` to all workers, `up` from one of them."""

    down: Shelf | None
    up: Shelf | None


def work(connection: Connection, job: Job, device: str, spans: Recorder | None, shelves: Shelves) -> None:
    """Do chunks until the pipe closes; `spans`, a recorder that has recorded nothing, says where the time goes."""
    # Ctrl-C reaches the whole group; the parent decides what it means, and closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    keep_freed_memory()
    worker = ChunkWorker(job, device, spans)
    # What is here now stays: no collection need look at it again, nor copy the pages that it shares with the parent.
    gc.freeze()
    try:
        _serve(connection, worker, shelves)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    finally:
        worker.close()


def _serve(connection: Connection, worker: ChunkWorker, shelves: Shelves) -> None:
    parent = os.getppid()
    while True:
        # Workers forked after this one hold the parent's end of the pipe too, so its death alone does not close it.
        while not connection.poll(_LOOK_S):
            if os.getppid() != parent:
                return
        message = unpacked(connection.recv_bytes(), shelves.down)
        if isinstance(message, Round):
            worker.begin(message.assignment)
        elif isinstance(message, Chunk):
            connection.send_bytes(packed(worker.do(message), shelves.up))
        else:
            connection.send_bytes(packed(worker.gathered(), shelves.up))

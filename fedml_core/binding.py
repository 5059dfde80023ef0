"""What ties a secure sum's masks to one model and one piece of work."""

from __future__ import annotations

import dataclasses
import hashlib

from fedml_core.errors import SecureAggregationError
from fedml_core.message_frames import assignment_to_frame
from fedml_core.messages import Assignment, SecureWork, TrainWork

__all__ = ["binding_of"]


def binding_of(assignment: Assignment) -> bytes:
    """Return 32 bytes that differ wherever the model, the run, the round or the work to train differs.

    Both sides of a secure sum bind their masks to it: masks for different models do not cancel.
    Raises: SecureAggregationError: if the assignment has nothing to train.
    """
    work = assignment.work
    train = work.train if isinstance(work, SecureWork) else work
    if not isinstance(train, TrainWork):
        raise SecureAggregationError("an assignment without training has nothing that masks could be bound to")
    frame = assignment_to_frame(dataclasses.replace(assignment, work=train))
    digest = hashlib.sha256(b"fedveil/binding/1")
    for part in (frame.kind.encode(), frame.header.encode()):
        digest.update(len(part).to_bytes(8, "big") + part)
    for name in sorted(frame.arrays):
        array = frame.arrays[name]
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        label = f"{name}|{little.dtype.str}|{little.shape}".encode()
        digest.update(len(label).to_bytes(8, "big") + label)
        digest.update(little.reshape(-1).view("u1").data)
    return digest.digest()

"""The wire form of assignments and replies: frames of `fedml_core.wire`, written, and read from strangers.

Nothing that is read is executed; what it names is built from classes that are installed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Not used below: subclassing makes a class known by name, and a client that imports only this module must be able to
# read every client half that comes with fedveil.
import fedml_core.compression
import fedml_core.control_variates
import fedml_core.proximal
import fedml_core.weighting  # noqa: F401 - see above
from fedml_core.errors import ReplyError
from fedml_core.messages import (
    Assignment,
    Body,
    EvaluateWork,
    Evaluation,
    Failure,
    Refusal,
    Reply,
    SecureAnswer,
    SecureWork,
    TrainWork,
    Work,
)
from fedml_core.training import Training
from fedml_core.transform import Transform
from fedml_core.untrusted import as_number, as_table, as_text, as_whole, printable
from fedml_core.update import Update
from fedml_core.wire import Frame, from_frame, to_frame

__all__ = ["assignment_from_frame", "assignment_to_frame", "reply_from_frame", "reply_to_frame"]


def assignment_to_frame(assignment: Assignment) -> Frame:
    """Return the wire form of an assignment."""
    work = assignment.work
    body: dict[str, Any] = {
        "run": assignment.run,
        "round": assignment.round,
        "fingerprint": assignment.fingerprint,
        "parameters": assignment.parameters,
    }
    if isinstance(work, EvaluateWork):
        return to_frame("evaluate", {**body, "batch_size": work.batch_size})
    if isinstance(work, SecureWork):
        train = None if work.train is None else _train_body(work.train)
        return to_frame("secure", {**body, "stage": work.stage, "parts": _as_arrays(work.parts), "train": train})
    return to_frame("train", {**body, **_train_body(work)})


def _train_body(work: TrainWork) -> dict[str, Any]:
    return {
        "training": work.training.model_dump(exclude_unset=True),
        "pipeline": work.pipeline.to_config(),
        "told": work.told,
        "seed": work.seed,
        **({} if work.promised is None else {"promised": work.promised}),
    }


def _as_arrays(parts: Mapping[str, bytes]) -> dict[str, NDArray[np.uint8]]:
    return {name: np.frombuffer(data, np.uint8) for name, data in parts.items()}


def _as_parts(tree: Any) -> dict[str, bytes]:
    """Return a secure exchange's messages, each of which must be plain bytes."""
    parts: dict[str, bytes] = {}
    for name, data in as_table(tree).items():
        if not isinstance(data, Tensor) or data.dtype != torch.uint8 or data.dim() != 1:
            raise ValueError("a message of a secure sum must be bytes")
        parts[as_text(name)] = data.numpy().tobytes()
    return parts


def assignment_from_frame(frame: Frame) -> Assignment:
    """Return the assignment that a frame holds; nothing in it is executed.

    Raises: ValueError: if it holds none. ConfigError or StrategyError: if its pipeline names what is not installed here
        or cannot be.
    """
    try:
        body = from_frame(frame)
        parameters = body["parameters"]
        if not isinstance(parameters, Tensor) or parameters.dtype != torch.float32 or parameters.dim() != 1:
            raise ValueError("an assignment's parameters must be one float32 vector")
        run, number, fingerprint = as_text(body["run"]), as_whole(body["round"]), as_text(body["fingerprint"])
        return Assignment(run, number, fingerprint, parameters, _work(frame.kind, body))
    except (KeyError, TypeError) as error:
        raise ValueError(f"the assignment is not one that this version understands: {error!r:.200}") from error


def _work(kind: str, body: Mapping[str, Any]) -> Work:
    if kind == "evaluate":
        return EvaluateWork(as_whole(body["batch_size"]))
    if kind == "train":
        return _train_work(body)
    if kind == "secure":
        train = None if body["train"] is None else _train_work(as_table(body["train"]))
        return SecureWork(as_text(body["stage"]), _as_parts(body["parts"]), train)
    raise ValueError(f"an assignment is 'train', 'evaluate' or 'secure', got {kind!r:.80}")


def _train_work(body: Mapping[str, Any]) -> TrainWork:
    training = Training(**as_table(body["training"]))
    if not _names(body["pipeline"]) <= Transform.members.keys():
        import fedml_core.privacy.client_halves  # noqa: F401 - loads cryptography, which nothing else that is sent needs
    pipeline = Transform.from_config(body["pipeline"], "the assignment's pipeline")
    promised = None if body.get("promised") is None else as_table(body["promised"])
    return TrainWork(training, pipeline, as_table(body["told"]), as_whole(body["seed"]), promised=promised)


def _names(config: Any) -> set[str]:
    """Return the names of a pipeline's parts in its configuration, whatever a stranger wrote there."""
    if not isinstance(config, Mapping):
        return set()
    parts = config.get("parts")
    inner = [_names(part) for part in parts] if isinstance(parts, list) else []
    own = {config["name"]} if isinstance(config.get("name"), str) else set()
    return own.union(*inner)


def reply_to_frame(reply: Reply) -> Frame:
    """Return the wire form of a reply; an update's `facts` stay behind."""
    head = {"run": reply.run, "round": reply.round, "client": reply.client, "fingerprint": reply.fingerprint}
    body = reply.body
    if isinstance(body, Update):
        sums = {name: float(value) for name, value in body.sums.items()}
        return to_frame("update", {**head, "values": body.values, "weight": float(body.weight), "sums": sums})
    if isinstance(body, Evaluation):
        return to_frame("evaluation", {**head, "sums": dict(body.sums)})
    if isinstance(body, SecureAnswer):
        vector = {} if body.vector is None else {"vector": body.vector}
        return to_frame("answer", {**head, "parts": _as_arrays(body.parts), **vector})
    kind = "refusal" if isinstance(body, Refusal) else "failure"
    return to_frame(kind, {**head, "rule": body.rule, "reason": body.reason})


def reply_from_frame(frame: Frame) -> Reply:
    """Return the reply that a frame holds; what it claims is not yet believed (see `server.validation`).

    Guarantees: the text of a refusal or a failure is short, and does nothing to the terminal that shows it.
    Raises: ReplyError: with rule `malformed`, if it holds none.
    """
    try:
        tree = from_frame(frame)
        body = _reply_body(frame.kind, tree)
        return Reply(
            as_text(tree["run"]), as_whole(tree["round"]), as_whole(tree["client"]), as_text(tree["fingerprint"]), body
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ReplyError(
            "malformed", f"the reply is not one that this version understands: {type(error).__name__}"
        ) from error


def _reply_body(kind: str, tree: Mapping[str, Any]) -> Body:
    if kind == "update":
        values = tree["values"]
        if not isinstance(values, Tensor):
            raise TypeError("values must be an array")
        return Update.of(values, as_number(tree["weight"]), **_sums(tree))
    if kind == "evaluation":
        return Evaluation(_sums(tree))
    if kind == "answer":
        vector = tree.get("vector")
        if vector is not None and (not isinstance(vector, Tensor) or vector.dim() != 1):
            raise TypeError("a masked vector must be one array")
        return SecureAnswer(_as_parts(tree["parts"]), None if vector is None else vector.numpy())
    if kind in ("refusal", "failure"):
        made = Refusal if kind == "refusal" else Failure
        return made(printable(as_text(tree["rule"]), 80), printable(as_text(tree["reason"]), 500))
    raise ValueError(f"unknown reply {kind!r}")


def _sums(tree: Mapping[str, Any]) -> dict[str, float]:
    return {name: as_number(value) for name, value in as_table(tree["sums"]).items()}

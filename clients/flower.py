"""An ordinary Flower ClientApp in secure sums: a mod answers the protocol, the app trains as it always did.

    app = ClientApp(mods=[secure_mod()])

Its server is `server.flower.SecureFlowerStrategy`. What the mod needs to know is in the node's config:

- `fedveil-site`: the node's own site.toml (its number, keys, roster, floor and the folder of its replay counter; its
  `task` is not used). Without it the node has no identity and takes part in semi-honest sums only.
- `fedveil-keeper`: the socket of a `clients.secure_keeper` on this machine. Needed wherever Flower gives each message
  a process of its own: SuperNodes always do, and Ray hands messages to any worker. With it, `fedveil-site` is the
  keeper's business. Without it, sessions live in this process, and an exchange that finds none says so and drops out.

Guarantees: of training, only the masked vector leaves the node: no arrays, no number of examples, no metric in clear.
    Training that is asked for in the clear is refused, and so is evaluation, unless `evaluates_in_clear`. The text of
    an exception of the app, which may quote data, stays at the node.
Trust: server sees only sums, as long as it runs the app that the node's operator agreed to. Flower sends an app's code
    from the server's side to the nodes: whoever can start a run there can also send an app without this mod, or with
    another. Fedveil's own clients take no code from anybody.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from clients.secure_keeper import KeptSessions
from clients.secure_sessions import Caller, SecureSessions, Sessions, refuse_plainly
from fedml_core import engine_guard  # noqa: F401 - its import sets Flower's switches, before Flower reads them
from fedml_core.errors import ConfigError, FedveilError, RefusalError, ReplyError, SecureAggregationError
from fedml_core.flower_records import pack
from fedml_core.flower_secure import Asked, Lesson, introduced, is_secure, refused
from fedml_core.message_frames import reply_to_frame
from fedml_core.messages import Assignment, Reply, SecureWork
from fedml_core.model import ModelSpec
from fedml_core.transform import Draws
from fedml_core.update import Update, all_finite

# isort: split
from flwr.app import ArrayRecord, Context, Error, Message, MessageType, RecordDict

__all__ = ["CallNext", "SecureMod", "secure_mod"]

CallNext = Callable[[Message, Context], Message]
"""The rest of the app: its other mods and its function."""

_log = logging.getLogger(__name__)


def secure_mod(*, minimum_cohort: int = 3, evaluates_in_clear: bool = False) -> SecureMod:
    """Return the mod to put first among a ClientApp's mods, so that the others see the app's own messages.

    Args: minimum_cohort: the fewest members of a sum that a node without a site.toml takes part in; a site.toml has its
        own. evaluates_in_clear: whether evaluation is answered, whose metrics the server sees node by node.
    """
    return SecureMod(minimum_cohort, evaluates_in_clear)


class SecureMod:
    """A Flower mod; make it with `secure_mod()`. May be shared by many nodes and threads of one process."""

    def __init__(self, minimum_cohort: int, evaluates_in_clear: bool) -> None:
        self._minimum_cohort, self._evaluates = minimum_cohort, evaluates_in_clear
        self._sessions: dict[tuple[str, str], Sessions] = {}
        self._lock = threading.Lock()

    def __call__(self, message: Message, context: Context, call_next: CallNext) -> Message:
        """Answer what is about a secure sum, and let the app answer what it may."""
        kind = message.metadata.message_type.partition(".")[0]
        if kind == MessageType.TRAIN:
            return self._train(message, context, call_next)
        if kind == MessageType.EVALUATE and not self._evaluates:
            return _refusal(message, "this node does not evaluate in the clear; secure_mod(evaluates_in_clear=True)")
        return call_next(message, context)

    def _train(self, message: Message, context: Context, call_next: CallNext) -> Message:
        if not is_secure(message.content):
            return _refusal(
                message,
                "this node trains under secure aggregation only, and was asked to train in the clear; the server needs "
                "server.flower.SecureFlowerStrategy",
            )
        try:
            asked = Asked.read(message.content)
            sessions = self._sessions_of(context)
            caller = Caller(str(context.run_id), str(context.node_id), asked.member, asked.active)
            if asked.assignment is None:
                return Message(introduced(sessions.introduce(caller)), reply_to=message)
            reply = self._exchange(sessions, caller, asked, lambda lesson: _taught(lesson, message, context, call_next))
        except ValueError as error:
            return _refusal(message, f"the message cannot be read: {error}")
        except FedveilError as error:
            _log.warning("node %d takes no part in this exchange: %s", context.node_id, error)
            told = refuse_plainly(error)
            return Message(refused(told.rule, told.reason), reply_to=message)
        # The salt: nobody may find out by Flower's store of equal parts whether they guessed a part.
        return Message(pack(reply_to_frame(reply), salt=secrets.token_bytes(16)), reply_to=message)

    def _exchange(
        self, sessions: Sessions, caller: Caller, asked: Asked, teach: Callable[[Lesson], RecordDict]
    ) -> Reply:
        assignment, lesson = asked.assignment, asked.lesson
        assert assignment is not None
        # What is taught is what the masks are bound to, or nothing is.
        if lesson is not None and lesson.fingerprint != assignment.fingerprint:
            raise SecureAggregationError("the model or its config is not the one that the masks would be bound to")

        def train(of: Assignment) -> Update:
            if lesson is None:
                raise SecureAggregationError("the exchange brings no model")
            return _encoded(_update(lesson, teach(lesson)), assignment, caller.member)

        return sessions.answer(caller, assignment, train)

    def _sessions_of(self, context: Context) -> Sessions:
        keeper, site = (_text(context, f"fedveil-{name}") for name in ("keeper", "site"))
        with self._lock:
            if (keeper, site) not in self._sessions:
                made: Sessions
                if keeper:
                    made = KeptSessions(Path(keeper))
                else:
                    made = SecureSessions(Path(site) if site else None, minimum_cohort=self._minimum_cohort)
                self._sessions[keeper, site] = made
            return self._sessions[keeper, site]


def _text(context: Context, key: str) -> str:
    value = context.node_config.get(key, "")
    if not isinstance(value, str):
        raise ConfigError(f"{key} in the node config must be a path, got {value!r}")
    return value


def _taught(lesson: Lesson, message: Message, context: Context, call_next: CallNext) -> RecordDict:
    """Return what the app answers to the message that an ordinary strategy would have sent."""
    message.content = RecordDict({"arrays": lesson.arrays, "config": lesson.config})
    try:
        answer = call_next(message, context)
    except Exception as error:  # whatever an app raises, its text may quote data and stays here
        _log.exception("the train function of node %d failed", context.node_id)
        raise ReplyError("client-app", f"its train function raised {type(error).__name__}") from error
    if answer.has_error():
        raise ReplyError("client-app", "its train function answered with an error")
    return answer.content


def _update(lesson: Lesson, content: RecordDict) -> Update:
    """Return what the app's answer adds to the model, with its number of examples and the metrics that are summed."""
    arrays, metrics = list(content.array_records.values()), list(content.metric_records.values())
    if len(arrays) != 1 or len(metrics) != 1:
        raise ReplyError(
            "records", f"one ArrayRecord and one MetricRecord are needed, got {len(arrays)}, {len(metrics)}"
        )
    if sorted(arrays[0]) != sorted(lesson.arrays):
        raise ReplyError("keys", "the trained arrays must have the names of the received ones")
    before = _vector(lesson.arrays, lesson.arrays, lesson.vector)
    delta = torch.from_numpy(_vector(arrays[0], lesson.arrays, lesson.vector) - before)
    if not all_finite(delta):
        raise ReplyError("diverged", "local training diverged to NaN or infinity; lower the learning rate")
    examples = _number(metrics[0], lesson.weight_key)
    if not examples > 0:
        raise ReplyError("weight", f"{lesson.weight_key!r} must be > 0")
    sums = {name: _number(metrics[0], name) * examples for name in lesson.metrics}
    return Update.of(delta, 1.0, **{**sums, "examples": examples})


def _vector(arrays: ArrayRecord, like: ArrayRecord, names: tuple[str, ...]) -> NDArray[np.float32]:
    parts = []
    for name in names:
        array = arrays[name].numpy()
        if array.shape != tuple(like[name].shape) or array.dtype.kind != "f":
            shape = tuple(like[name].shape)
            raise ReplyError(
                "shape", f"array {name!r} must hold floats of shape {shape}, got {array.dtype} {array.shape}"
            )
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
            parts.append(array.astype(np.float32).reshape(-1))
    return np.concatenate(parts)


def _number(metrics: Mapping[str, object], name: str) -> float:
    value = metrics.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise ReplyError("metrics", f"its train function must report {name!r} as one finite number")
    return float(value)


def _encoded(update: Update, assignment: Assignment, member: int) -> Update:
    """Return what the strategy's client half makes of an update."""
    work = assignment.work
    if not isinstance(work, SecureWork) or work.train is None:
        raise SecureAggregationError("the exchange brings no training")
    half = work.train.pipeline
    if half.memory(ModelSpec.of_size(update.values.shape[-1])):
        raise RefusalError("memory", "the strategy needs clients that remember something between rounds")
    draws = Draws.of(work.train.seed, "client", assignment.round, member, "encode")
    return half.encode(update, work.train.told, {}, draws)[0].outgoing()


def _refusal(message: Message, why: str) -> Message:
    return Message(Error(_REFUSED, why), reply_to=message)


_REFUSED = 0  # Flower's code for what it has no code for

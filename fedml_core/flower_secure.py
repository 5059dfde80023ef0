"""What a Flower ServerApp and its ClientApps say to each other in a secure sum; the protocol itself is in frames.

Every exchange is a message of type `train`, because Flower 1.41 routes `train.NAME` to functions that an app registered
under that name only, and an ordinary app has one train function. A client without our mod finds no model in it.

Guarantees: the fingerprint of a lesson differs wherever any array, its name, type, shape or place, or any value of the
    config differs; masks are bound to it.
Trust: nothing here hides anything; what a client sends has been masked before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fedml_core import engine_guard  # noqa: F401 - its import sets Flower's switches, before Flower reads them
from fedml_core.errors import ReplyError
from fedml_core.flower_records import pack, unpack
from fedml_core.message_frames import assignment_from_frame
from fedml_core.messages import Assignment
from fedml_core.untrusted import as_text, as_whole, printable
from fedml_core.wire import Frame

# isort: split
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

__all__ = ["WITHOUT_MOD", "Asked", "Lesson", "Packed", "answered", "introduced", "introduction", "is_secure", "refused"]

_HEAD, _MODEL, _CONFIG, _PLAN = "fedveil", "model", "config", "plan"
_INTRODUCE = "introduce"
_VERSION = 1
WITHOUT_MOD = "its app needs ClientApp(mods=[clients.flower.secure_mod()])"


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a ClientApp's train function is given, and what its answer is taken for.

    `arrays`, `config`: the records of an ordinary train message. `vector`: the names of the arrays that travel, in the
    order of the vector; the others stay the server's. `weight_key`: the metric that counts examples. `metrics`: the
    names of the metrics that are summed; no other leaves the node.
    """

    arrays: ArrayRecord = field(repr=False)
    config: ConfigRecord = field(repr=False)
    vector: tuple[str, ...]
    weight_key: str
    metrics: tuple[str, ...]

    @cached_property
    def fingerprint(self) -> str:
        """Return the SHA-256, in hex, of everything in it."""
        digest = hashlib.sha256(b"fedveil/flower-lesson/1")
        plan = [list(self.arrays), list(self.vector), self.weight_key, list(self.metrics)]
        values = {name: _tagged(value) for name, value in self.config.items()}
        _feed(digest, json.dumps([plan, values], sort_keys=True).encode())
        for array in self.arrays.values():
            _feed(digest, json.dumps([array.dtype, list(array.shape), array.stype]).encode())
            _feed(digest, array.data)
        return digest.hexdigest()

    @cached_property
    def records(self) -> Mapping[str, ArrayRecord | ConfigRecord]:
        """Return it as records, the same objects at every call, so that many messages share them."""
        plan = ConfigRecord({"weight-key": self.weight_key})
        plan["arrays"], plan["vector"], plan["metrics"] = list(self.arrays), list(self.vector), list(self.metrics)
        return {_MODEL: self.arrays, _CONFIG: self.config, _PLAN: plan}

    @classmethod
    def read(cls, content: RecordDict) -> Lesson:
        """Return the lesson in a message.

        Raises: ValueError, TypeError or KeyError: if there is none.
        """
        arrays, config, plan = content[_MODEL], content[_CONFIG], content[_PLAN]
        if not isinstance(arrays, ArrayRecord) or not isinstance(config, ConfigRecord):
            raise TypeError("a lesson must hold arrays and a config")
        order, vector = _texts(plan, "arrays"), _texts(plan, "vector")
        if sorted(order) != sorted(arrays) or len(set(vector)) != len(vector) or not set(vector) <= set(order):
            raise ValueError("a lesson's plan must name its arrays")
        # Flower does not promise the order of what it carries.
        ordered = ArrayRecord({name: arrays[name] for name in order})
        return cls(ordered, config, tuple(vector), as_text(plan["weight-key"]), tuple(_texts(plan, "metrics")))


@dataclass(frozen=True)
class Asked:
    """One exchange as a client received it: under which number it takes part, and in which mode the server works."""

    member: int
    active: bool
    assignment: Assignment | None
    lesson: Lesson | None = None

    @classmethod
    def read(cls, content: RecordDict) -> Asked:
        """Return what a message asks.

        Raises: ValueError: if it is no exchange of this version. ConfigError or StrategyError: as
            `assignment_from_frame`.
        """
        try:
            head = content[_HEAD]
            member, active = as_whole(head["member"]), head["active"]
            if head["version"] != _VERSION or not isinstance(active, bool) or not 0 <= member < 1 << 31:
                raise ValueError("it is of another version")
            if head["stage"] == _INTRODUCE:
                return cls(member, active, None)
            frame = unpack(RecordDict({"frame": content["frame"], "arrays": content["arrays"]}))
            lesson = Lesson.read(content) if _MODEL in content else None
            return cls(member, active, assignment_from_frame(frame), lesson)
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is no exchange that this version understands: {error!r:.200}") from error


@dataclass(frozen=True, eq=False)
class Packed:
    """An exchange's frame as records, made once for all to whom the same is sent."""

    content: Mapping[str, Any]

    @classmethod
    def of(cls, frame: Frame, lesson: Lesson | None) -> Packed:
        """Return the frame, and the lesson beside it in the exchange that trains."""
        return cls({**pack(frame), **(lesson.records if lesson else {})})

    def to(self, member: int, active: bool) -> RecordDict:
        """Return the content of the message to one member."""
        return RecordDict({**self.content, _HEAD: _head("exchange", member, active)})


def introduction(member: int, active: bool) -> RecordDict:
    """Return the content of the message that asks a node under which number it takes part."""
    return RecordDict({_HEAD: _head(_INTRODUCE, member, active)})


def introduced(member: int) -> RecordDict:
    """Return the answer to an introduction: the number under which a node takes part."""
    return RecordDict({_HEAD: ConfigRecord({"member": member})})


def refused(rule: str, reason: str) -> RecordDict:
    """Return the answer of a node that could not even begin an exchange."""
    return RecordDict({_HEAD: ConfigRecord({"rule": rule, "reason": reason})})


def answered(content: RecordDict) -> int | Frame:
    """Return what a client answered: a number to an introduction, a frame to an exchange.

    Raises: ReplyError: if the client says why it takes no part, or if it does not seem to have our mod.
    """
    head = content.get(_HEAD)
    try:
        if isinstance(head, ConfigRecord):
            if "member" in head:
                return as_whole(head["member"])
            rule, reason = as_text(head["rule"]), as_text(head["reason"])
            raise ReplyError(printable(rule, 80), printable(reason, 500))
        return unpack(content)
    except (KeyError, TypeError, ValueError) as error:
        raise ReplyError("no-mod", f"the answer is not one of a secure sum; {WITHOUT_MOD}") from error


def is_secure(content: RecordDict) -> bool:
    """Return whether a message is about a secure sum at all."""
    return isinstance(content.get(_HEAD), ConfigRecord)


def _head(stage: str, member: int, active: bool) -> ConfigRecord:
    return ConfigRecord({"stage": stage, "member": member, "active": active, "version": _VERSION})


def _texts(record: Any, name: str) -> Sequence[str]:
    values = record[name]
    if not isinstance(values, list):
        raise TypeError("must be a list")
    return [as_text(value) for value in values]


def _tagged(value: Any) -> Any:
    if isinstance(value, list):
        return [_tagged(item) for item in value]
    return [type(value).__name__, value.hex() if isinstance(value, bytes | float) else value]


def _feed(digest: Any, part: bytes) -> None:
    digest.update(len(part).to_bytes(8, "big"))
    digest.update(part)

"""What reads frames from strangers, and true frames to begin with: assignments, replies and greetings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedml_core.compression import TopK
from fedml_core.errors import ChannelError, ConfigError, ReplyError, StrategyError
from fedml_core.handshake import Goodbye, Hello, Introduction, Refused, greeting_from_frame, greeting_to_frame
from fedml_core.message_frames import assignment_from_frame, assignment_to_frame, reply_from_frame, reply_to_frame
from fedml_core.messages import (
    Assignment,
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
from fedml_core.model import ModelSpec
from fedml_core.training import Training
from fedml_core.update import Update
from fedml_core.wire import Frame
from strategies import Compressed, FedAvg, FedProx

__all__ = ["FRAMES", "Frames"]


@dataclass(frozen=True)
class Frames:
    """True frames, what reads them, and by which errors it may refuse others."""

    true: Callable[[], Sequence[Frame]]
    read: Callable[[Frame], object]
    refusals: tuple[type[Exception], ...]


def _assignments() -> list[Frame]:
    halves = [one.client_half() for one in (FedAvg(), FedProx(mu=0.1), Compressed(FedAvg(), TopK(0.5)))]
    train = [TrainWork(Training(), half, told={"mu": torch.ones(2)}, promised={"name": "x"}) for half in halves]
    secure = SecureWork("mask", {"context": b"c" * 32, "delivery": b"d"}, train[0])
    works: list[Work] = [*train, EvaluateWork(), secure]
    return [assignment_to_frame(Assignment("run", 3, "f" * 16, torch.zeros(3), work)) for work in works]


def _replies() -> list[Frame]:
    bodies = (
        Update.of(torch.ones(3), 2.0, examples=2.0),
        Evaluation({"examples": 2.0, "loss": 0.5}),
        SecureAnswer({"masked": b"m"}, np.ones(3, np.uint32)),
        Refusal("floor", "noise 0.3 is below 0.8"),
        Failure("task", "it failed"),
    )
    return [reply_to_frame(Reply("run", 3, 1, "f" * 16, body)) for body in bodies]


def _greetings() -> list[Frame]:
    spec = ModelSpec.of(torch.nn.Linear(2, 3))
    greetings = (Hello("run", 1, spec), Introduction(1, "site", spec), Refused("no"), Goodbye("done"))
    return [greeting_to_frame(one) for one in greetings]


FRAMES: Mapping[str, Frames] = {
    "assignment": Frames(_assignments, assignment_from_frame, (ValueError, ConfigError, StrategyError)),
    "reply": Frames(_replies, reply_from_frame, (ReplyError,)),
    "greeting": Frames(_greetings, greeting_from_frame, (ChannelError, ConfigError)),
}

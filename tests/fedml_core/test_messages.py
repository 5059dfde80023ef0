"""What is sent through the seam arrives; what nobody could have sent is refused, and nothing of it is executed."""

from __future__ import annotations

import copy
import inspect
import json
import math
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedml_core.compression import StochasticQuantize, TopK
from fedml_core.control_variates import ControlVariates
from fedml_core.errors import ConfigError, ReplyError, StrategyError
from fedml_core.message_frames import assignment_from_frame, assignment_to_frame, reply_from_frame, reply_to_frame
from fedml_core.messages import Assignment, Body, EvaluateWork, Evaluation, Failure, Refusal, Reply, TrainWork, Work
from fedml_core.privacy.adaptive_clip import AdaptiveClip
from fedml_core.proximal import Proximal
from fedml_core.training import Training
from fedml_core.transform import Chain, Transform, chain
from fedml_core.update import Update
from fedml_core.weighting import ByMetric, Uniform, Weigh
from fedml_core.wire import Frame
from strategies import CentralDP, Compressed, DistributedDP, FedAvg, FedProx, LocalDP, Scaffold, Strategy
from tests.sources import ROOT

VECTOR = torch.tensor([1.0, -0.0, 3e38])
EVERYTHING = chain(
    Proximal(0.1),
    ControlVariates(9),
    TopK(0.5),
    StochasticQuantize(8),
    Weigh(ByMetric("accuracy", 2.0)),
    Weigh(Uniform()),
)
WORKS: list[Work] = [
    EvaluateWork(),
    EvaluateWork(batch_size=7),
    TrainWork(Training()),
    TrainWork(Training(steps=3, optimizer="adam", optimizer_arguments={"betas": [0.9, 0.99]}), Proximal(1), seed=-5),
    TrainWork(Training(epochs=2), EVERYTHING, {"1": {"c": torch.ones(3)}, "3": {"parameter_count": 3}}, seed=2**70),
    TrainWork(Training(), Chain((Chain(), Weigh()))),
    TrainWork(Training(), promised={"name": "composed", "events": [{"name": "gaussian", "noise_multiplier": 0.1}]}),
]
BODIES: list[Body] = [
    Update.of(VECTOR, 2.5, examples=3.0, loss=-0.0),
    Update.of(torch.zeros(0), 1.0),
    Update.of(torch.ones(2, 2, dtype=torch.int64), math.nan, cls=1.0, values=2.0, weight=math.inf),
    Evaluation({"examples": 3.0, "loss": 1e-300}),
    Evaluation({}),
    Refusal("epochs", "5 epochs, its policy allows 3"),
    Failure("diverged", "é 中"),
]


def assignment(work: Work) -> Assignment:
    return Assignment("run-1", 7, "f" * 32, VECTOR, work)


def reply(body: Body) -> Reply:
    return Reply("run-1", 7, 12, "f" * 32, body)


def same(one: Any, other: Any) -> bool:
    """Say whether both are of one type and equal to the last bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        bits: list[bytes] = [tensor.numpy().tobytes() for tensor in (one, other)]
        return one.dtype == other.dtype and one.shape == other.shape and bits[0] == bits[1]
    if is_dataclass(one) and not isinstance(one, Transform):
        return all(same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, float):
        return struct.pack("d", one) == struct.pack("d", other)
    return bool(one == other)


@pytest.mark.parametrize("work", WORKS, ids=repr)
def test_an_assignment_arrives_as_it_was_sent(work: Work) -> None:
    sent = assignment(work)
    arrived = assignment_from_frame(assignment_to_frame(sent))
    assert same(arrived, sent)
    assert arrived.parameters.data_ptr() != sent.parameters.data_ptr()


@pytest.mark.parametrize("body", BODIES, ids=repr)
def test_a_reply_arrives_as_it_was_sent(body: Body) -> None:
    assert same(reply_from_frame(reply_to_frame(reply(body))), reply(body))


@given(st.text(), st.integers(), st.integers(), st.text(), st.dictionaries(st.text(), st.floats(allow_nan=False)))
def test_any_reply_arrives(run: str, number: int, client: int, fingerprint: str, sums: dict[str, float]) -> None:
    sent = Reply(run, number, client, fingerprint, Evaluation(sums))
    assert reply_from_frame(reply_to_frame(sent)) == sent
    sent = replace(sent, body=Update.of(VECTOR, 1.0, **sums))
    assert same(reply_from_frame(reply_to_frame(sent)), sent)


def test_what_local_training_did_stays_at_the_client() -> None:
    update = Update.of(VECTOR, 1.0, examples=3.0).replace(facts={"steps": torch.tensor(5.0)})
    frame = reply_to_frame(reply(update))
    assert "steps" not in frame.header
    assert list(frame.arrays) == ["/values"]
    assert same(reply_from_frame(frame).body, update.outgoing())


def test_only_what_was_set_of_the_training_travels() -> None:
    # A site's own defaults must not be overridden by defaults of the server's version.
    header = json.loads(assignment_to_frame(assignment(TrainWork(Training(steps=3)))).header)
    assert header["training"] == {"steps": 3}


@pytest.mark.parametrize("message", [*map(assignment, WORKS), *map(reply, BODIES)], ids=lambda m: type(m).__name__)
def test_no_message_prints_weights_or_updates(message: Assignment | Reply) -> None:
    assert "tensor" not in repr(message)
    assert "e+38" not in repr(message)


def test_the_text_of_a_refusal_is_short_and_harmless_to_a_terminal() -> None:
    body = reply_from_frame(
        reply_to_frame(reply(Refusal("a\x1b[2J" + "r" * 99, "line\nnext\ud800\u202e" + "x" * 999)))
    ).body
    assert isinstance(body, Refusal)
    assert body.rule == "a?[2J" + "r" * 75
    assert body.reason == "line?next??" + "x" * 489
    assert isinstance(reply_from_frame(reply_to_frame(reply(Failure("\x07", "\r")))).body, Failure)


def frame_of(work: Work, **changes: Any) -> Frame:
    """Return the frame of an assignment whose header was changed; `...` takes a key away."""
    return changed(assignment_to_frame(assignment(work)), changes)


def changed(frame: Frame, changes: dict[str, Any]) -> Frame:
    header = {**json.loads(frame.header), **changes}
    return with_header(frame, {key: value for key, value in header.items() if value is not ...})


def with_header(frame: Frame, header: Any) -> Frame:
    """Return the frame with another header, and of its arrays those that the header still names."""
    text = json.dumps(header)
    named = set(places_of_arrays(header))
    return replace(frame, header=text, arrays={name: array for name, array in frame.arrays.items() if name in named})


def places_of_arrays(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        if isinstance(tree.get("$array"), str):
            yield tree["$array"]
        tree = list(tree.values())
    if isinstance(tree, list):
        for item in tree:
            yield from places_of_arrays(item)


TRAIN = TrainWork(Training())
BAD_ASSIGNMENTS = {
    "unknown kind": replace(frame_of(TRAIN), kind="deploy"),
    "no parameters": frame_of(TRAIN, parameters=...),
    "parameters that are text": frame_of(TRAIN, parameters="zeros"),
    "parameters that are a list": frame_of(TRAIN, parameters=[1.0, 2.0]),
    "parameters of float64": assignment_to_frame(replace(assignment(TRAIN), parameters=VECTOR.double())),
    "parameters that are a matrix": assignment_to_frame(replace(assignment(TRAIN), parameters=torch.ones(2, 2))),
    "a run that is a number": frame_of(TRAIN, run=3),
    "a round that is text": frame_of(TRAIN, round="3"),
    "a round that is true": frame_of(TRAIN, round=True),
    "a round that is infinite": frame_of(TRAIN, round=math.inf),
    "no fingerprint": frame_of(TRAIN, fingerprint=...),
    "training that is a list": frame_of(TRAIN, training=[1]),
    "training of no epochs": frame_of(TRAIN, training={"epochs": 0}),
    "training that nobody knows": frame_of(TRAIN, training={"epoch": 1}),
    "no training": frame_of(TRAIN, training=...),
    "no pipeline": frame_of(TRAIN, pipeline=...),
    "told that is a list": frame_of(TRAIN, told=[]),
    "a seed that is half": frame_of(TRAIN, seed=0.5),
    "batches of text": frame_of(EvaluateWork(), batch_size="256"),
    "no batches": frame_of(EvaluateWork(), batch_size=...),
    "a header that is a list": with_header(frame_of(TRAIN), []),
    "a header that is no JSON": Frame("train", "{"),
    "an array that the header does not name": replace(
        frame_of(TRAIN), arrays={**frame_of(TRAIN).arrays, "/x": np.ones(1)}
    ),
}


@pytest.mark.parametrize("frame", BAD_ASSIGNMENTS.values(), ids=BAD_ASSIGNMENTS)
def test_a_frame_that_is_no_assignment_is_a_value_error(frame: Frame) -> None:
    with pytest.raises(ValueError, match="."):
        assignment_from_frame(frame)


BAD_PIPELINES = [
    ("Nonsuch", ": unknown transform 'Nonsuch'; known: "),
    ({"name": "Proximall", "mu": 1}, ": unknown transform 'Proximall'; did you mean 'Proximal'?"),
    ({"name": "Chain", "parts": [{"name": "Nonsuch"}]}, ": Chain.parts[0]: unknown transform 'Nonsuch'; known: "),
    ({"name": "Chain", "parts": {"name": "Weigh"}}, ": Chain.parts must be a list of transforms, got {'name': "),
    ({"name": "Chain", "parts": [3]}, ": Chain.parts[0] must name a transform, got 3"),
    ({"name": "Chain", "parts": [["Weigh"]]}, ": Chain.parts[0] must name a transform, got ['Weigh']"),
    ({"name": "Weigh", "by": "Median"}, ": Weigh.by: unknown weighting 'Median'; "),
    ({"name": "Weigh", "by": None}, ": Weigh.by must name a weighting, got None"),
    ({"name": "FedAvg"}, ": unknown transform 'FedAvg'; "),
    ({"name": "Transform"}, ": unknown transform 'Transform'; "),
    ({"name": "os.system", "command": "true"}, ": unknown transform 'os.system'; "),
    ({"name": "__class__"}, ": unknown transform '__class__'; "),
    ({"name": "Proximal", "mu": -1}, ": mu must be >= 0, got -1"),
    ({"name": "Proximal", "mu": {"name": "Uniform"}}, ": mu must be a number, got {'name': 'Uniform'}"),
    ({"name": "Proximal"}, ": Proximal needs mu; add it"),
    ({"name": "Proximal", "mu": 1, "__init__": 2}, ": Proximal has no argument '__init__'; known: mu"),
    ({"mu": 1}, ": the transform needs a name, got None; known: "),
    (None, ': the transform must be a name, or a table with one such as {name = "..."}, got None'),
    (7, ': the transform must be a name, or a table with one such as {name = "..."}, got 7'),
]


@pytest.mark.parametrize(("pipeline", "said"), BAD_PIPELINES, ids=[said[:40] for _, said in BAD_PIPELINES])
def test_a_pipeline_that_cannot_be_built_is_a_config_error_that_names_what_is_wrong(pipeline: Any, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        assignment_from_frame(frame_of(TRAIN, pipeline=pipeline))
    assert str(error.value).startswith(f"the assignment's pipeline{said}")


UPDATE, EVALUATION = reply(Update.of(VECTOR, 1.0, loss=2.0)), reply(Evaluation({"examples": 3.0}))
REFUSAL = reply(Refusal("rule", "reason"))


def reply_with(sent: Reply, **changes: Any) -> Frame:
    return changed(reply_to_frame(sent), changes)


BAD_REPLIES = {
    "unknown kind": replace(reply_with(UPDATE), kind="train"),
    "values that are a list": reply_with(UPDATE, values=[1.0, 2.0, 3.0]),
    "no values": reply_with(UPDATE, values=...),
    "a weight that is text": reply_with(UPDATE, weight="1.0"),
    "a weight that is true": reply_with(UPDATE, weight=True),
    "a weight that no float can hold": reply_with(UPDATE, weight=10**400),
    "a weight that is an array": reply_with(UPDATE, values=1, weight={"$array": "/values"}),
    "no weight": reply_with(UPDATE, weight=...),
    "sums that are a list": reply_with(UPDATE, sums=[["loss", 1.0]]),
    "sums that are nothing": reply_with(UPDATE, sums=None),
    "a sum that is text": reply_with(UPDATE, sums={"loss": "2"}),
    "a sum that is a list": reply_with(EVALUATION, sums={"examples": [3.0]}),
    "a sum that no float can hold": reply_with(EVALUATION, sums={"examples": -(10**400)}),
    "no sums": reply_with(EVALUATION, sums=...),
    "a rule that is a number": reply_with(REFUSAL, rule=3),
    "a reason that is a table": reply_with(REFUSAL, reason={}),
    "no reason": reply_with(REFUSAL, reason=...),
    "a run that is a number": reply_with(REFUSAL, run=1),
    "a round that is half": reply_with(REFUSAL, round=6.5),
    "a client that is text": reply_with(REFUSAL, client="12"),
    "a client that is infinite": reply_with(REFUSAL, client=math.inf),
    "a fingerprint that is nothing": reply_with(REFUSAL, fingerprint=None),
    "a header that is a number": with_header(reply_with(UPDATE), 3),
    "a header that is no JSON": Frame("update", ""),
    "a header that nests too deep": Frame("evaluation", '{"sums":' + "[" * 9999 + "]" * 9999 + "}"),
}


@pytest.mark.parametrize("frame", BAD_REPLIES.values(), ids=BAD_REPLIES)
def test_a_frame_that_is_no_reply_is_malformed(frame: Frame) -> None:
    with pytest.raises(ReplyError, match="^the reply is not one that this version understands: [A-Za-z]+$") as error:
        reply_from_frame(frame)
    assert error.value.rule == "malformed"


FRAMES = [*map(assignment_to_frame, map(assignment, WORKS)), *map(reply_to_frame, map(reply, BODIES))]
NAMES = ["Chain", "Weigh", "Proximal", "TopK", "Uniform", "ByMetric", "Nonsuch"]
ANYTHING = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=4),
        st.just(10**400),
        st.sampled_from([*NAMES, {"$array": "/values"}, {"$array": "/parameters"}]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["name", "parts", "by", "mu", "$array", "x"]), inner, max_size=3),
    ),
    max_leaves=6,
)
KINDS = st.sampled_from(["train", "evaluate", "update", "evaluation", "refusal", "failure", "", "hello"])
ARRAYS: st.SearchStrategy[Any] = st.sampled_from(
    [np.ones(3), np.ones(3, np.float32), np.ones((2, 2), np.float32), np.array(1.0), np.array(["x"]), np.array([None])]
)


def places(tree: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of everything in a tree of dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, item in items:
        yield (*above, key)
        yield from places(item, (*above, key))


@st.composite
def damaged(draw: st.DrawFn) -> Frame:
    """Return a frame that was sent, after up to three changes to its header, its kind or its arrays."""
    frame = draw(st.sampled_from(FRAMES))
    header = json.loads(frame.header)
    for _ in range(draw(st.integers(0, 3))):
        *above, last = draw(st.sampled_from(list(places(header)) or [("x",)]))
        parent = header
        for key in above:
            parent = parent[key]
        if draw(st.booleans()):
            parent[last] = copy.deepcopy(draw(ANYTHING))
        else:
            del parent[last]
        if not header:
            break
    if draw(st.booleans()):
        frame = replace(frame, kind=draw(KINDS))
    if draw(st.booleans()):
        frame = replace(frame, arrays={name: draw(ARRAYS) for name in frame.arrays})
    return with_header(frame, header) if draw(st.booleans()) else replace(frame, header=json.dumps(header))


@settings(max_examples=500)
@given(damaged())
def test_a_damaged_frame_is_a_whole_reply_or_malformed(frame: Frame) -> None:
    try:
        read = reply_from_frame(frame)
    except ReplyError as error:
        assert error.rule == "malformed"
        return
    assert type(read.round) is type(read.client) is int
    assert type(read.run) is type(read.fingerprint) is str
    assert isinstance(read.body, Update | Evaluation | Refusal | Failure)
    assert same(reply_from_frame(reply_to_frame(read)), read)


@settings(max_examples=500)
@given(damaged())
def test_a_damaged_frame_is_a_whole_assignment_or_refused(frame: Frame) -> None:
    try:
        read = assignment_from_frame(frame)
    except (ValueError, ConfigError, StrategyError):
        return
    assert type(read.round) is int
    assert type(read.run) is type(read.fingerprint) is str
    assert read.parameters.dtype == torch.float32
    assert read.parameters.dim() == 1
    if isinstance(read.work, TrainWork):
        assert isinstance(read.work.pipeline, Transform)
        assert isinstance(read.work.told, dict)
        assert type(read.work.seed) is int


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_that_a_frame_holds_is_executed(tmp_path: Path) -> None:
    bomb = np.array([Bomb(tmp_path / "went off")], dtype=object)
    with pytest.raises(ValueError, match="only numbers of at most 64 bits are read"):
        assignment_from_frame(replace(frame_of(TRAIN), arrays={"/parameters": bomb}))
    with pytest.raises(ReplyError, match="the reply is not one that this version understands: ValueError"):
        reply_from_frame(replace(reply_with(UPDATE), arrays={"/values": bomb}))
    loaded = set(sys.modules)
    for name in (
        "antigravity",
        "antigravity.geohash",
        "antigravity:geohash",
        "this",
        "__import__",
        "eval",
        "../task.py",
    ):
        with pytest.raises(ConfigError, match="unknown transform"):
            assignment_from_frame(frame_of(TRAIN, pipeline={"name": name}))
        with pytest.raises(ValueError, match="Training"):
            assignment_from_frame(frame_of(TRAIN, training={name: {"name": name}}))
    assert not {"antigravity", "this"} & (set(sys.modules) - loaded)
    assert list(tmp_path.iterdir()) == []


STRATEGIES: list[Strategy] = [
    FedAvg(),
    FedProx(mu=0.01),
    Scaffold(population=5),
    Compressed(FedAvg(), TopK(0.1)),
    Compressed(FedAvg(), StochasticQuantize(4)),
    CentralDP(FedAvg(weighting=Uniform()), 0.5, 1.0, 10.0, 1e-5),
    CentralDP(FedAvg(weighting=Uniform()), AdaptiveClip(), 1.0, 100.0, 1e-5),
    LocalDP(FedAvg(weighting=Uniform()), 0.5, 4.0, 1e-5),
    DistributedDP(FedAvg(weighting=Uniform()), 0.5, 1.0, 1e-5, size=3, cohort_size=10, honest=8, bits=32),
]
CLIENT = """
import json, sys
import numpy
import fedml_core.message_frames as frames

for header in json.load(sys.stdin):
    frame = frames.Frame("train", header, {"/parameters": numpy.zeros(3, numpy.float32)})
    print(frames.assignment_from_frame(frame).work.pipeline)
print(sorted(name for name in ("strategies", "server", "clients") if name in sys.modules))
"""


def test_a_process_that_imports_only_their_wire_form_can_read_every_built_in_client_half() -> None:
    """whoever imports this knows every client half of privacy that comes with fedveil."""
    # Trust: as each of them says.
    works = [TrainWork(Training(), strategy.client_half()) for strategy in STRATEGIES]
    headers = [assignment_to_frame(assignment(work)).header for work in works]
    outcome = subprocess.run(
        [sys.executable, "-c", CLIENT],
        input=json.dumps(headers),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert outcome.stderr == ""
    assert outcome.stdout.splitlines() == [*(repr(work.pipeline) for work in works), "[]"]


def _has_client_half(kind: type[Transform]) -> bool:
    halves = ("encode", "guide", "memory", "told", "encoded_size")
    return any(getattr(kind, name) is not getattr(Transform, name) for name in halves)


def test_the_strategies_of_that_test_use_every_client_half_that_comes_with_fedveil() -> None:
    ours = {
        name
        for name, kind in Transform.members.items()
        if kind.__module__.startswith("fedml_core.") and not inspect.isabstract(kind) and _has_client_half(kind)
    }
    sent = json.dumps([strategy.client_half().to_config() for strategy in STRATEGIES])
    assert ours == {name for name in ours if f'"name": "{name}"' in sent}

"""A data holder: what it answers, what it refuses to send, what it remembers."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch

from clients.client import Client
from clients.memory import FileMemory, InProcessMemory, MemoryStore, Remembered
from fedml_core.data import ClientData, Examples
from fedml_core.errors import CheckpointError, RefusalError, TaskError
from fedml_core.messages import Assignment, EvaluateWork, Evaluation, Failure, Refusal, TrainWork
from fedml_core.training import Training
from fedml_core.transform import Draws, State, Transform, chain
from fedml_core.update import Update
from fedml_core.weighting import Weigh
from tests.doubles import PullTrainer, data_of, raising

SIZE = 3


@dataclasses.dataclass(frozen=True)
class _Counter(Transform):
    """Adds to each update how often the client was there before, and remembers one more."""

    def memory(self, spec: object) -> State:
        return {"times": 0}

    def encode(self, update: Update, told: State, memory: State, draws: Draws) -> tuple[Update, State]:
        return update.replace(values=update.values + memory["times"]), {"times": memory["times"] + 1}


def client_of(number: int = 2, memory: MemoryStore | None = None) -> Client:
    return Client(number, partial(data_of, number, SIZE), PullTrainer(SIZE), memory or InProcessMemory())


def assignment_of(round_number: int = 1, pipeline: Transform | None = None, start: float = 0.0) -> Assignment:
    work = TrainWork(Training(), pipeline or chain(Weigh()))
    fingerprint = PullTrainer(SIZE).spec.fingerprint
    return Assignment("run", round_number, fingerprint, torch.full((SIZE,), start), work)


def test_a_client_answers_with_its_encoded_update_and_leaves_its_facts_behind() -> None:
    reply = client_of().answer(assignment_of())
    assert isinstance(reply.body, Update)
    # Client 2 holds 3 examples at 2 and pulls half of the way: 3 x 1.
    assert torch.equal(reply.body.values, torch.full((SIZE,), 3.0)) and float(reply.body.weight) == 3
    assert reply.body.facts == {} and (reply.client, reply.round, reply.run) == (2, 1, "run")


def test_an_evaluation_holds_sums_over_the_held_out_examples() -> None:
    assignment = dataclasses.replace(assignment_of(start=2.0), work=EvaluateWork())
    reply = client_of().answer(assignment)
    assert reply.body == Evaluation({"examples": 3.0, "loss": 0.0})


def test_a_client_without_held_out_examples_says_so() -> None:
    bare = Client(0, lambda: ClientData(data_of(0, SIZE).train), PullTrainer(SIZE), InProcessMemory())
    body = bare.answer(dataclasses.replace(assignment_of(), work=EvaluateWork())).body
    assert isinstance(body, Failure) and body.rule == "no-test-data"


def test_an_update_that_diverged_is_not_sent_and_nothing_is_remembered() -> None:
    memory = InProcessMemory()
    body = client_of(memory=memory).answer(assignment_of(pipeline=_Counter(), start=float("nan"))).body
    assert isinstance(body, Failure) and body.rule == "diverged"
    assert memory.get(2) is None


def test_another_model_is_refused_with_both_fingerprints() -> None:
    body = client_of().answer(dataclasses.replace(assignment_of(), fingerprint="f" * 32)).body
    assert isinstance(body, Failure) and body.rule == "fingerprint"
    assert "f" * 32 in body.reason and PullTrainer(SIZE).spec.fingerprint in body.reason


def test_what_failed_is_told_in_the_words_of_explain_only() -> None:
    broken = Client(4, raising(TaskError("patient 1234 is missing")), PullTrainer(SIZE), InProcessMemory())
    body = broken.answer(assignment_of(), explain=lambda error: type(error).__name__).body
    assert body == Failure("task", "TaskError")


def test_a_fatal_error_names_the_client() -> None:
    broken = Client(4, raising(TaskError("no file")), PullTrainer(SIZE), InProcessMemory())
    with pytest.raises(TaskError, match="client 4: no file"):
        broken.answer(assignment_of(), fatal=(TaskError,))


def test_a_refusal_by_policy_is_a_refusal() -> None:
    strict = Client(4, raising(RefusalError("rounds", "3 allowed")), PullTrainer(SIZE), InProcessMemory())
    assert strict.answer(assignment_of()).body == Refusal("rounds", "3 allowed")


def test_no_examples_is_an_error_that_names_the_client() -> None:
    empty = ClientData(Examples.of(torch.zeros(0, 1), torch.zeros(0, SIZE)))
    with pytest.raises(TaskError, match="client 7 has no examples"):
        Client(7, lambda: empty, PullTrainer(SIZE), InProcessMemory()).handle(assignment_of())


@pytest.mark.parametrize("kind", ["process", "file"])
def test_a_memory_advances_with_rounds_and_a_repeated_round_finds_it_as_before(tmp_path: Path, kind: str) -> None:
    store: MemoryStore = InProcessMemory() if kind == "process" else FileMemory(tmp_path / "memory")

    def shift(round_number: int) -> float:
        body = client_of(memory=store).answer(assignment_of(round_number, _Counter(), start=2.0)).body
        assert isinstance(body, Update)
        return float(body.values[0])

    assert [shift(1), shift(2), shift(5)] == [0.0, 1.0, 2.0]
    assert [shift(5), shift(5)] == [2.0, 2.0]
    assert shift(6) == 3.0


def test_memories_survive_a_checkpoint() -> None:
    memory, again = InProcessMemory(), InProcessMemory()
    memory.put(3, Remembered(2, {"x": torch.zeros(2)}, {"x": torch.ones(2)}))
    again.restore(memory.to_tree())
    kept = again.get(3)
    assert kept is not None and kept.round == 2 and torch.equal(kept.after["x"], torch.ones(2))


def test_a_damaged_memory_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    store = FileMemory(tmp_path / "memory")
    store.put(3, Remembered(2, {"x": torch.zeros(2)}, {"x": torch.ones(2)}))
    path = tmp_path / "memory"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match="damaged"):
        store.get(3)

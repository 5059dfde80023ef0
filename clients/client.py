"""A data holder: takes an assignment, trains or evaluates on its own data, and answers. The same in every runner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from clients.memory import MemoryStore, Remembered
from fedml_core.data import ClientData, Data
from fedml_core.errors import FedveilError, RefusalError, ReplyError, TaskError
from fedml_core.messages import Assignment, Body, EvaluateWork, Evaluation, Failure, Refusal, Reply, TrainWork
from fedml_core.model import ModelSpec
from fedml_core.randomness import Key
from fedml_core.spans import span
from fedml_core.training import Training
from fedml_core.transform import Draws, Guide
from fedml_core.update import Update, all_finite


class Trainer(Protocol):
    """What a client needs of a trainer; `clients.TorchTrainer` is one."""

    spec: ModelSpec

    def train(
        self,
        parameters: Tensor,
        data: Data,
        training: Training,
        *,
        round_number: int,
        key: tuple[Key, ...],
        guide: Guide = ...,
    ) -> Update:
        """Return local minus global parameters, with sums and facts."""
        ...

    def evaluate(self, parameters: Tensor, data: Data, batch_size: int = ...) -> dict[str, float]:
        """Return summed metrics, `examples` among them."""
        ...


class Client:
    """One data holder.

    Args: number: the client's number in the federation. load: returns its data, when first needed.
        trainer: may be shared by clients that run one after the other. memory: where it keeps what it must remember.
    """

    def __init__(self, number: int, load: Callable[[], ClientData], trainer: Trainer, memory: MemoryStore) -> None:
        self.number = number
        self._load = load
        self._trainer = trainer
        self._memory = memory

    def handle(self, assignment: Assignment) -> Reply:
        """Return the reply to an assignment.

        Guarantees: an update that is not finite is not sent.
        Raises: FedveilError: if the work cannot be done; nothing was sent and nothing remembered.
        """
        if assignment.fingerprint != self._trainer.spec.fingerprint:
            raise ReplyError(
                "fingerprint",
                f"the server's model is {assignment.fingerprint}, this client's {self._trainer.spec.fingerprint}; "
                "install the same task on both sides",
            )
        work = assignment.work
        body: Body = self._train(assignment, work) if isinstance(work, TrainWork) else self._evaluate(assignment, work)
        return self._reply(assignment, body)

    def answer(
        self,
        assignment: Assignment,
        explain: Callable[[FedveilError], str] = str,
        fatal: tuple[type[FedveilError], ...] = (),
    ) -> Reply:
        """Return the reply to an assignment, or one that says what failed in the words of `explain`.

        Raises: an error of the `fatal` kinds, naming the client, instead of reporting it.
        """
        try:
            return self.handle(assignment)
        except fatal as error:
            raise type(error)(f"client {self.number}: {error}") from error
        except RefusalError as error:
            return self._reply(assignment, Refusal(error.rule, explain(error)))
        except ReplyError as error:
            return self._reply(assignment, Failure(error.rule, explain(error)))
        except FedveilError as error:
            rule = type(error).__name__.removesuffix("Error").lower()
            return self._reply(assignment, Failure(rule, explain(error)))

    def _train(self, assignment: Assignment, work: TrainWork) -> Update:
        with span("data"):
            data = self._load().train
        if len(data) == 0:
            raise TaskError(f"client {self.number} has no examples; give it data or leave it out")
        kept = self._memory.get(self.number)
        memory = kept.entering(assignment.round) if kept else work.pipeline.memory(self._trainer.spec)
        key = (work.seed, "client", assignment.round, self.number)
        with span("compute"):
            update = self._trainer.train(
                assignment.parameters,
                data,
                work.training,
                round_number=assignment.round,
                key=key,
                guide=work.pipeline.guide(work.told, memory),
            )
        if not all_finite(update.values):
            raise ReplyError("diverged", "local training diverged to NaN or infinity; lower the learning rate")
        with span("transforms"):
            encoded, after = work.pipeline.encode(update, work.told, memory, Draws.of(*key, "encode"))
        if after:
            self._memory.put(self.number, Remembered(assignment.round, memory, after))
        return encoded.outgoing()

    def _evaluate(self, assignment: Assignment, work: EvaluateWork) -> Evaluation:
        with span("data"):
            data = self._load().test
        if data is None or len(data) == 0:
            raise ReplyError("no-test-data", f"client {self.number} keeps no examples aside to evaluate on")
        with span("evaluate"):
            return Evaluation(self._trainer.evaluate(assignment.parameters, data, work.batch_size))

    def _reply(self, assignment: Assignment, body: Body) -> Reply:
        return Reply(assignment.run, assignment.round, self.number, self._trainer.spec.fingerprint, body)

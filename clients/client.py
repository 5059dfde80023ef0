"""A data holder: takes an assignment, trains or evaluates on its own data, and answers. The same in every runner."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from clients.memory import MemoryStore, Remembered
from fedml_core.data import ClientData, Data
from fedml_core.errors import FedveilError, RefusalError, ReplyError, SecureAggregationError, TaskError
from fedml_core.messages import (
    Assignment,
    Body,
    EvaluateWork,
    Evaluation,
    Failure,
    Refusal,
    Reply,
    SecureWork,
    TrainWork,
    Work,
)
from fedml_core.model import ModelSpec
from fedml_core.randomness import Key
from fedml_core.spans import span
from fedml_core.training import Training
from fedml_core.transform import Draws, Guide
from fedml_core.update import Update, all_finite

if TYPE_CHECKING:
    from clients.asked import Sum
    from clients.gate import Gate
    from clients.secagg import SecureMember
    from clients.standing import Standing


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
        standing: who it is in secure sums; without, it takes part in none. only_secure: it trains for nothing else.
        gate: what its site lets through; without, everything, as in a simulation.
    """

    def __init__(
        self,
        number: int,
        load: Callable[[], ClientData],
        trainer: Trainer,
        memory: MemoryStore,
        *,
        standing: Standing | None = None,
        only_secure: bool = False,
        gate: Gate | None = None,
    ) -> None:
        self.number = number
        self._load = load
        self._trainer = trainer
        self._memory = memory
        self._only_secure = only_secure
        self._gate = gate
        self._secure = None if standing is None else _member(standing, self._update)

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
        return self._reply(assignment, self._body(assignment, work))

    def _body(self, assignment: Assignment, work: Work) -> Body:
        if isinstance(work, EvaluateWork):
            return self._evaluate(assignment, work)
        if isinstance(work, TrainWork):
            if self._only_secure:
                raise RefusalError("secure-aggregation", "this site trains under secure aggregation only")
            return self._train(assignment, work)
        if self._secure is None:
            raise RefusalError(
                "secure-aggregation",
                "this site has no pinned roster, so it takes part in no secure sum; name one in its site.toml",
            )
        return self._secure.answer(assignment, work)

    def _update(self, assignment: Assignment) -> Update:
        """Return the encoded update of a secure sum's training."""
        work = assignment.work
        if not isinstance(work, SecureWork) or work.train is None:
            raise SecureAggregationError("the exchange brings no training")
        secure = None if self._secure is None else self._secure.sum(work.parts["context"])
        return self._train(assignment, work.train, secure)

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

    def _train(self, assignment: Assignment, work: TrainWork, secure: Sum | None = None) -> Update:
        if self._gate is not None:
            self._gate.admit(assignment, work, secure)
        with span("data"):
            data = self._load().train
        if len(data) == 0:
            raise TaskError(f"client {self.number} has no examples; give it data or leave it out")
        if self._gate is not None:
            self._gate.begin(data)
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
        update = encoded.outgoing()
        return update if self._gate is None else self._gate.released(update)

    def _evaluate(self, assignment: Assignment, work: EvaluateWork) -> Evaluation:
        if self._gate is not None:
            self._gate.admit_evaluation(assignment)
        with span("data"):
            data = self._load().test
        if data is None or len(data) == 0:
            raise ReplyError("no-test-data", f"client {self.number} keeps no examples aside to evaluate on")
        with span("evaluate"):
            sums = self._trainer.evaluate(assignment.parameters, data, work.batch_size)
        return Evaluation(sums if self._gate is None else self._gate.evaluated(sums))

    def _reply(self, assignment: Assignment, body: Body) -> Reply:
        return Reply(assignment.run, assignment.round, self.number, self._trainer.spec.fingerprint, body)


def _member(standing: Standing, train: Callable[[Assignment], Update]) -> SecureMember:
    from clients.secagg import SecureMember  # loads cryptography, which training in the clear does without

    return SecureMember(standing, train)

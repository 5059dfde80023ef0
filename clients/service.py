"""What a site answers: to a greeting who it is, to work what its own task does with its own data.

Of an error, only its class and this project's own words leave the site; what the user's code said stays in the site's
own log.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clients.client import Client, Trainer
from clients.gate import Gate
from clients.memory import FileMemory
from clients.redaction import only_ours, redacted
from clients.site_account import account_text, finite_claim
from clients.site_tally import SiteTally
from clients.standing import Standing
from clients.torch_trainer import TorchTrainer
from fedml_core.config import SiteConfig
from fedml_core.data import ClientData
from fedml_core.devices import choose_device
from fedml_core.errors import ConfigError, FedveilError, RunError, TaskError
from fedml_core.forward import guarded
from fedml_core.handshake import (
    Goodbye,
    Hello,
    Introduction,
    NotGreetedError,
    Refused,
    greeting_from_frame,
    greeting_to_frame,
)
from fedml_core.message_frames import assignment_from_frame, reply_to_frame
from fedml_core.messages import Assignment, Failure, Refusal, Reply, SecureAnswer
from fedml_core.task import Task
from fedml_core.update import Update
from fedml_core.wire import Frame, from_frame

if TYPE_CHECKING:
    from fedml_core.privacy.accounting import Claim

__all__ = ["SiteService"]

_WORK = ("train", "evaluate", "secure")
_PARTS_OF_AN_UPDATE = frozenset({"masked", "contribution"})  # an assistant sends a vector, too, and trains nothing


@dataclass(frozen=True)
class _Run:
    """The run that this site was greeted for."""

    hello: Hello
    trainer: Trainer
    client: Client


class SiteService:
    """Answers a server's frames with one site's task, data and memory; sets `stop` when there is nothing more to do.

    Guarantees: nothing that a server sends is executed; what is asked for is built from classes installed here. Data
    are loaded once, when they are first needed, and kept. Memories lie in the site's own folder, by run.

    Args: say: told in one line what is done. on_error: told every error, with its traceback. standing: who this site
        is in secure sums. server: HOST:PORT, for the policy and the ledger.
    Raises: ConfigError, TaskError: if the site could never answer.
    """

    def __init__(
        self,
        config: SiteConfig,
        task: Task,
        say: Callable[[str], object],
        on_error: Callable[[Exception], object] | None = None,
        *,
        standing: Standing | None = None,
        server: str = "",
    ) -> None:
        if task.site_data is None:
            raise TaskError(
                f"the task {config.task} has no site_data, from which a site's examples come; give it a function that "
                "takes the [data] table and returns ClientData"
            )
        choose_device(config.device)
        self.stop = threading.Event()
        self._config, self._task, self._say, self._on_error = config, task, say, on_error
        self._standing = standing
        self._gate = Gate(config, server=server, example=config.examples is not None)
        self._read = guarded(task.site_data, "the task's site_data", f"for {config.path}")
        self._data: ClientData | None = None
        self._run: _Run | None = None
        self._tally = SiteTally()
        self._goodbye = ""
        self._end: FedveilError | None = None
        self._kept_out = ""

    @property
    def facts(self) -> Mapping[str, Any]:
        """Return what this site has done so far."""
        run = None if self._run is None else self._run.hello.run
        return {"client": self._config.id, "name": self._config.name, "run": run, **self._tally.counts}

    @property
    def summary(self) -> Mapping[str, Any]:
        """Return what this site did under the names that every run's summary has, as far as one site knows.

        `metrics`: the last of its own training and evaluation. `protection`: of its last update. `epsilon`, `privacy`:
        what its own ledger says that the run has cost its data. `seconds`: of work. Bytes are message bodies.
        """
        claim = self._claim()
        return {
            **self._tally.summary,
            "clients": 1,
            "protection": self._gate.protection,
            "epsilon": None if claim is None else claim.epsilon,
            "privacy": None if claim is None else claim.to_json(),
            "engine": "fleet",
            "out": None,
        }

    @property
    def account(self) -> str:
        """Return in one line what protected this site in the run, and what that has cost."""
        return account_text(self._gate.protection, self._claim())

    def _claim(self) -> Claim | None:
        def tell(error: FedveilError) -> None:
            self._tell(error, f"what was spent cannot be said: {error}")

        return finite_claim(self._gate, None if self._run is None else self._run.hello.run, tell)

    def outcome(self) -> Mapping[str, Any]:
        """Return what this site did in a run that is over.

        Raises: the error that ended it. RunError: if the server never let this site in.
        """
        if self._end is not None:
            raise self._end
        if self._kept_out:
            raise RunError(f"the run is over and never took this site in: {self._kept_out}")
        return {**self.facts, "goodbye": self._goodbye}

    def handle(self, frame: Frame) -> Frame:
        """Return the answer to one frame of the server's.

        Raises: NotGreetedError: for work of a run that this site was not greeted for. ChannelError: for a frame that
            this version does not understand. What a bug of ours raises is raised; the link sends its class only.
        """
        try:
            answer = self._work(frame) if frame.kind in _WORK else self._converse(frame)
            self._tally.carried(frame.size_bytes, answer.size_bytes)
            return answer
        except NotGreetedError:
            raise
        except Exception as error:
            self._tally.failed()
            self._tell(error, f"a frame could not be answered: {type(error).__name__}: {error}")
            raise

    def _converse(self, frame: Frame) -> Frame:
        try:
            greeting = greeting_from_frame(frame)
            if isinstance(greeting, Hello):
                return self._introduce(greeting)
        except FedveilError as error:
            self._give_up(error)
            return greeting_to_frame(Refused(redacted(error)))
        if isinstance(greeting, Refused):
            self._kept_out = greeting.reason
            if greeting.final:
                self._give_up(ConfigError(f"the server refuses this client: {greeting.reason}"))
            else:
                self._say(f"the server does not take this client in yet: {greeting.reason}")
        elif isinstance(greeting, Goodbye):
            self._goodbye = greeting.reason
            self.stop.set()
        return greeting_to_frame(Goodbye("as you wish"))

    def _introduce(self, hello: Hello) -> Frame:
        """Make ready for the run and say who we are, also where the models differ: the server says so then, too."""
        run = self._run
        if run is None or (run.hello.run, run.hello.seed) != (hello.run, hello.seed):
            run = self._ready_for(hello)
        mine = greeting_to_frame(Introduction(self._config.id, self._config.name or "", run.trainer.spec))
        try:
            hello.spec.require_equal(run.trainer.spec)
        except FedveilError as error:
            self._give_up(error)
            return mine
        self._run, self._kept_out = run, ""
        self._say(f"greeted as client {self._config.id} for run {hello.run[:8]}")
        return mine

    def _ready_for(self, hello: Hello) -> _Run:
        number = self._config.id
        trainer = self._trainer(hello.seed)
        memory = FileMemory(self._config.beside(self._config.memory) / hello.run / f"client-{number}.fedveil")
        only_secure = self._config.secure_aggregation.required
        client = Client(
            number,
            self._load,
            trainer,
            memory,
            standing=self._standing,
            only_secure=only_secure,
            gate=self._gate,
        )
        return _Run(hello, trainer, client)

    def _trainer(self, seed: int) -> Trainer:
        """Return what trains here: privately, example by example, if the site.toml says so."""
        config = self._config
        if config.examples is None:
            return TorchTrainer(self._task, seed, device=config.device)
        from clients.private_trainer import PrivateTorchTrainer  # loads Opacus, which other sites do without
        from clients.private_training import PrivateTraining

        private = PrivateTraining.of(config.examples)
        return PrivateTorchTrainer(self._task, private, self._gate.reserve, seed=seed, device=config.device)

    def _work(self, frame: Frame) -> Frame:
        run, started = self._run, time.perf_counter()
        if run is None:
            raise NotGreetedError("the server gave work before it greeted this client")
        try:
            assignment = assignment_from_frame(frame)
        except (FedveilError, ValueError) as error:
            return self._unreadable(run, frame, error)
        if assignment.run != run.hello.run:
            raise NotGreetedError("the server gave work of a run for which it did not greet this client")
        told: list[FedveilError] = []

        def explain(error: FedveilError) -> str:
            told.append(error)
            return redacted(error)

        reply = run.client.answer(assignment, explain)
        self._account(assignment, reply, told, time.perf_counter() - started)
        return reply_to_frame(reply)

    def _unreadable(self, run: _Run, frame: Frame, error: Exception) -> Frame:
        """Return the reply to an assignment that names what is not installed here, or is none at all."""
        tree = from_frame(frame)
        number = int(tree["round"])
        self._tally.failed()
        self._tell(error, f"round {number}: the assignment cannot be used: {error}")
        reason = str(error) if isinstance(error, FedveilError) and only_ours(error) else type(error).__name__
        body = Failure("assignment", f"this site cannot use the assignment: {reason}")
        return reply_to_frame(Reply(run.hello.run, number, self._config.id, run.trainer.spec.fingerprint, body))

    def _account(self, assignment: Assignment, reply: Reply, told: list[FedveilError], seconds: float) -> None:
        """Say in one line what was done, and count it."""
        body, where = reply.body, f"round {assignment.round}"
        if isinstance(body, Failure | Refusal):
            self._tally.failed()
            if told:
                cause = told[-1].__cause__
                why = f" ({cause})" if isinstance(cause, FedveilError) else ""
                self._tell(told[-1], f"{where}: {body.rule}: {told[-1]}{why}")
            return
        if isinstance(body, SecureAnswer):
            trained = body.vector is not None and not _PARTS_OF_AN_UPDATE.isdisjoint(body.parts)
            self._tally.worked(seconds, trained=trained)
            if trained:
                self._say(f"{where}: trained and sent a masked update in {seconds:.1f} s")
            return
        done = "trained" if isinstance(body, Update) else "evaluated"
        sums = {name: float(value) for name, value in body.sums.items()}
        self._say(f"{where}: {self._tally.measured(done, sums, seconds)}")

    def _load(self) -> ClientData:
        if self._data is None:
            data = self._read(self._config.data)
            if not isinstance(data, ClientData):
                raise TaskError(f"the task's site_data must return ClientData, got {type(data).__name__}")
            self._data = data
        return self._data

    def _give_up(self, error: FedveilError) -> None:
        self._end = error
        self.stop.set()

    def _tell(self, error: Exception, line: str) -> None:
        self._say(line)
        if self._on_error is not None:
            self._on_error(error)

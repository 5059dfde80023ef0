"""The coordinator: many rounds as a generator, so that the caller owns the loop and the state is one value."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fedml_core.errors import ConfigError, FedveilError, PrivacyError, RunError
from fedml_core.message_frames import assignment_to_frame
from fedml_core.messages import Assignment, Channel, EvaluateWork, TrainWork, Work
from fedml_core.model import ModelSpec
from fedml_core.spans import span
from fedml_core.transform import Draws, State
from server.checkpoint import RunState
from server.claims import privacy_fields
from server.gathering import Gathered, Gathering, InTheClear, Order
from server.plan import Plan
from server.round import LISTED, RoundReport, virtual_time
from server.uncovered import flagged
from server.validation import EvaluationIntake, averages, shortfall

if TYPE_CHECKING:
    from fedml_core.privacy.accounting import Claim

Evaluate = Callable[[Tensor], Mapping[str, float]]
Derive = Callable[[Mapping[str, float]], Mapping[str, float]]
Reserve = Callable[[Sequence[Mapping[str, Any]], int], object]


class Coordinator:
    """Runs rounds of one plan over any channel.

    Args: plan: what each round does. spec: the model's. state: from `begin` or a checkpoint.
        evaluate: returns summed metrics of parameters on the server's test data, or None where it has none.
        derive: metrics made of averages, such as a root mean square error. gathering: how updates come together.
        reserve: is given the privacy events of a round, and its number, before anybody is asked, and again before a
        second sum of it is taken; it may refuse by raising. keep: is given the state once a round is counted in it, so
        that a server that dies in the round has counted it; where the server's noise protects, once it is over but for
        its evaluation by clients.

    Example:
        for report in coordinator.rounds(channel, 20):
            print(report.round, report.metric("server.accuracy"))
    """

    def __init__(
        self,
        plan: Plan,
        spec: ModelSpec,
        state: RunState,
        *,
        evaluate: Evaluate | None = None,
        derive: Derive | None = None,
        gathering: Gathering | None = None,
        reserve: Reserve | None = None,
        keep: Callable[[RunState], object] | None = None,
    ) -> None:
        self.plan = plan
        self.spec = spec
        self.state = state
        self._evaluate = evaluate
        self._derive = derive
        self._gathering = gathering or InTheClear(plan.strategy, spec)
        self._reserve, self._keep = reserve, keep
        self._terms = plan.strategy.privacy()
        self._claim: Claim | None = None

    @staticmethod
    def begin(plan: Plan, spec: ModelSpec, parameters: Tensor, run: str) -> RunState:
        """Return the state before the first round."""
        secret = None if plan.strategy.privacy() is None else os.urandom(32).hex()
        return RunState(run, spec.fingerprint, parameters, plan.strategy.init(spec), secret=secret)

    def rounds(
        self, channel: Channel, count: int, *, extra: Callable[[], State] | None = None
    ) -> Iterator[RoundReport]:
        """Yield a report after each round until `count` rounds are done in all, or early stopping says so.

        `self.state` is complete at each yield, and may be saved then. `extra`: what of the runner belongs into a state
        that is kept within a round.
        Raises: RunError: after the last round, if every round of the run was void: there is no result. PrivacyError:
            before a round that nothing can account for, or that correlated noise does not cover.
        """
        if count < 1:
            raise ConfigError(f"rounds must be >= 1, got {count}")
        if self._terms is not None and self._terms.rounds is not None and count > self._terms.rounds:
            raise PrivacyError(
                f"the noise is for a run of {self._terms.rounds} rounds, and {count} were asked for; ask for fewer, "
                "or begin a new run with noise for more"
            )
        while self.state.round < count and not self.stopped_early:
            yield self._round(channel, final=self.state.round + 1 == count, extra=extra)
        if self.state.accepted == 0:
            why = (self.state.report or {}).get("why", "")
            raise RunError(
                f"all {self.state.round} rounds were void, so the model is untrained; the last because {why}"
            )

    @property
    def stopped_early(self) -> bool:
        """Return whether early stopping has ended the run."""
        rule = self.plan.early_stopping
        return rule is not None and self.state.stale >= rule.patience

    def _round(self, channel: Channel, final: bool, extra: Callable[[], State] | None) -> RoundReport:
        number = self.state.round + 1
        clients = channel.clients(number)  # which may wait for some to come: no part of the round's time
        started = time.perf_counter()
        self._charge(len(clients))
        cohort = self._cohort(clients, number)
        gathered = self._gathering.gather(channel, self._order(clients, cohort, number))
        with span("server step"):
            parameters, strategy, why = self._step(gathered, len(clients), number)
        metrics = {"train": self._metrics(gathered.total.sums)} if gathered.accepted else {}
        made = partial(
            RoundReport,
            round=number,
            status="void" if why else "ok",
            why=why,
            cohort=len(cohort),
            replies=len(gathered.accepted),
            participants=gathered.accepted,
            missing=gathered.missing,
            excluded=tuple(sorted(gathered.excluded, key=lambda row: (row.client, row.rule))),
            secure=gathered.facts or None,
        )
        found = _Evaluated(metrics, gathered.bytes_up, gathered.bytes_down)
        if self.plan.evaluation.due(number) or final:
            if self._keep is not None and self._noised and self.plan.evaluation.clients is not None:
                # Clients are about to see the model: after a crash it must not be made, and seen, once more.
                kept = self._advance(self._told(made, found, channel, started), parameters, strategy)
                self._keep(kept if extra is None else dataclasses.replace(kept, extra=extra()))
            with span("evaluate"):
                found = found.and_also(self._evaluations(channel, clients, parameters, number))
        report = self._told(made, found, channel, started)
        self.state = self._advance(report, parameters, strategy)
        return report

    @property
    def _noised(self) -> bool:
        """Return whether the server's noise hides who takes part."""
        return self._terms is not None and self._terms.server_noise

    def _told(
        self, made: Callable[..., RoundReport], found: _Evaluated, channel: Channel, started: float
    ) -> RoundReport:
        """Return a round's report, with what the run has cost and how long the round took so far."""
        virtual_seconds, virtual_clock = virtual_time(channel)
        return made(
            metrics=found.metrics,
            bytes_up=found.bytes_up,
            bytes_down=found.bytes_down,
            seconds=round(time.perf_counter() - started, 6),
            **flagged(privacy_fields(self.plan.strategy, self._claim, channel), found.metrics),
            virtual_seconds=virtual_seconds,
            virtual_clock=virtual_clock,
            notes=found.notes,
        )

    def _charge(self, population: int) -> None:
        """Count a release before anybody is asked for it, and keep what the run costs once it is over."""
        if self._terms is None:
            return
        from server.books import charged, claim_of

        plan = self.plan
        if self._terms.secret_cohort and self.state.secret is None:
            raise PrivacyError(
                "the run's state has no secret to sample by, so cohorts could be foretold; begin a new run"
            )
        spent, new = charged(self.state.events, plan.strategy, plan.sampling, population)
        claim = claim_of(spent, self._terms, plan.sampling)
        if self._reserve is not None:
            self._reserve(new, self.state.round + 1)
        self.state, self._claim = dataclasses.replace(self.state, events=spent), claim
        if self._keep is not None and new and not self._noised:
            self._keep(self.state)  # what the server sees before it dies is seen, and the round is begun again

    def _charge_again(self, population: int) -> None:
        """Count another sum of this round, since one may have been opened that came to nothing.

        Raises: PrivacyError: where the cohort is a secret; a sample's second release is no second sample's. What
            `reserve` raises.
        """
        if self._terms is not None and self._terms.secret_cohort:
            raise PrivacyError("a second sum of one secret cohort would cost more than a round of its own")
        self._charge(population)

    def _cohort(self, clients: Sequence[int], number: int) -> list[int]:
        """Return who is asked; nobody outside can draw it again where privacy rests on that."""
        secret = self.state.secret
        sampling = self.plan.sampling
        if secret is None:
            return sampling.cohort(clients, number, self.plan.seed)
        return sampling.hidden_cohort(clients, number, bytes.fromhex(secret))

    def _order(self, clients: Sequence[int], cohort: Sequence[int], number: int) -> Order:
        plan, state = self.plan, self.state
        told = plan.strategy.told(state.strategy)
        promised = plan.strategy.pipeline().event() if self._noised else None
        work = TrainWork(plan.training, plan.strategy.client_half(), told, plan.seed, promised=promised)
        assignment = self._assignment(number, state.parameters, work)
        following = self._cohort(clients, number + 1) if self._gathering.looks_ahead else ()
        again = partial(self._charge_again, len(clients))
        return Order(assignment, cohort, state.strategy, following, plan.round_timeout_s, again)

    def _step(self, gathered: Gathered, clients: int, number: int) -> tuple[Tensor, State, str]:
        unchanged, replies = (self.state.parameters, self.state.strategy), len(gathered.accepted)
        hidden = self._noised  # an empty round is noised as any other
        if clients == 0 and not hidden:
            return *unchanged, "no client could be asked"
        if gathered.why:
            return *unchanged, gathered.why
        if replies < self.plan.minimum_replies and not hidden:
            return *unchanged, shortfall(replies, self.plan.minimum_replies, gathered.excluded)
        draws = Draws.of(self.plan.seed, "decode", number)
        try:
            step = self.plan.strategy.step(self.state.parameters, gathered.total, self.state.strategy, draws)
        except FedveilError as error:
            if self._terms is not None and self._terms.rounds is not None:
                raise  # correlated noise counts rounds: after one without a release it would be out of step
            return *unchanged, str(error)
        return *step, ""

    def _evaluations(self, channel: Channel, clients: Sequence[int], parameters: Tensor, number: int) -> _Evaluated:
        plan, metrics = self.plan.evaluation, {}
        if plan.server and self._evaluate is not None:
            metrics["server"] = self._metrics(self._evaluate(parameters))
        if plan.clients is None:
            return _Evaluated(metrics)
        cohort = plan.clients.cohort(clients, -number, self.plan.seed)
        assignment = self._assignment(number, parameters, EvaluateWork(plan.batch_size))
        intake = EvaluationIntake(assignment, cohort)
        down = _exchange(channel, assignment, intake, cohort, self.plan.round_timeout_s)
        if intake.accepted:
            metrics["clients"] = self._metrics(intake.sums)
        notes = [
            f"client {row.client}'s evaluation does not count ({row.rule}): {row.reason}" for row in intake.excluded
        ]
        return _Evaluated(metrics, intake.bytes_up, down, tuple(notes[:LISTED]))

    def _metrics(self, sums: Mapping[str, float]) -> Mapping[str, float]:
        means = averages(sums)
        return {**means, **self._derive(means)} if self._derive and means else means

    def _assignment(self, number: int, parameters: Tensor, work: Work) -> Assignment:
        return Assignment(self.state.run, number, self.spec.fingerprint, parameters, work)

    def _advance(self, report: RoundReport, parameters: Tensor, strategy: State) -> RunState:
        best, stale, rule = self.state.best, self.state.stale, self.plan.early_stopping
        value = report.metric(rule.metric) if rule else None
        if rule and value is not None:
            best, stale = (value, 0) if rule.better(value, best) else (best, stale + 1)
        return dataclasses.replace(
            self.state,
            round=report.round,
            accepted=self.state.accepted + (report.status == "ok"),
            parameters=parameters,
            strategy=strategy,
            best=best,
            stale=stale,
            report=report.to_json(),
        )


@dataclass(frozen=True)
class _Evaluated:
    """What a round, or evaluating after it, gave to report, and what it cost."""

    metrics: Mapping[str, Mapping[str, float]]
    bytes_up: int = 0
    bytes_down: int = 0
    notes: tuple[str, ...] = ()

    def and_also(self, other: _Evaluated) -> _Evaluated:
        """Return both, and what they cost together."""
        metrics, notes = {**self.metrics, **other.metrics}, self.notes + other.notes
        return _Evaluated(metrics, self.bytes_up + other.bytes_up, self.bytes_down + other.bytes_down, notes)


def _exchange(
    channel: Channel,
    assignment: Assignment,
    intake: EvaluationIntake,
    cohort: Sequence[int],
    timeout_s: float | None,
) -> int:
    """Run one exchange into `intake` and return the bytes sent down."""
    if not cohort:
        return 0
    intake.take(channel.exchange(assignment, cohort, timeout_s))
    return assignment_to_frame(assignment).size_bytes * len(cohort)

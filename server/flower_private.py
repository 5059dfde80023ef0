"""Client-level differential privacy in an ordinary Flower `ServerApp`, with books: `CentralDP` on Flower's own clients.

Clients are Flower's own and know nothing of it. The server clips what each of them sends, adds the noise, and counts
every round before it asks anybody.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fedml_core import engine_guard  # noqa: F401 - its import sets Flower's switches, before Flower reads them
from fedml_core.errors import ConfigError, RunError, StrategyError
from fedml_core.privacy.accounting import Claim
from fedml_core.privacy.ledger import Account, Budget, Ledger
from fedml_core.privacy.terms import Terms
from server.books import Events, charged, claim_of
from server.flower_runs import FlowerRuns
from server.ledger import RoundBooks
from server.sampling import EveryClient, Sampling
from server.uncovered import uncovered_text
from strategies.strategy import Strategy

# isort: split
from flwr.app import ArrayRecord, Message, MessageType, MetricRecord

__all__ = ["PrivateFlowerStrategy"]

_log = logging.getLogger(__name__)
_EVERYBODY = EveryClient()


class PrivateFlowerStrategy(FlowerRuns):
    """A Flower strategy whose models are differentially private towards whole clients, and that says how much.

    `PrivateFlowerStrategy(CentralDP(FedAvg(weighting=Uniform()), ...), sampling=PoissonSampling(0.1)).start(...)`

    Guarantees: a round is counted, and in the ledger where one is named, before its cohort is drawn; nothing that goes
        wrong later takes it back. A round without replies is noised and released like any other.
    Guarantees: a round that the budget does not allow is not begun; `start` raises RunError with the numbers.
    Guarantees: the training metrics of every round hold `epsilon` and `delta`, after all rounds that this object began.
    Differs from FlowerStrategy: cohorts are drawn by `sampling` from a secret, not from `seed`; `fraction_train` is
    refused. Metrics that clients report are exact, and a line in the log says that epsilon does not cover them.
    Trust: the server sees every update, and is trusted to add the noise. A client is a node: whoever runs two is two.
    Args: strategy: `CentralDP(...)`, with fresh noise in each round. sampling: a sampling of `server`. ledger: the file
        that holds what was spent, over all runs. budget: the most that may be spent; needs a ledger. dataset: whose
        privacy it is, by a stable name. settings: as FlowerStrategy's.
    Raises: StrategyError: if the strategy is not private by the server's noise alone. ConfigError: for settings that do
        not fit it.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        sampling: Sampling = _EVERYBODY,
        ledger: Path | None = None,
        budget: Budget | None = None,
        dataset: str = "clients",
        **settings: Any,
    ) -> None:
        if "fraction_train" in settings:
            raise ConfigError(
                "fraction_train draws cohorts that everybody can draw again; leave it out, or give "
                "sampling=PoissonSampling(rate), which is secret and costs less"
            )
        if budget is not None and ledger is None:
            raise ConfigError("a budget needs a ledger to remember what is spent; give ledger=Path(...)")
        super().__init__(strategy, **settings)
        terms = strategy.privacy()
        assert terms is not None
        self._terms: Terms = terms
        if not isinstance(sampling, Sampling):
            raise ConfigError(f"sampling must be one of server's samplings, got {sampling!r:.80}")
        self._sampling, self._secret, self._cohorts = sampling, secrets.token_bytes(32), 0
        self._ledger, self._budget = None if ledger is None else Ledger(ledger), budget
        self._account = Account(dataset, terms.unit, terms.adjacent(sampling.adjacency))
        self._run = _run_name()
        self.spent: Events = ()
        """What was done so far, in an accountant's words: read it to save it, set it to go on. It outlives `start`."""
        self._begun = False
        self.claim: Claim | None = None
        """What that costs one client that took part whenever it could, once the round that began last is over."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the noised model, and the mean training metrics with what the rounds so far have cost."""
        if self.claim is None:
            raise RunError("aggregate_train was called before any round was counted; call configure_train first")
        if not self._begun:
            raise RunError(
                "aggregate_train was called again for a round that was counted once; call configure_train first"
            )
        self._begun = False
        arrays, metrics = super().aggregate_train(server_round, replies)
        self._flag(server_round, "train", metrics)
        # Ours come last: no client can say what was spent.
        cost = {"epsilon": self.claim.epsilon, "delta": self.claim.delta}
        return arrays, MetricRecord({**(metrics or {}), **cost})

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the mean metrics of the good replies, which are exact."""
        metrics = super().aggregate_evaluate(server_round, replies)
        self._flag(server_round, "clients", metrics)
        return metrics

    def summary(self) -> None:
        """Log the strategy, who is protected from whom, and what was spent."""
        spent = "nothing was spent yet" if self.claim is None else f"spent so far: {self.claim}"
        _log.info("%r; protection: %s; %s", self.strategy, self.strategy.protection(), spent)

    @staticmethod
    def _require_sendable(strategy: Strategy) -> None:
        if not isinstance(strategy, Strategy):
            raise StrategyError(f"PrivateFlowerStrategy takes CentralDP(...), got {type(strategy).__name__}")
        name, terms = type(strategy).__name__, strategy.privacy()
        if terms is None:
            raise StrategyError(f"{name} claims no privacy, so there is nothing to count; use FlowerStrategy({name}())")
        if not terms.server_noise or strategy.takes_secure_sums:
            raise StrategyError(
                f"{name}'s clients add the noise, and Flower's ClientApps know nothing of it; run it with fedveil's "
                "own clients"
            )
        if terms.rounds is not None or terms.separation > 1:
            raise StrategyError(
                f"{name}'s noise is for clients that stay away for {terms.separation} rounds, and one of Flower's is "
                "another node each time that it connects; leave noise= out"
            )

    def _begin(self, rounds: int, timeout_s: float) -> None:
        self._run = _run_name()

    def _drawn(self, kind: str, server_round: int, nodes: Sequence[int]) -> list[int]:
        """Return the cohort of a round; one that trains is counted first."""
        if kind != MessageType.TRAIN:
            return super()._drawn(kind, server_round, nodes)
        self._count(server_round, len(nodes))
        # Not the round's number: it begins anew with each `start`, and a sample must not.
        self._cohorts += 1
        return self._sampling.hidden_cohort(nodes, self._cohorts, self._secret)

    def _count(self, server_round: int, population: int) -> None:
        spent, new = charged(self.spent, self.strategy, self._sampling, population)
        claim = claim_of(spent, self._terms, self._sampling)
        if self._ledger is not None:
            protection = self.strategy.protection()
            books = RoundBooks(self._ledger, self._account, self._run, protection=protection, budget=self._budget)
            books(new, server_round)
        self.spent, self.claim, self._begun = spent, claim, True
        _log.info("round %d: %s, once it is over", server_round, claim)

    def _flag(self, server_round: int, place: str, metrics: MetricRecord | None) -> None:
        said = uncovered_text({"uncovered": [f"{place}.{name}" for name in sorted(metrics or ())]})
        if said:
            _log.info("round %d: %s", server_round, said)


def _run_name() -> str:
    return f"flower-{secrets.token_hex(8)}"

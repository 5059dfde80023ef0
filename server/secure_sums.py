"""What every way to take a run's secure sums shares: its settings, its attempts, and what one attempt agrees on.

Trust: the server sees what the protocol's messages show: `server/secagg.py`, `server/secagg_assisted.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fedml_core.messages import Channel
from fedml_core.model import ModelSpec
from fedml_core.ring import Encoding
from fedml_core.secagg.parameters import Parameters
from server.gathering import Gathered, Order
from server.secure_exchange import Attempt, Exchanges, Ledger, Witnesses, milliseconds, take_attempts
from strategies.secure import AssistedOneShot, SecAggPlus, SecureAggregation

__all__ = ["Agreed", "SecureSums"]

Kind = TypeVar("Kind", SecAggPlus, AssistedOneShot)


@dataclass(frozen=True)
class Agreed:
    """What one attempt is about: its public parameters, what its vectors mean, and whose signatures count in it."""

    parameters: Parameters
    encoding: Encoding
    witnesses: Witnesses


class SecureSums(ABC, Generic[Kind]):
    """Takes a run's updates together as secure sums; kept for the whole run.

    Args: metrics: the names of what every client reports beside its update. witnesses: asked before every attempt.
        serial: returns the number of the next attempt, larger than every one before in this run, in whatever process.
        record: is given what each attempt recorded, for whoever checks it later. threads: to expand masks with, where
        the server does.
    """

    looks_ahead: bool
    counted: str
    """What the facts of a sum call those who are in it."""
    kind: type[Kind]
    protocol: Kind

    def __init__(
        self,
        strategy: SecureAggregation,
        spec: ModelSpec,
        metrics: Sequence[str],
        witnesses: Callable[[], Witnesses],
        *,
        serial: Callable[[], int] | None = None,
        record: Callable[[Mapping[str, Any]], object] | None = None,
        threads: int = 1,
    ) -> None:
        assert isinstance(strategy.protocol, self.kind)
        self.strategy, self.protocol, self.threads = strategy, strategy.protocol, threads
        self._spec, self._metrics, self._witnesses = spec, tuple(metrics), witnesses
        self._serial, self._record = serial or milliseconds(), record

    def gather(self, channel: Channel, order: Order) -> Gathered:
        """Return the sum of the cohort's updates, or why there is none."""

        def begin(ledger: Ledger, cohort: Sequence[int]) -> Attempt:
            return self.attempt(Exchanges(channel, order, ledger), order, cohort)

        return take_attempts(
            order,
            begin,
            most=self.protocol.attempts,
            size=self._spec.size,
            empty={self.counted: 0},
            record=self._record,
        )

    @abstractmethod
    def attempt(self, exchanges: Exchanges, order: Order, cohort: Sequence[int]) -> Attempt:
        """Return an attempt at the sum of a cohort."""

    @abstractmethod
    def own(self, encoding: Encoding) -> Mapping[str, Any]:
        """Return the parameters that each protocol sets in its own way: encoding, dropout_share, security_bits."""

    def agreed(self, order: Order, round_number: int, cohort: Sequence[int]) -> Agreed:
        """Return what the next attempt is about, under a number that none had before."""
        encoding = self.strategy.encoding(len(cohort), float(order.state["clip"]), self._metrics)
        size = self.strategy.pipeline().encoded_size(self._spec.size)
        witnesses = self._witnesses()
        parameters = Parameters(
            run=order.assignment.run,
            round=round_number,
            attempt=self._serial(),
            length=encoding.length(size),
            bits=encoding.bits,
            minimum=self.protocol.minimum,
            corrupt_share=self.protocol.corrupt_share,
            active=self.protocol.active,
            roster=witnesses.digest if self.protocol.active else "",
            **self.own(encoding),
        )
        return Agreed(parameters, encoding, witnesses)

"""What goes wrong in a simulated federation, on purpose: clients that are away, drop out, are late, or send NaN."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fedml_core.errors import ConfigError
from fedml_core.messages import Arrival
from fedml_core.randomness import keyed_coins, seeded
from fedml_core.update import Update
from simulations.population import KeyedSubset


@dataclass(frozen=True)
class Faults:
    """Shares of clients, drawn anew in each round from the run's seed; a client has at most one fault a round.

    `unavailable`: of the population, cannot be asked. Of the cohort: `drop` never reply, `late` reply after the
    deadline and do not count, `nan` send an update that is not finite, which the server must exclude.
    """

    unavailable: float = 0.0
    drop: float = 0.0
    late: float = 0.0
    nan: float = 0.0

    def __post_init__(self) -> None:
        """Check the shares."""
        for name in ("unavailable", "drop", "late", "nan"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"faults.{name} must be a share from 0 to 1, got {getattr(self, name)}")
        if self.drop + self.late + self.nan > 1:
            raise ConfigError(f"faults drop + late + nan must be <= 1, got {self.drop + self.late + self.nan:g}")

    def available(self, clients: Sequence[int], round_number: int, seed: int) -> Sequence[int]:
        """Return those of the clients that can be asked in a round, in no order; each is found when it is asked for."""
        if self.unavailable == 0:
            return clients
        # As many as that many coins would leave, and which ones decided by a key: no coin is thrown for each client.
        draws = seeded(seed, "unavailable", round_number)
        count = int(draws.binomial(len(clients), 1 - self.unavailable))
        return KeyedSubset((seed, "available", round_number), clients, count)

    def reachable(self, cohort: Sequence[int], round_number: int, seed: int) -> list[int]:
        """Return the clients of the cohort whose reply will arrive in time."""
        lost = self.drop + self.late
        if lost == 0:
            return list(cohort)
        coins = keyed_coins((seed, "fault", round_number), cohort)
        return [client for client, coin in zip(cohort, coins, strict=True) if coin >= lost]

    def disturb(self, arrivals: Iterator[Arrival], round_number: int, seed: int) -> Iterator[Arrival]:
        """Yield the arrivals, some of them with an update of NaN."""
        if self.nan == 0:
            yield from arrivals
            return
        spoilt = self.drop + self.late + self.nan
        for arrival in arrivals:
            body = arrival.reply.body
            if isinstance(body, Update) and keyed_coins((seed, "fault", round_number), [arrival.client])[0] < spoilt:
                body = body.replace(values=torch.full_like(body.values, float("nan")))
                arrival = dataclasses.replace(arrival, reply=dataclasses.replace(arrival.reply, body=body))
            yield arrival

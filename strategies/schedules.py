"""How a rate changes from round to round. Wherever a strategy takes a schedule, a number will do for a constant one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedml_core.checks import require_number, require_whole
from fedml_core.errors import ConfigError, StrategyError
from fedml_core.named import Named


@dataclass(frozen=True)
class Schedule(Named):
    """Gives each round's rate. Subclass it, as a frozen dataclass, for any other."""

    def at(self, round_number: int) -> float:
        """Return the rate of round `round_number`; 1 is the first."""
        raise StrategyError(f"{type(self).__name__} must define at(round_number)")


@dataclass(frozen=True)
class Constant(Schedule):
    """The same rate in every round."""

    rate: float

    def __post_init__(self) -> None:
        """Check the rate."""
        require_number("rate", self.rate, above=0)

    def at(self, round_number: int) -> float:
        """Return the rate."""
        return self.rate


@dataclass(frozen=True)
class StepDecay(Schedule):
    """Multiplies the rate by `factor` after each `every` rounds.

    Example:
        >>> [StepDecay(1.0, every=2, factor=0.5).at(r) for r in (1, 2, 3, 4, 5)]
        [1.0, 1.0, 0.5, 0.5, 0.25]
    """

    initial: float
    every: int
    factor: float = 0.1

    def __post_init__(self) -> None:
        """Check the arguments."""
        require_number("initial", self.initial, above=0)
        require_whole("every", self.every, at_least=1)
        require_number("factor", self.factor, above=0, at_most=1)

    def at(self, round_number: int) -> float:
        """Return the rate of the round."""
        return self.initial * float(self.factor ** ((round_number - 1) // self.every))


@dataclass(frozen=True)
class ExponentialDecay(Schedule):
    """Multiplies the rate by `factor` after each round.

    Example:
        >>> [ExponentialDecay(1.0, factor=0.5).at(r) for r in (1, 2, 3)]
        [1.0, 0.5, 0.25]
    """

    initial: float
    factor: float

    def __post_init__(self) -> None:
        """Check the arguments."""
        require_number("initial", self.initial, above=0)
        require_number("factor", self.factor, above=0, at_most=1)

    def at(self, round_number: int) -> float:
        """Return the rate of the round."""
        return self.initial * float(self.factor ** (round_number - 1))


@dataclass(frozen=True)
class CosineDecay(Schedule):
    """Falls along half a cosine from `initial` in round 1 to `final` in round `rounds`, and stays there.

    Example:
        >>> [round(CosineDecay(1.0, rounds=3, final=0.0).at(r), 6) for r in (1, 2, 3, 4)]
        [1.0, 0.5, 0.0, 0.0]
    """

    initial: float
    rounds: int
    final: float = 0.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        require_number("initial", self.initial, above=0)
        require_whole("rounds", self.rounds, at_least=2)
        require_number("final", self.final, at_least=0, at_most=self.initial)

    def at(self, round_number: int) -> float:
        """Return the rate of the round."""
        share = min(1.0, (round_number - 1) / (self.rounds - 1))
        return self.final + (self.initial - self.final) * (1 + math.cos(math.pi * share)) / 2


@dataclass(frozen=True)
class Warmup(Schedule):
    """Rises in equal steps to the first rate of `then` in round `rounds`, and goes on from there as `then` does.

    Example:
        >>> [Warmup(rounds=4, then=ExponentialDecay(1.0, factor=0.5)).at(r) for r in (1, 2, 3, 4, 5, 6)]
        [0.25, 0.5, 0.75, 1.0, 0.5, 0.25]
    """

    rounds: int
    then: Schedule | float

    def __post_init__(self) -> None:
        """Check the arguments."""
        require_whole("rounds", self.rounds, at_least=1)
        require_rate("then", self.then)

    def at(self, round_number: int) -> float:
        """Return the rate of the round."""
        if round_number >= self.rounds:
            return rate_at(self.then, round_number - self.rounds + 1)
        return rate_at(self.then, 1) * round_number / self.rounds


def rate_at(rate: Schedule | float, round_number: int) -> float:
    """Return the rate of round `round_number` (1 is the first), whichever way it is given."""
    return rate.at(round_number) if isinstance(rate, Schedule) else rate


def require_rate(name: str, rate: object) -> None:
    """Raise ConfigError unless `rate` is a schedule or a number > 0."""
    if isinstance(rate, Schedule):
        return
    if isinstance(rate, bool) or not isinstance(rate, int | float):
        raise ConfigError(f"{name} must be a number or a schedule, got {rate!r}")
    require_number(name, rate, above=0)

"""What a run would cost and how much of its signal would be left, before it is started.

Guarantees: the cost after a round is what epsilon_of says of that many rounds' events.
    Noise and signal are those of one round's mean over the fixed expected cohort, whoever drops out.
    Of noise that rounds partly take back, they are an even share of what is left in the sum of all rounds.
Trust: the outlook is as good as the event it is given: it must be the one that the run will write.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fedml_core.checks import require_number, require_whole
from fedml_core.privacy.accounting import Claim, epsilon_of
from fedml_core.privacy.calibration import noise_for
from fedml_core.privacy.terms import epsilon_text

__all__ = ["Outlook", "Release", "outlook", "with_noise_times"]

_POINTS = 10
_NOISY = ("noise_multiplier", "scale", "local_noise")
Price = Callable[[int], Claim]


@dataclass(frozen=True)
class Release:
    """The mean that is published: clipped updates over `expected_cohort`, with noise on their sum.

    `clip_norm`: in units of the update. `noise_multiplier`: of the sum, over the clip norm. `parameters`: coordinates.
    `once`, `parts`, `of`: in words, how often, of what, and what these are together. `share_of`: of how many rounds
    that take noise back this is an even share: as many independent rounds with such noise would end with as much.
    """

    clip_norm: float
    noise_multiplier: float
    expected_cohort: float
    parameters: int
    once: str = "round"
    parts: str = "updates"
    of: str = "cohort"
    share_of: int = 1

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("clip_norm", "noise_multiplier", "expected_cohort"):
            require_number(name, getattr(self, name), above=0)
        require_whole("parameters", self.parameters, at_least=1)
        require_whole("share_of", self.share_of, at_least=1)

    @property
    def noise_per_coordinate(self) -> float:
        """Return the standard deviation of the noise on each coordinate of the mean, in units of the update."""
        return self.noise_multiplier * self.clip_norm / self.expected_cohort

    @property
    def noise_norm(self) -> float:
        """Return the expected L2 norm of the mean's noise, in units of the update."""
        return self.noise_per_coordinate * math.sqrt(self.parameters)

    @property
    def aligned_signal_to_noise(self) -> float:
        """Return signal over noise if all updates reach the clip norm and agree; per coordinate it is the same."""
        return self.clip_norm / self.noise_norm

    @property
    def independent_signal_to_noise(self) -> float:
        """Return signal over noise if all updates reach the clip norm and have nothing in common."""
        return self.aligned_signal_to_noise / math.sqrt(self.expected_cohort)


@dataclass(frozen=True)
class Outlook:
    """What a run would cost. `claims`: (round, what it and all before cost), the last round included.

    `advice`: what to change, whole sentences.
    """

    claims: tuple[tuple[int, Claim], ...]
    release: Release | None
    advice: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        found: dict[str, Any] = {"rounds": [{"round": number, **claim.to_json()} for number, claim in self.claims]}
        if self.release:
            found["noise_per_coordinate"] = self.release.noise_per_coordinate
            found["noise_norm"] = self.release.noise_norm
            found["aligned_signal_to_noise"] = self.release.aligned_signal_to_noise
            found["independent_signal_to_noise"] = self.release.independent_signal_to_noise
            found["noise_shared_by_rounds"] = self.release.share_of
        return {**found, "advice": list(self.advice)}


def outlook(
    event: Mapping[str, Any],
    rounds: int,
    *,
    delta: float,
    unit: str,
    adjacency: str,
    release: Release | None = None,
    budget: float | None = None,
) -> Outlook:
    """Return what `rounds` rounds of `event` would cost one unit that may be asked in each, at some ten of them.

    `release`: what each round publishes, for its signal and noise. `budget`: the epsilon not to go beyond.

    Raises: PrivacyError: if nothing accounts for the event. ConfigError: for a number out of range.
    """
    require_whole("rounds", rounds, at_least=1)
    if budget is not None:
        require_number("budget", budget, above=0)

    def price(count: int) -> Claim:
        spent = [{"name": "repeated", "count": count, "event": event}]
        return epsilon_of(spent, delta=delta, unit=unit, adjacency=adjacency)

    claims = tuple((number, price(number)) for number in _checkpoints(rounds))
    advice = [] if budget is None else _on_budget(event, rounds, claims[-1][1], budget, price)
    return Outlook(claims, release, (*advice, *(_on_signal(release) if release else ()), *claims[-1][1].notes))


def with_noise_times(event: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Return the event with every noise in it `factor` times as large."""
    changed: dict[str, Any] = {}
    is_sum = "local_noise" in event
    for key, value in event.items():
        if isinstance(value, Mapping):
            changed[key] = with_noise_times(value, factor)
        elif isinstance(value, list | tuple):
            changed[key] = [with_noise_times(each, factor) for each in value]
        else:
            # In a distributed sum `scale` is the grid's, not the noise's.
            changed[key] = value * factor if key in _NOISY and not (is_sum and key == "scale") else value
    return changed


def _checkpoints(rounds: int) -> list[int]:
    return sorted({1, *(max(1, round(rounds * place / _POINTS)) for place in range(1, _POINTS + 1))})


def _on_budget(event: Mapping[str, Any], rounds: int, last: Claim, budget: float, price: Price) -> list[str]:
    if last.epsilon <= budget:
        return [f"all {rounds} rounds fit into the budget: {epsilon_text(last.epsilon)} of {budget:g}"]
    fit, broken = 0, rounds
    while broken - fit > 1:
        middle = (fit + broken) // 2
        fit, broken = (middle, broken) if price(middle).epsilon <= budget else (fit, middle)
    factor = noise_for(
        budget,
        last.delta,
        lambda times: [{"name": "repeated", "count": rounds, "event": with_noise_times(event, times)}],
        unit=last.unit,
        adjacency=last.adjacency,
    )
    return [
        f"{rounds} rounds cost {epsilon_text(last.epsilon)}, which is more than the budget of {budget:g}; {fit} fit, "
        f"or all of them with {math.ceil(factor * 1000) / 1000:.3f} times the noise"
    ]


def _on_signal(release: Release) -> list[str]:
    ratio = release.aligned_signal_to_noise
    if ratio >= 1:
        return []
    cohort = math.ceil(release.expected_cohort / ratio)
    fewer = max(1, math.floor(release.parameters * ratio**2))
    return [
        f"in one {release.once} the noise is {1 / ratio:.3g} times as large as the signal can be at most; "
        f"a {release.of} of {cohort} "
        f"instead of {release.expected_cohort:g}, or {fewer} parameters instead of {release.parameters}, makes "
        "them equal"
    ]

"""What an attacker's scores prove about an epsilon: estimates from canaries, and lower bounds that hold.

A canary is a client that sends a random direction. Its score is how far what was released points there. Scores of
canaries that took part, against those of canaries that did not, say how private the release was, whatever was claimed.

Guarantees: a lower bound exceeds the true epsilon in at most the stated share of audits, if coins were fair.
Guarantees: an estimate is no bound; it comes with its standard deviation.
Trust: these are functions of scores; whoever makes scores up gets any answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedml_core.checks import require_number, require_whole
from fedml_core.errors import PrivacyError
from fedml_core.privacy.analytic import analytic_gaussian_epsilon
from fedml_core.privacy.tails import binomial, largest_rate, normal_quantile, normal_tail

__all__ = [
    "Estimate",
    "canary_estimate",
    "compared_estimate",
    "epsilon_many_runs",
    "epsilon_one_run",
    "gaussian_tpr",
    "one_run_bound",
    "two_gaussians_epsilon",
]

FITTED_FROM = 1000
"""So many canaries tell the spread of their scores; with fewer, a fitted spread would lift the estimate."""
_LARGEST = 60.0
_SHARES = (1.0, 0.5, 0.2, 0.1, 0.05)


@dataclass(frozen=True)
class Estimate:
    """An estimated epsilon. `sd`: its standard deviation. `canaries`: how many it rests on. `shift`: scores' mean,
    in standard deviations of the scores of canaries that took no part.
    """

    epsilon: float
    sd: float
    canaries: int
    shift: float

    @property
    def lower(self) -> float:
        """Return what the true value exceeds with a confidence of 95 %, as far as scores are Gaussian."""
        return max(0.0, self.epsilon - 1.645 * self.sd)


def canary_estimate(cosines: ArrayLike, dimension: int, delta: float) -> Estimate:
    """Return the epsilon by which canaries' cosines N(m, s^2) differ from those of absent ones, N(0, 1/dimension).

    Below 1,000 canaries s^2 is taken for 1/dimension; from there on it is fitted.
    Guarantees: canaries of a Gaussian release give its epsilon, less what the other canaries' random directions hide.
    Args: cosines: of each canary that took part, with what was released. dimension: of the model.
    Raises: PrivacyError: for fewer than two cosines, or one that is not finite. ConfigError: for a delta that is none.
    Source: Andrew et al. (2023), arXiv:2302.03098, Algorithms 1 and 2.
    """
    found = _scores("cosines", cosines) * math.sqrt(dimension)
    require_number("delta", delta, above=0, below=1)
    count, shift = len(found), float(found.mean())
    fitted = count >= FITTED_FROM
    spread = float(found.std(ddof=1)) if fitted else 1.0

    def epsilon(mean: float, deviation: float) -> float:
        if fitted:
            return two_gaussians_epsilon(mean, deviation, delta)
        return analytic_gaussian_epsilon(1 / mean, delta) if mean > 1e-9 else 0.0

    error = spread / math.sqrt(count)
    slope = (epsilon(shift + error, spread) - epsilon(shift - error, spread)) / 2
    width = spread / math.sqrt(2 * count)
    bend = (epsilon(shift, spread + width) - epsilon(shift, max(spread - width, 1e-6))) / 2 if fitted else 0.0
    return Estimate(epsilon(shift, spread), math.hypot(slope, bend), count, shift)


def compared_estimate(included: ArrayLike, excluded: ArrayLike, delta: float) -> Estimate:
    """Return the epsilon by which canaries' scores are further up than those of canaries that took no part.

    For scores of any scale: the excluded ones say what chance does. Both are taken for Gaussians of equal spread, so
    scores that only seldom tell something, as of rare samples, estimate too little.
    Guarantees: canaries that differ from absent ones by a Gaussian release give its epsilon.
    Args: included, excluded: the scores, by a fair coin for each canary.
    Raises: PrivacyError: for fewer than two scores in either, one that is not finite, or excluded ones all alike.
    """
    inside, outside = _scores("included", included), _scores("excluded", excluded)
    require_number("delta", delta, above=0, below=1)
    spread = float(outside.std(ddof=1))
    if not spread > 0:
        raise PrivacyError("excluded scores must differ; what is the same for all tells nothing of chance")
    shift = float(inside.mean() - outside.mean()) / spread
    wider = float(inside.std(ddof=1)) / spread
    error = math.sqrt(wider**2 / len(inside) + (1 + shift**2 / 2) / len(outside))

    def epsilon(mean: float) -> float:
        return analytic_gaussian_epsilon(1 / mean, delta) if mean > 1e-9 else 0.0

    return Estimate(epsilon(shift), (epsilon(shift + error) - epsilon(shift - error)) / 2, len(inside), shift)


def two_gaussians_epsilon(mean: float, deviation: float, delta: float) -> float:
    """Return the smallest epsilon at which N(0, 1) and N(mean, deviation^2) are (epsilon, delta)-close both ways.

    Guarantees: equal deviations give the exact epsilon of the Gaussian mechanism.
    Raises: ConfigError: for a deviation that is not > 0, or a delta outside (0, 1).
    """
    require_number("deviation", deviation, above=0)
    require_number("delta", delta, above=0, below=1)

    def spent(epsilon: float) -> float:
        forth = _hockey_stick((mean, deviation), (0.0, 1.0), epsilon)
        return max(forth, _hockey_stick((0.0, 1.0), (mean, deviation), epsilon))

    return _crossing(lambda epsilon: spent(epsilon) <= delta)


def epsilon_one_run(guesses: int, correct: int, *, coins: int, delta: float = 0.0, significance: float = 0.05) -> float:
    """Return the epsilon that `correct` of `guesses` guesses about `coins` fair coins prove.

    Guarantees: at delta = 0 it is the closed form: the epsilon at which P[Bin(guesses, 1/(1+e^-epsilon)) >= correct]
        equals the significance.
    Raises: ConfigError: unless 0 <= correct <= guesses <= coins, and delta and significance are probabilities.
    Source: Steinke, Nasr and Jagielski (2023), arXiv:2305.08846, Theorem 5.2.
    """
    require_whole("coins", coins, at_least=1)
    require_whole("guesses", guesses, at_least=0, at_most=coins)
    require_whole("correct", correct, at_least=0, at_most=guesses)
    require_number("delta", delta, at_least=0, below=1)
    require_number("significance", significance, above=0, below=1)
    if correct == 0:
        return 0.0
    return _lowered(lambda epsilon: _chance(guesses, correct, coins, epsilon, delta) <= significance)


def one_run_bound(
    included: ArrayLike, excluded: ArrayLike, *, delta: float, significance: float = 0.05
) -> tuple[float, int, int]:
    """Return the best bound over five numbers of guesses that were fixed beforehand, its guesses and the right ones.

    The highest scores are guessed to be of canaries that took part, as many of the lowest of those that did not.
    Guarantees: the significance is shared out over the numbers that are tried.
    Args: included, excluded: the scores, by a fair coin for each canary.
    Raises: PrivacyError: for a score that is not finite, or fewer than two in either.
    """
    inside, outside = _scores("included", included), _scores("excluded", excluded)
    order = np.argsort(np.concatenate([inside, outside]), kind="stable")
    took_part = order < len(inside)
    coins, best = len(order), (0.0, 0, 0)
    for share in _SHARES:
        each = max(1, int(coins * share) // 2)
        correct = int(took_part[-each:].sum() + (~took_part[:each]).sum())
        bound = epsilon_one_run(2 * each, correct, coins=coins, delta=delta, significance=significance / len(_SHARES))
        best = max(best, (bound, 2 * each, correct))
    return best


def epsilon_many_runs(
    caught: int, members: int, false_alarms: int, others: int, *, delta: float = 0.0, significance: float = 0.05
) -> float:
    """Return the epsilon that many independent runs prove, by Clopper and Pearson's intervals of both error rates.

    Guarantees: both rates are bounded at half the significance each.
    Args: caught: of `members` runs with the unit, those guessed so. false_alarms: of `others` runs without.
    Raises: ConfigError: for a count above its total.
    """
    require_whole("members", members, at_least=1)
    require_whole("others", others, at_least=1)
    require_whole("caught", caught, at_least=0, at_most=members)
    require_whole("false_alarms", false_alarms, at_least=0, at_most=others)
    missed = largest_rate(members - caught, members, significance / 2)
    alarmed = largest_rate(false_alarms, others, significance / 2)
    # The same test read the other way round: what is not guessed, rarely with the unit and often without.
    found, quiet = 1 - missed, 1 - alarmed
    pairs = ((found, alarmed), (quiet, missed))
    return max([0.0, *(math.log((hit - delta) / wrong) for hit, wrong in pairs if hit > delta)])


def gaussian_tpr(false_positive_rate: float, mu: float) -> float:
    """Return the most true positives that any attack has at a rate of false ones, where the release is mu-GDP.

    Raises: ConfigError: for a rate outside (0, 1).
    Example:
        >>> round(gaussian_tpr(0.1, 1.0), 3)
        0.389
    """
    require_number("false_positive_rate", false_positive_rate, above=0, below=1)
    return normal_tail(-normal_quantile(false_positive_rate) - mu)


def _chance(guesses: int, correct: int, coins: int, epsilon: float, delta: float) -> float:
    """Return how probable so many right guesses are at most, if the release were (epsilon, delta)-private."""
    chances = binomial(guesses, 1 / (1 + math.exp(-epsilon)))
    tail = float(chances[correct:].sum())
    if delta == 0:
        return tail
    below = np.cumsum(chances[:correct][::-1])
    steepest = float((below / np.arange(1, correct + 1)).max())
    return min(1.0, tail + 2 * coins * delta * steepest)


def _hockey_stick(first: tuple[float, float], second: tuple[float, float], epsilon: float) -> float:
    """Return the integral of the positive part of p - e^epsilon q, for two Gaussians (mean, deviation)."""
    (m, s), (n, t) = first, second
    # log p - log q - epsilon is a x^2 + b x + c.
    a = 0.5 / t**2 - 0.5 / s**2
    b = m / s**2 - n / t**2
    c = 0.5 * (n / t) ** 2 - 0.5 * (m / s) ** 2 + math.log(t / s) - epsilon
    total = 0.0
    for low, high in _where_positive(a, b, c):
        inside = _normal(high, m, s) - _normal(low, m, s)
        total += inside - math.exp(epsilon) * (_normal(high, n, t) - _normal(low, n, t))
    return max(0.0, total)


def _where_positive(a: float, b: float, c: float) -> Sequence[tuple[float, float]]:
    if abs(a) < 1e-12:
        if abs(b) < 1e-300:
            return [(-math.inf, math.inf)] if c > 0 else []
        return [(-c / b, math.inf)] if b > 0 else [(-math.inf, -c / b)]
    root = b * b - 4 * a * c
    if root <= 0:
        return [(-math.inf, math.inf)] if a > 0 else []
    half = -0.5 * (b + math.copysign(math.sqrt(root), b))
    low, high = sorted((half / a, c / half if half else 0.0))
    return [(-math.inf, low), (high, math.inf)] if a > 0 else [(low, high)]


def _normal(place: float, mean: float, deviation: float) -> float:
    """Return the distribution function; differences of it are good to 10^-16, far below every delta of use here."""
    return 0.5 * math.erfc((mean - place) / (deviation * math.sqrt(2)))


def _crossing(holds: Callable[[float], bool]) -> float:
    """Return the least epsilon from which `holds` holds, or the largest that is looked at."""
    if holds(0.0):
        return 0.0
    low, high = 0.0, _LARGEST
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _lowered(implausible: Callable[[float], bool]) -> float:
    """Return the largest epsilon that is implausible, or 0."""
    return _crossing(lambda epsilon: not implausible(epsilon))


def _scores(name: str, values: ArrayLike) -> NDArray[np.float64]:
    found = np.asarray(values, dtype=np.float64).ravel()
    if len(found) < 2:
        raise PrivacyError(f"{name} must be at least 2 scores, got {len(found)}; use more canaries")
    if not np.isfinite(found).all():
        raise PrivacyError(f"{name} must be finite; a release that is not has no score")
    return found

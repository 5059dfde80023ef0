"""What a list of events costs: epsilon at a delta, always said together with what it is about.

Gaussian noise alone is exact in closed form; Gaussian and Laplace noise, also on Poisson samples, go through privacy
loss distributions; what none is known for goes, with everything else in the list, through Rényi curves. A central limit
theorem is never used: it errs to the wrong side. Clients with disjoint data do not add up: account for each one's own
events and take the largest; that is the caller's business, since events do not say whose data they touched.

Guarantees: an epsilon is never below the exact one of the events.
    What nothing can account for raises PrivacyError; it is never counted as zero.
    Under replace-one every bound on one unit's influence counts twice.
Trust: the claim holds if the events are what happened: noise of that size, and samples that nobody else knew.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fedml_core.checks import require_number, require_whole
from fedml_core.errors import PrivacyError
from fedml_core.privacy.analytic import analytic_gaussian_epsilon
from fedml_core.privacy.curves import curve_of, gaussian_ratio
from fedml_core.privacy.events import ADJACENCIES, UNITS, Term, fold, sampling_of
from fedml_core.privacy.losses import FINE, Piece, loss_epsilon
from fedml_core.privacy.renyi import ORDERS, epsilon_from
from fedml_core.privacy.terms import epsilon_text

__all__ = ["Claim", "cost", "epsilon_of"]


@dataclass(frozen=True)
class Claim:
    """An epsilon with everything without which it means nothing.

    `unit`: whose data, "client" or "example". `sampling`: the schemes of the events, joined by "+", or "none".
    `accountant`: "analytic-gaussian", "pld" or "rdp". `notes`: what a reader should know besides, whole sentences.
    """

    epsilon: float
    delta: float
    unit: str
    adjacency: str
    sampling: str
    accountant: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the claim on one line; the last digit of epsilon is rounded up."""
        about = f"unit {self.unit}, {self.adjacency}, sampling {self.sampling}, accountant {self.accountant}"
        return f"epsilon {epsilon_text(self.epsilon)} at delta {self.delta:g} ({about})"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return {**asdict(self), "notes": list(self.notes)}


def epsilon_of(
    events: Iterable[Mapping[str, Any]],
    *,
    delta: float,
    unit: str,
    adjacency: str,
    sampling: str | None = None,
    population: int | None = None,
) -> Claim:
    """Return what all of `events` together cost one unit that took part in every one of them.

    `sampling`: the scheme that is to be claimed; events of another one are refused. `population`: how many units there
    are, if known; a `delta` that is not below 1 / population is noted. No events cost nothing.

    Raises: PrivacyError: for an event or a combination that nothing accounts for, or an unknown unit or adjacency.
        ConfigError: for a delta outside (0, 1).
    Example:
        >>> once = {"name": "gaussian", "noise_multiplier": 1.0}
        >>> print(epsilon_of([once], delta=1e-5, unit="client", adjacency="add-or-remove-one"))
        epsilon 4.3772 at delta 1e-05 (unit client, add-or-remove-one, sampling none, accountant analytic-gaussian)
    """
    require_number("delta", delta, above=0, below=1)
    _require("unit", unit, UNITS)
    _require("adjacency", adjacency, ADJACENCIES)
    if population is not None:
        require_whole("population", population, at_least=1)
    terms = fold(events)
    found = sampling_of(terms)
    if sampling is not None and sampling != found:
        raise PrivacyError(f"{sampling} sampling was claimed and the events say {found}; claim what was done")
    epsilon, accountant = cost(terms, delta, adjacency)
    if not math.isfinite(epsilon):
        raise PrivacyError(
            f"these events have no finite epsilon at delta {delta:g}; add noise, take a larger delta, or release less "
            "often"
        )
    return Claim(epsilon, delta, unit, adjacency, found, accountant, _notes(terms, delta, population))


def cost(terms: Mapping[Term, int], delta: float, adjacency: str, steps: int = FINE) -> tuple[float, str]:
    """Return epsilon and the accountant that gave it. `steps`: see loss_epsilon; fewer are faster and give more.

    Raises: PrivacyError: for a combination that nothing accounts for.
    """
    ratio = _only_gaussian(terms, adjacency)
    if ratio is not None:
        return (analytic_gaussian_epsilon(ratio, delta) if math.isfinite(ratio) else 0.0), "analytic-gaussian"
    pieces = _pieces(terms, adjacency)
    if pieces is None:
        return _renyi(terms, delta, adjacency), "rdp"
    epsilon = loss_epsilon(pieces, delta, adjacency, steps)
    if math.isfinite(epsilon) or (adjacency == "replace-one" and any(term.scheme == "poisson" for term in terms)):
        return epsilon, "pld"
    return _renyi(terms, delta, adjacency), "rdp"


def _renyi(terms: Mapping[Term, int], delta: float, adjacency: str) -> float:
    curves = [count * curve_of(term, adjacency)(ORDERS) for term, count in terms.items()]
    return epsilon_from(ORDERS, np.sum(curves, axis=0), delta)


def _only_gaussian(terms: Mapping[Term, int], adjacency: str) -> float | None:
    """Return the noise over the sensitivity of the one Gaussian release that all terms are, or None if they are not."""
    precision = 0.0
    for term, count in terms.items():
        ratio = gaussian_ratio(term, adjacency) if term.rate == 1 and term.scheme != "fixed-size" else None
        if ratio is None:
            return None
        precision += count / ratio**2
    return 1 / math.sqrt(precision) if precision else math.inf


def _pieces(terms: Mapping[Term, int], adjacency: str) -> list[Piece] | None:
    """Return the terms as what has a privacy loss distribution, or None if one has not."""
    pieces: list[Piece] = []
    for term, count in terms.items():
        ratio = None if term.scheme == "fixed-size" else gaussian_ratio(term, adjacency)
        if ratio is not None:
            # Piece counts one unit's bound once; its distribution knows the adjacency itself.
            pieces.append(Piece("gaussian", ratio * _times(adjacency), term.rate, count))
            continue
        plain = term.rate == 1 and term.scheme != "fixed-size"
        single = len(term.parts) == 1 and term.parts[0][1] == 1 and term.scheme == "poisson"
        if any(part.name != "laplace" for part, _ in term.parts) or not (
            plain or (single and adjacency != "replace-one")
        ):
            return None
        pieces += [Piece("laplace", part["scale"], term.rate, count * each) for part, each in term.parts]
    return pieces


def _times(adjacency: str) -> int:
    return 2 if adjacency == "replace-one" else 1


def _notes(terms: Mapping[Term, int], delta: float, population: int | None) -> tuple[str, ...]:
    notes = []
    known = [term.population for term in terms if term.population] + ([population] if population else [])
    if known and delta * min(known) >= 1:
        notes.append(
            f"delta {delta:g} is not below 1/{min(known)}: such a delta allows one unit's data to be published whole; "
            "take a smaller one"
        )
    if any(term.scheme == "shuffled" for term in terms):
        notes.append("shuffled batches were counted without amplification; Poisson sampling would cost less")
    return tuple(notes)


def _require(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise PrivacyError(f"{name} must be one of {', '.join(known)}, got {str(value)[:60]!r}")

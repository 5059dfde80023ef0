"""What a run's rounds cost: counted when a round begins, so that nothing that goes wrong later gives any of it back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedml_core.errors import ConfigError, PrivacyError
from fedml_core.privacy.accounting import Claim, cost
from fedml_core.privacy.events import canonical, fold, sampling_of
from fedml_core.privacy.terms import Terms
from server.sampling import Sampling
from strategies.strategy import Strategy

__all__ = ["Events", "charged", "claim_of", "counted", "event_of", "require_accountable"]

Events = Sequence[Mapping[str, Any]]
"""What was done so far: events, equal ones folded to `repeated`."""

_STEPS = 2_000  # of the accountant's grid: a round's epsilon takes 40 ms so, and is at most 0.1 % above the finest


def require_accountable(
    strategy: Strategy, sampling: Sampling, minimum_replies: int, *, stops_by: str | None = None
) -> None:
    """Refuse a plan whose rounds would not be as private as the strategy says.

    Args: stops_by: the metric that ends the run early, such as "clients.loss".
    Raises: PrivacyError: if clients may come back before correlated noise allows it, or secret cohorts would be drawn
        by another rule than the sampling's. ConfigError: if rounds with few replies would be void, although noise is
        to hide who came; if clients' exact metrics would decide how many rounds are released.
    """
    terms = strategy.privacy()
    if terms is None:
        return
    if terms.secret_cohort and not sampling.hides:
        raise PrivacyError(
            f"{type(sampling).__name__} changes who is asked, and its secret cohorts would follow the class that it "
            "changes; give it a hidden_cohort, too"
        )
    if sampling.separation < terms.separation:
        raise PrivacyError(
            f"the noise is for clients that stay away for {terms.separation} rounds, and {type(sampling).__name__} "
            f"keeps them away for {sampling.separation}; sample with MinimumSeparation({terms.separation})"
        )
    if terms.server_noise and minimum_replies > 1:
        raise ConfigError(
            f"minimum_replies must be 1 where noise is to hide who takes part, got {minimum_replies}: a void round "
            "would tell how many came"
        )
    if stops_by is not None and not stops_by.startswith("server."):
        raise ConfigError(
            f"early_stopping.metric must be one of server.* under differential privacy, got {stops_by!r}: clients "
            "report it exactly, so the number of rounds would tell what no noise covers"
        )


def charged(spent: Events, strategy: Strategy, sampling: Sampling, population: int) -> tuple[Events, Events]:
    """Return everything that was done once one more round has begun, and of it what is new.

    Raises: PrivacyError: if the strategy is private and reports no event, or what it reports is none.
    """
    terms = strategy.privacy()
    if terms is None:
        return spent, ()
    event = event_of(strategy, terms, sampling, population)
    if terms.rounds is not None and spent:
        return spent, ()  # one event covers the whole run, and was charged with its first round
    return counted(spent, event), (event,)


def event_of(strategy: Strategy, terms: Terms, sampling: Sampling, population: int) -> Mapping[str, Any]:
    """Return what one round is to an accountant, or the whole run where `terms` are of one.

    Raises: PrivacyError: if the strategy reports no event, or what it reports is none.
    """
    event = strategy.pipeline().event()
    if event is None:
        raise PrivacyError(f"{type(strategy).__name__} claims privacy and reports no event; nothing can account for it")
    return sampling.event(population, event) if terms.secret_cohort else event


def claim_of(spent: Events, terms: Terms, sampling: Sampling) -> Claim:
    """Return what the events cost one client that took part whenever it could.

    Raises: PrivacyError: for what nothing can account for.
    """
    folded, adjacency = fold(spent), terms.adjacent(sampling.adjacency)
    epsilon, accountant = cost(folded, terms.delta, adjacency, _STEPS)
    return Claim(epsilon, terms.delta, terms.unit, adjacency, sampling_of(folded), accountant)


def counted(spent: Events, event: Mapping[str, Any]) -> Events:
    """Return what was done so far, and `event` after it; equal ones are counted."""
    text, after, found = canonical(event), [], False
    for each in spent:
        same = canonical(each["event"]) == text
        found = found or same
        after.append({**each, "count": each["count"] + 1} if same else each)
    return after if found else [*after, {"name": "repeated", "count": 1, "event": dict(event)}]

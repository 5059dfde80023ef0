"""Who a site is in secure sums, from its site.toml: its key, the roster that it pins, its counter and its floor."""

from __future__ import annotations

from clients.replay import REPLAY_FILE, ReplayCounter
from clients.secure_policy import CohortFloor, pinned_roster
from clients.standing import Standing
from fedml_core.config import SiteConfig
from fedml_core.errors import SecureAggregationError
from fedml_core.site_keys import public_half, read_site_keys

__all__ = ["standing_of", "unsigned"]


def standing_of(config: SiteConfig, threads: int = 1) -> Standing:
    """Return who the site is; without an operator it has no roster, and takes part in semi-honest sums at most.

    Raises: ConfigError: if its keys or the roster are missing, damaged, or do not fit each other. RefusalError: if the
        roster is older than one that it has seen.
    """
    counter = ReplayCounter(config.beside(config.memory) / REPLAY_FILE)
    floor = CohortFloor(config.secure_aggregation)
    if config.secure_aggregation.operator is None:
        return Standing(config.id, {}, "", unsigned, counter, floor, threads=threads)
    keys = read_site_keys(config.beside(config.keys.site))
    roster = pinned_roster(config, public_half(keys).identity, counter)
    return Standing(config.id, roster.keys, roster.digest, keys.identity.sign, counter, floor, threads=threads)


def unsigned(message: bytes) -> bytes:
    """Refuse to sign: there is no roster by which anybody could check it."""
    raise SecureAggregationError("this site names no operator, so it has no identity to sign with")

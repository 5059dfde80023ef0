"""What a site demands of a secure sum before it takes part, whatever the server wants: its own policy, in numbers.

Guarantees: a server that asks for a smaller cohort, a lower threshold or less mistrust than the site.toml says is
    refused, with both numbers; nothing that a server sends changes what the site demands.
Guarantees: where the site.toml lists assistants, it contributes to no one-shot sum whose masks anybody else would
    take off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clients.replay import ReplayCounter
from fedml_core.config import SecureAggregationTable, SiteConfig
from fedml_core.errors import ConfigError, RefusalError
from fedml_core.pinned_roster import PinnedRoster, pin_roster
from fedml_core.secagg.parameters import Parameters

__all__ = ["CohortFloor", "check_roster", "pinned_roster"]


@dataclass(frozen=True)
class CohortFloor:
    """The least that a site takes part in, as its site.toml says."""

    policy: SecureAggregationTable

    def check(self, parameters: Parameters) -> None:
        """Check what the server asks for, before anything is answered.

        Raises: RefusalError: if it is less than this site demands; `rule` is the key of the site.toml.
        """
        policy = self.policy
        if not parameters.active and not policy.allow_semi_honest:
            raise RefusalError(
                "allow_semi_honest",
                "the server asks to be believed that it follows the protocol (semi-honest), this site's "
                "allow_semi_honest is false; it must ask for the active mode",
            )
        for rule, what, asked, least in (
            ("minimum_cohort", "a minimum of {} members", parameters.minimum, policy.minimum_cohort),
            ("corrupt_share", "a colluding share of {}", parameters.corrupt_share, policy.corrupt_share),
            ("minimum_security_bits", "{} security bits", parameters.security_bits, policy.minimum_security_bits),
        ):
            if asked < least:
                raise _too_little(rule, f"asks for {what.format(asked)}", least)

    def check_attempts(self, round_number: int, attempts: int) -> None:
        """Check how often this site has begun a round.

        Args: attempts: so far, the one that is asked for included.
        Raises: RefusalError: with rule "maximum_attempts", if that is too often.
        """
        if attempts > self.policy.maximum_attempts:
            raise RefusalError(
                "maximum_attempts",
                f"the server asks for attempt {attempts} at round {round_number}, this site's maximum_attempts is "
                f"{self.policy.maximum_attempts}; it must go on to the next round",
            )

    def check_members(self, count: int, threshold: int) -> None:
        """Check the cohort that the bulletin shows, before any share is made.

        Args: count: its members. threshold: how many holders of shares it takes to open a secret.
        Raises: RefusalError: if it is less than this site demands; `rule` is the key of the site.toml.
        """
        if count < self.policy.minimum_cohort:
            raise _too_little("minimum_cohort", f"shows a cohort of {count} members", self.policy.minimum_cohort)
        if threshold < self.policy.minimum_threshold:
            least = self.policy.minimum_threshold
            raise _too_little("minimum_threshold", f"shows a cohort whose threshold is {threshold}", least)

    def check_assistants(self, assistants: Sequence[int]) -> None:
        """Check who would take the masks off a sum that this site contributes to, before any key is made.

        Raises: RefusalError: with rule "assistants", if one of them is not among those that this site trusts.
        """
        trusted = self.policy.assistants
        if trusted is None:
            return
        if strangers := [one for one in assistants if one not in trusted]:
            raise RefusalError(
                "assistants",
                f"the server names the assistants {_numbers(assistants)}, this site's assistants are "
                f"{_numbers(trusted) or 'none'}; it must do without {_numbers(strangers)}",
            )


def pinned_roster(config: SiteConfig, identity: bytes, counter: ReplayCounter) -> PinnedRoster:
    """Return the roster that a site.toml pins, once it is certain that it is the operator's newest that was ever seen.

    Args: identity: this site's own public identity key, 32 bytes.
    Raises: ConfigError: if the operator is not named, the roster is missing, damaged, not signed or signed by another,
        or does not admit this site with this key. RefusalError: if an older roster is used again, or from `counter`.
    """
    table = config.secure_aggregation
    if table.operator is None:
        raise ConfigError(
            f"{config.path} names no operator whose roster could be believed; set secure_aggregation.operator to what "
            "fedveil keys operator printed there"
        )
    roster = pin_roster(config.beside(table.roster), table.operator)
    counter.admit_roster(roster)
    roster.require_member(config.id, identity)
    return roster


def check_roster(parameters: Parameters, roster: PinnedRoster) -> None:
    """Check that the server goes by the very roster that this site pins.

    Raises: RefusalError: with rule "roster", if it does not.
    """
    if parameters.roster != roster.digest:
        raise RefusalError(
            "roster",
            f"the server goes by the roster {parameters.roster[:16] or 'of nobody'}, this site pins "
            f"{roster.digest[:16]} of serial {roster.serial}; both need the operator's newest roster",
        )


def _numbers(members: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(members)))


def _too_little(rule: str, asked: str, least: float) -> RefusalError:
    return RefusalError(rule, f"the server {asked}, this site's {rule} is {least}; it must ask for no less")

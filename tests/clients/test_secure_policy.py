"""A site's floor for secure sums: a server that asks for less is refused with both numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clients.replay import ReplayCounter
from clients.secure_policy import CohortFloor, check_roster, pinned_roster
from fedml_core.config import SecureAggregationTable, load_site
from fedml_core.errors import ConfigError, RefusalError
from fedml_core.identity import (
    PinnedRoster,
    enrol,
    new_operator_key,
    new_site_keys,
    read_operator_key,
    revoke,
)
from fedml_core.secagg.parameters import Parameters


def parameters(**changes: Any) -> Parameters:
    made: dict[str, Any] = {
        "run": "r",
        "round": 4,
        "attempt": 0,
        "length": 8,
        "bits": 32,
        "encoding": {},
        "minimum": 3,
        "corrupt_share": 0.1,
        "dropout_share": 0.1,
    }
    return Parameters(**{**made, **changes})


def test_exactly_what_a_site_demands_is_enough() -> None:
    floor = CohortFloor(SecureAggregationTable())
    floor.check(parameters())
    floor.check(parameters(minimum=99, corrupt_share=0.3, security_bits=80, attempt=2))
    floor.check_members(3, 2)
    CohortFloor(SecureAggregationTable(allow_semi_honest=True)).check(parameters(active=False))


@pytest.mark.parametrize(
    ("policy", "asked", "rule", "said"),
    [
        (
            {"minimum_cohort": 5},
            {"minimum": 2},
            "minimum_cohort",
            "the server asks for a minimum of 2 members, this site's minimum_cohort is 5; it must ask for no less",
        ),
        (
            {},
            {"corrupt_share": 0.09},
            "corrupt_share",
            "the server asks for a colluding share of 0.09, this site's corrupt_share is 0.1; it must ask for no less",
        ),
        (
            {},
            {"security_bits": 40},
            "minimum_security_bits",
            "the server asks for 40 security bits, this site's minimum_security_bits is 60; it must ask for no less",
        ),
        (
            {},
            {"active": False},
            "allow_semi_honest",
            "the server asks to be believed that it follows the protocol (semi-honest), this site's allow_semi_honest "
            "is false; it must ask for the active mode",
        ),
    ],
)
def test_a_server_that_asks_for_less_is_refused_with_both_numbers(
    policy: dict[str, Any], asked: dict[str, Any], rule: str, said: str
) -> None:
    with pytest.raises(RefusalError) as caught:
        CohortFloor(SecureAggregationTable(**policy)).check(parameters(**asked))
    assert (caught.value.rule, str(caught.value)) == (rule, said)


def test_a_round_that_is_tried_too_often_is_refused() -> None:
    floor = CohortFloor(SecureAggregationTable(maximum_attempts=2))
    floor.check_attempts(4, 2)
    with pytest.raises(RefusalError, match="attempt 3 at round 4, this site's maximum_attempts is 2") as caught:
        floor.check_attempts(4, 3)
    assert caught.value.rule == "maximum_attempts"


@pytest.mark.parametrize(
    ("count", "threshold", "rule", "said"),
    [
        (4, 3, "minimum_cohort", "the server shows a cohort of 4 members, this site's minimum_cohort is 5"),
        (
            5,
            2,
            "minimum_threshold",
            "the server shows a cohort whose threshold is 2, this site's minimum_threshold is 3",
        ),
    ],
)
def test_a_cohort_that_turns_out_smaller_is_refused(count: int, threshold: int, rule: str, said: str) -> None:
    floor = CohortFloor(SecureAggregationTable(minimum_cohort=5, minimum_threshold=3))
    with pytest.raises(RefusalError) as caught:
        floor.check_members(count, threshold)
    assert (caught.value.rule, str(caught.value)) == (rule, f"{said}; it must ask for no less")
    floor.check_members(5, 3)


class Fleet:
    """Two enrolled sites, a signed roster, and the site.toml of the first."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.roster = folder, folder / "roster.json"
        self.operator = new_operator_key(folder / "operator").hex()
        self.key = read_operator_key(folder / "operator")
        self.identities = [new_site_keys(folder / f"keys-{number}").identity for number in range(3)]
        for number in range(2):
            self.enrol(number)
        self.counter = ReplayCounter(folder / "memory" / "replay.json")

    def enrol(self, number: int) -> None:
        public = self.folder / f"keys-{number}" / "site-public.json"
        enrol(self.roster, public, name=f"site-{number}", client_id=number, operator=self.key)

    def pinned(self, number: int = 0, operator: str | None = None) -> PinnedRoster:
        path = self.folder / "site.toml"
        pin = f'operator = "{operator or self.operator}"' if operator != "" else ""
        path.write_text(f'id = 0\ntask = "task.py"\n[secure_aggregation]\n{pin}\n')
        return pinned_roster(load_site(path), self.identities[number], self.counter)


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def test_a_site_pins_the_roster_of_its_operator(fleet: Fleet) -> None:
    pinned = fleet.pinned()
    assert dict(pinned.keys) == dict(enumerate(fleet.identities[:2]))
    assert (pinned.serial, pinned.operator) == (2, fleet.operator)
    check_roster(parameters(roster=pinned.digest), pinned)


def test_a_site_does_not_go_back_to_a_roster_from_before_a_change(fleet: Fleet) -> None:
    old, before = fleet.roster.read_bytes(), fleet.pinned()
    fleet.enrol(2)
    after = fleet.pinned()
    assert (after.serial, set(after.keys)) == (3, {0, 1, 2})
    fleet.roster.write_bytes(old)
    with pytest.raises(RefusalError, match="this site's roster has serial 2, and it has seen serial 3; it needs"):
        fleet.pinned()
    with pytest.raises(RefusalError) as caught:
        check_roster(parameters(roster=after.digest), before)
    assert (caught.value.rule, str(caught.value)) == (
        "roster",
        f"the server goes by the roster {after.digest[:16]}, this site pins {before.digest[:16]} of serial 2; both "
        "need the operator's newest roster",
    )
    with pytest.raises(RefusalError, match="the server goes by the roster of nobody, this site pins"):
        check_roster(parameters(), before)


def test_a_site_that_is_revoked_or_has_other_keys_does_not_take_part(fleet: Fleet) -> None:
    with pytest.raises(
        ConfigError, match="the roster of serial 2 has another identity key for client 0 than this site"
    ):
        fleet.pinned(1)
    revoke(fleet.roster, "site-0", operator=fleet.key)
    with pytest.raises(ConfigError, match="client 0 is revoked on the roster of serial 3; ask the operator why"):
        fleet.pinned()


def test_another_operators_roster_is_not_believed_and_leaves_no_trace(fleet: Fleet) -> None:
    with pytest.raises(ConfigError, match="the pinned operator is abababababababab; ask your operator"):
        fleet.pinned(operator="ab" * 32)
    with pytest.raises(ConfigError, match="site.toml names no operator whose roster could be believed; set secure_agg"):
        fleet.pinned(operator="")
    assert not (fleet.folder / "memory").exists()
